"""Modules in several processes, forward only: module k + 1 needs (x_k, T_k, labels) of a step, and nothing comes back.

So there is no bubble once the pipe is full, no stashed weights, and the result is that of one process, bit for bit (same
threads; random states depend on seed, module and step alone).
"""

import contextlib
import dataclasses
import itertools
import queue as queues
import traceback
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from localrecon.boundary import Boundary, StepOptions, first_boundary
from localrecon.config import SGRConfig
from localrecon.inputs import Inputs
from localrecon.net import LocalNet
from localrecon.optimizers import OptimizerFactory, SchedulerFactory
from localrecon.plan import partition
from localrecon.step import ModuleReport, StepReport, train_stage
from tenfold import UserError


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a worker is started with."""

    net: LocalNet
    first: int
    past: int
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    sgr: SGRConfig
    options: StepOptions
    device: str
    threads: int


class PipelineTrainer:
    """Train a net's modules in several processes; the same numbers as ``local_step`` in one.

    ::

        with PipelineTrainer(net, partial(torch.optim.AdamW, lr=1e-3), workers=2) as trainer:
            for report in trainer.steps(batches):
                ...
            trainer.collect()  # net has the trained weights again

    Start it under ``if __name__ == "__main__":``, since processes are spawned. Each worker holds the whole net, trains its
    own modules, and keeps their optimizers. Boundaries travel through the host's memory.

    Args:
        net: the net; it may not be used until ``collect``.
        optimizer: parameters -> optimizer; a function that can be sent to a process (``functools.partial``, no lambda).
        sgr: the reconciliation.
        options: seed, clip_norm and the like; ``step`` is the number of the first step.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step; it can be sent to a process as well.
        workers: number of processes; each gets neighboring modules with about equal shares of the computation.
        devices: one per worker, such as ["cuda:0", "cuda:1"]; default: all on the CPU.
        queue: batches that may wait before each worker; bounds the memory.
        threads: threads of each worker.
        timeout: seconds without any result after which the workers are given up on.

    Raises:
        UserError: more workers than modules, or a device for each is not given.
    """

    def __init__(
        self,
        net: LocalNet,
        optimizer: OptimizerFactory,
        sgr: SGRConfig | None = None,
        options: StepOptions | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        workers: int = 2,
        devices: Sequence[str] | None = None,
        queue: int = 2,
        threads: int = 1,
        timeout: float = 300.0,
    ) -> None:
        if not 1 <= workers <= net.plan.k:
            raise UserError(f"workers must be 1 to {net.plan.k}, the number of modules, got {workers}")
        if devices is not None and len(devices) != workers:
            raise UserError(f"{workers} workers need as many devices, got {len(devices)}")
        if queue < 1:
            raise UserError(f"queue must be 1 or more, got {queue}")
        self.net, self.workers, self.timeout = net, workers, timeout
        self.options = options or StepOptions()
        self.sgr = sgr or SGRConfig()
        self.settings = (optimizer, scheduler, list(devices or ["cpu"] * workers), queue, threads)
        self.step = self.options.step

    def __enter__(self) -> "PipelineTrainer":
        optimizer, scheduler, devices, size, threads = self.settings
        net, context = self.net, mp.get_context("spawn")
        flops = [sum(net.plan.flops[a:b]) for a, b in net.plan.ranges]
        edges = [0, *partition(net.plan.k, self.workers, lambda a, b: sum(flops[a:b])), net.plan.k]
        self._inputs = [context.Queue(size) for _ in range(self.workers)]
        self._results: Any = context.Queue()
        self._stop = context.Event()
        self._processes = []
        for w, (first, past) in enumerate(itertools.pairwise(edges)):
            work = _Work(net, first, past, optimizer, scheduler, self.sgr, self.options, devices[w], threads)
            after = self._inputs[w + 1] if w + 1 < self.workers else None
            arguments = (work, w, self._inputs[w], after, self._results, self._stop)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for one in self._inputs:
            one.cancel_join_thread()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
                process.join()

    def steps(self, batches: Iterable[tuple[Inputs, Tensor]]) -> Iterator[StepReport]:
        """Train on each batch; the reports come in order, a few steps late.

        Raises:
            RuntimeError: a worker has died or has not answered in time.
            UserError: what a step raises, as in one process.
        """
        found: dict[int, dict[int, ModuleReport]] = {}
        step = self.step
        for inputs, labels in batches:
            boundary = first_boundary(self.net, inputs, labels, self.options.accumulate)
            yield from self._put((step_message(step, boundary)), found)
            step += 1
        while self.step < step:
            self._receive(found)
            yield from self._complete(found)

    def _put(self, message: Any, found: dict[int, dict[int, ModuleReport]]) -> Iterator[StepReport]:
        """Into the first queue; while it is full, take results."""
        while True:
            try:
                self._inputs[0].put(message, timeout=0.05)
                break
            except queues.Full:
                self._receive(found)
                yield from self._complete(found)

    def _receive(self, found: dict[int, dict[int, ModuleReport]]) -> None:
        kind, *values = self._get()
        assert kind == "report"
        step, reports = values
        found.setdefault(step, {}).update(reports)

    def _complete(self, found: dict[int, dict[int, ModuleReport]]) -> Iterator[StepReport]:
        k = self.net.plan.k
        while len(found.get(self.step, {})) == k:
            reports = found.pop(self.step)
            self.step += 1
            yield StepReport(tuple(reports[i] for i in range(k)))

    def _get(self) -> Any:
        """The next result of any worker; a fault of a worker is raised here, with its traceback."""
        waited = 0.0
        while True:
            try:
                message = self._results.get(timeout=0.5)
            except queues.Empty:
                waited += 0.5
                dead = [(w, p.exitcode) for w, p in enumerate(self._processes) if p.exitcode is not None]
                if dead:
                    raise RuntimeError(
                        f"pipeline worker {dead[0][0]} ended with exit code {dead[0][1]} and said nothing"
                    ) from None
                if waited >= self.timeout:
                    raise RuntimeError(f"no pipeline worker has answered for {self.timeout:.0f} s") from None
                continue
            if message[0] == "fault":
                _, worker, error, text = message
                if error is not None:
                    raise error from RuntimeError(f"in pipeline worker {worker}:\n{text}")
                raise RuntimeError(f"pipeline worker {worker} failed:\n{text}")
            return message

    def collect(self) -> None:
        """Bring the trained weights, statistics and gate averages back into the net."""
        self._inputs[0].put(("collect",))
        waiting = self.workers
        stages = self.net.segments
        while waiting:
            kind, *values = self._get()
            assert kind == "weights"
            for k, (weights, average) in values[0].items():
                stages[k].load_state_dict(weights)
                stages[k].loss_average = average
            waiting -= 1


def step_message(step: int, boundary: Boundary) -> tuple[Any, ...]:
    """What one process sends to the next."""
    fields = (boundary.x, boundary.target, boundary.context, boundary.labels, boundary.loss_average)
    return ("step", step, *fields)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _worker(work: _Work, number: int, inputs: Any, after: Any, results: Any, stop: Any) -> None:
    try:
        _work(work, number, inputs, after, results, stop)
    except KeyboardInterrupt:
        return
    except Exception as error:  # whatever it is, the parent raises it
        text = traceback.format_exc()
        sent = error if isinstance(error, UserError | RuntimeError | TypeError) else None
        results.put(("fault", number, sent, text))


def _work(work: _Work, number: int, inputs: Any, after: Any, results: Any, stop: Any) -> None:
    torch.set_num_threads(work.threads)
    net = work.net.to(work.device)
    stages = net.segments[work.first : work.past]
    optimizers = [work.optimizer(stage.trained()) for stage in stages]
    schedulers = [work.scheduler(optimizer) for optimizer in optimizers] if work.scheduler else []
    while not stop.is_set():
        try:
            message = inputs.get(timeout=0.2)
        except queues.Empty:
            continue
        if message[0] == "collect":
            if after is not None:
                _offer(after, message, stop)
            weights = {stage.index: (_moved(stage.state_dict(), "cpu"), stage.loss_average) for stage in stages}
            results.put(("weights", weights))
            continue
        _, step, *fields = message
        boundary = Boundary(*_moved(fields, work.device))
        del fields, message
        options = dataclasses.replace(work.options, step=step)
        reports = {}
        for stage, optimizer in zip(stages, optimizers, strict=True):
            reports[stage.index] = train_stage(stage, boundary, optimizer, work.sgr, options)
        for scheduler in schedulers:
            scheduler.step()
        if after is not None:
            _, _, *sent = step_message(step, boundary)
            _offer(after, ("step", step, *_moved(sent, "cpu")), stop)
        results.put(("report", step, reports))


def _offer(queue: Any, message: Any, stop: Any) -> None:
    while not stop.is_set():
        with contextlib.suppress(queues.Full):
            queue.put(message, timeout=0.2)
            return
