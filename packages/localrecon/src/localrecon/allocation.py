"""What a step needs by the allocator's own account: temporaries within operators count, which live tensors do not show."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_peak(step: Callable[[], Any]) -> int:
    """Largest growth, in bytes, of what torch's CPU allocator has handed out during a call.

    ``tenfold.memory.MemoryProbe`` counts tensors that code can see. An operator that reorders its input or takes a
    workspace for a moment needs more; the allocator reports each such piece. What was there before the call does not count.

    Args:
        step: what is measured; called once.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    results: Any = found.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
