"""The arithmetic of the statistics: what one call of a layer adds to its running sums.

Products of tokens are computed in fp32 and added up in fp64, in strips of the lower triangle: little more than half of the
work of the whole matrix, and each strip is added while it is in the cache.

Shapes: x is (B, T, n) or (T, n) inputs of a layer; ``rows`` are the (T, n) tokens that count.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from corda.algebra import STRIP, matmul_precision
from corda.streams import Tokens
from tenfold import NonFiniteError, UserError

CHUNK = 8192
"""Tokens of one fp32 product, before it is added to the fp64 sum."""

Part = tuple[Tensor, float]
"""Tokens (T, n), and the factor of their products."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of a layer adds to its sums: ``factor`` times the matrix of these ``lower_strips``."""

    strips: Iterable[Tensor]
    factor: float
    tokens: int
    samples: int


@dataclasses.dataclass
class Sum:
    """The running sums of one input: C (n, n), of which the lower triangle counts, or W C (m, n) with tr C; in fp64."""

    moment: Tensor
    trace: float = 0.0
    tokens: int = 0
    samples: int = 0
    calls: int = 0
    pending: Call | None = None
    """The latest call, until all layers that share the sum have received its input."""
    followers: dict[str, int] = dataclasses.field(default_factory=dict)
    """Layers that share the sum -> how many calls they share."""

    def settle(self) -> None:
        """Add the pending call to the sums."""
        if self.pending is not None:
            start = 0
            for strip in self.pending.strips:
                end = strip.shape[1]
                self.moment[start:end, :end].add_(strip, alpha=self.pending.factor)
                start = end
            self.tokens += self.pending.tokens
            self.samples += self.pending.samples
            self.pending = None


def samples_of(x: Tensor, tokens: Tokens, scale: str) -> tuple[list[Tensor], int]:
    """The tokens of x that count, (T, n), separately for each sample where it has its own scale, and the number of samples.

    Args:
        x: inputs of a layer, (B, ..., n), or rows (R, n) of several samples.
        tokens: what of it counts.
        scale: as in ``CordaInit``; ``peft`` gives each sample its own.
    """
    x = x.detach()
    keep = None if tokens.keep is None else tokens.keep.to(x.device)
    if isinstance(tokens.sample, Tensor):
        sample = tokens.sample.to(x.device)
        if keep is not None:
            x, sample = x[keep], sample[keep]
        present = torch.unique(sample)
        if scale != "peft":
            return [x] if len(x) else [], len(present)
        if len(present) == 1:
            return [x], 1
        return [x[sample == number] for number in present], len(present)
    if isinstance(tokens.sample, int):
        x = x.reshape(tokens.sample, -1, x.shape[-1])
    x = x[None] if x.ndim == 2 else x.reshape(x.shape[0], -1, x.shape[-1])
    whole = keep is None or bool(keep.all())
    count = len(x) if whole or keep is None else int(keep.any(dim=1).sum())
    if scale == "peft":
        samples = list(x) if whole or keep is None else [row[kept] for row, kept in zip(x, keep, strict=True)]
    else:
        samples = [x.flatten(0, 1) if whole else x[keep]]
    return [rows for rows in samples if len(rows)], count


def weight_of_sample(rows: Tensor, scale: str) -> float:
    """The factor of a sample's products: 1 / max(x)^2 with ``peft``, else 1.

    It multiplies the products, not the tokens: values of bf16 and fp16 stay as they are, so that fp32 holds their products
    exactly.

    Raises:
        UserError: the largest input is 0, which ``peft`` cannot divide by.
    """
    if scale != "peft":
        return 1.0
    top = rows.max().abs().double().item()
    if top == 0:
        raise UserError("a sample whose largest input is 0; use scale token_mean")
    return 1 / top**2


def chunks(samples: Iterable[Tensor]) -> list[Tensor]:
    """The tokens of all samples in pieces of at most ``CHUNK`` tokens, none of which mixes samples."""
    return [rows[i : i + CHUNK] for rows in samples for i in range(0, len(rows), CHUNK)]


def sum_of_products(parts: Sequence[Part]) -> tuple[Iterable[Tensor], float]:
    """The sum of factor x x^T as ``lower_strips``, and a factor still to be applied.

    The products of a single part are computed while they are iterated over.

    Raises:
        NonFiniteError: NaN or infinity in the tokens, after the last strip.
    """
    if len(parts) == 1:
        rows, factor = parts[0]
        return _finite_strips(rows), factor
    total: list[Tensor] = []
    for rows, factor in parts:
        strips = _finite_strips(rows)
        if not total:
            total = [strip.double().mul_(factor) for strip in strips]
            continue
        for part, strip in zip(total, strips, strict=True):
            part.add_(strip, alpha=factor)
    return total, 1.0


def _finite_strips(rows: Tensor) -> Iterator[Tensor]:
    squares = torch.zeros((), dtype=torch.float64, device=rows.device)
    for strip in lower_strips(rows):
        squares += strip.diagonal(strip.shape[1] - strip.shape[0]).sum()
        yield strip
    check_finite(squares)


def check_finite(squares: Tensor) -> None:
    """Raise ``NonFiniteError`` unless the squares of all inputs add up to a finite number."""
    if not torch.isfinite(squares):
        raise NonFiniteError("NaN or infinity in its input")


def lower_strips(rows: Tensor) -> Iterator[Tensor]:
    """``rows``^T ``rows`` in at least fp32: strips of its rows, each from the first column to the end of its diagonal block.

    They hold the lower triangle; torch has no product that is known to be symmetric.
    """
    half, rows = is_half(rows), at_least_single(rows)
    for start in range(0, rows.shape[1], STRIP):
        end = start + STRIP
        with matmul_precision(tf32=half):
            strip = rows[:, start:end].T @ rows[:, :end]
        yield strip


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor is fp16 or bf16, whose products fp32 holds exactly."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
