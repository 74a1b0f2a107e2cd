"""Is a model that was taken apart still the model? Both are run, in both modes, on two batches, and compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from localrecon.chain import Chain, UnsplittableModelError
from localrecon.inputs import Inputs, call, logits_of, mapped, samples_in, tensors_of
from localrecon.routes import calling
from localrecon.segments import SegmentChain, options_of
from tenfold.modules import evaluating
from tenfold.randomness import key, keyed, seed_all

TINY = 1e-3
"""Parameters that are nowhere larger (classifiers and layer scales begin so) are drawn for the comparison: else outputs would
say nothing of what the blocks do."""


def check_same(chain: Chain, sample: Inputs) -> None:
    """The blocks one after another give what the model gives: relative to its output, with equal random numbers.

    A cut behind which something else than the tensor is needed (a detached feature, say) is found since skipped outputs are
    NaN here.

    Raises:
        UnsplittableModelError: they do not.
    """
    model = chain.model
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), _drawn(model), _buffers_kept(model):
        try:
            for training in (True, False):
                if not training:
                    model.eval()
                for inputs in (sample, *shorter(sample)):
                    _compare(chain, inputs)
        finally:
            for module, training in modes:
                module.training = training


def leaking_cuts(chain: SegmentChain, sample: Inputs) -> list[str]:
    """Cuts behind which more is needed than what crosses: something that autograd does not see, such as a detached feature."""
    model, count = chain.model, len(chain.blocks)
    with evaluating(model), _drawn(model), _keyed_blocks(chain, tensors_of(sample)[0].device):
        whole = logits_of(call(model, sample, **chain.options))

        def same(parts: Tensor) -> bool:
            return parts.shape == whole.shape and bool((parts - whole).norm() <= 0.01 * whole.norm())

        if same(_parts(chain, sample)) or not bool(torch.isfinite(whole).all()):
            return []
        leaking = []
        for number in range(1, count + 1):
            context = chain.context(sample)
            x = chain.run(0, number, sample, context)
            if not same(chain.run(number, count + 1, x, context)):
                leaking.append(chain.route.cuts[number - 1])
    return leaking


def shorter(sample: Inputs) -> list[Inputs]:
    """A smaller batch, of shorter rows where it is tokens; none where the batch has one or two samples of another kind."""
    first = tensors_of(sample)[0]
    tokens = first.ndim == 2 and not first.is_floating_point()
    rows = max(1 if tokens else 2, first.shape[0] // 2)
    length = first.shape[1] if tokens else 0
    if tokens and length > 2:

        def cut(tensor: Tensor) -> Tensor:
            if tensor.ndim >= 2 and tensor.shape[:2] == first.shape:
                return tensor[:rows, : length // 2 + 1]
            return tensor[:rows] if tensor.ndim and tensor.shape[0] == first.shape[0] else tensor

        return [mapped(cut, sample)]
    if rows == first.shape[0]:
        return []
    return [mapped(lambda t: t[:rows] if t.ndim and t.shape[0] == first.shape[0] else t, sample)]


def _compare(chain: Chain, inputs: Inputs) -> None:
    model, device = chain.model, tensors_of(inputs)[0].device
    with _buffers_kept(model), keyed(0, device=device):
        whole = _whole(chain, inputs)
    with _buffers_kept(model), keyed(0, device=device), _keyed_blocks(chain, device):
        parts = _parts(chain, inputs)
    tolerance = min(0.05, 1000 * torch.finfo(whole.dtype).eps)
    same = parts.shape == whole.shape and torch.equal(torch.isfinite(parts), torch.isfinite(whole))
    if same:
        known = torch.isfinite(whole)
        error, size = (parts - whole)[known].double().norm(), whole[known].double().norm()
        same = bool(error <= tolerance * size)
    if not same:
        mode = "training" if model.training else "evaluation"
        raise UnsplittableModelError(
            f"the blocks that the adapter {chain.adapter} finds in {type(model).__name__} do not give what the model gives"
            f" in {mode} mode on a batch of {samples_in(inputs)}: register an adapter for it"
        )


def _parts(chain: Chain, inputs: Inputs) -> Tensor:
    context, x = chain.context(inputs), inputs
    for number in range(len(chain.blocks) + 1):
        x = chain.run(number, number + 1, x, context)
    return torch.as_tensor(x)


def _whole(chain: Chain, inputs: Inputs) -> Tensor:
    """The model's output; along a route, random states are keyed behind each cut, as ``_keyed_blocks`` does."""
    model, device = chain.model, tensors_of(inputs)[0].device
    if not isinstance(chain, SegmentChain):
        return logits_of(call(model, inputs, **options_of(model)))

    def watch(number: int) -> Any:
        def make(inner: Any) -> Any:
            def watched(*args: Any, **kwargs: Any) -> Any:
                out = inner(*args, **kwargs)
                _seed(number, device)
                return out

            return watched

        return make

    _seed(0, device)
    with calling(model, {name: watch(number) for number, name in enumerate(chain.route.cuts, 1)}):
        return logits_of(call(model, inputs, **chain.options))


def _seed(number: int, device: torch.device) -> None:
    """Random states behind cut ``number``."""
    seed_all(key(0, number))
    if device.type == "cuda":
        torch.cuda.manual_seed(key(0, number))


@contextmanager
def _keyed_blocks(chain: Chain, device: torch.device) -> Iterator[None]:
    if not isinstance(chain, SegmentChain):
        yield
        return
    chain.fill, chain.at_start = float("nan"), lambda number: _seed(number, device)
    try:
        yield
    finally:
        chain.fill, chain.at_start = 0.0, None


@contextmanager
def _drawn(model: nn.Module) -> Iterator[None]:
    """Parameters that are all but zero are drawn within the block."""
    tiny = [p for p in model.parameters() if p.is_floating_point() and p.numel() and float(p.abs().amax()) <= TINY]
    before = [p.detach().clone() for p in tiny]
    with keyed(1):
        for p in tiny:
            p.copy_(0.05 * torch.randn(p.shape, dtype=torch.float32))
    try:
        yield
    finally:
        for p, values in zip(tiny, before, strict=True):
            p.copy_(values)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def tail_is_by_token(chain: Chain, sample: Inputs) -> bool:
    """Whether the tail gives the first tokens' logits from the first tokens alone."""
    count, context = len(chain.blocks), chain.context(sample)
    with evaluating(chain.model):
        x = chain.run(0, count, sample, context)
        if x.ndim != 3 or x.shape[1] < 2:
            return False
        whole, half = chain.run(count, count + 1, x, context), x.shape[1] // 2
        try:
            part = chain.run(count, count + 1, x[:, :half], context)
        except (RuntimeError, ValueError, IndexError):  # its code wants the whole length
            return False
    return part.shape[:2] == (x.shape[0], half) and torch.allclose(part, whole[:, :half], rtol=1e-3, atol=1e-6)
