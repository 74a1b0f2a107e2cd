"""What the modules of a net want of each other, and how far local learning is from back-propagation, on one batch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localrecon.boundary import checked_labels
from localrecon.inputs import Inputs, Labels, tensors_of
from localrecon.losses import terms_of
from localrecon.net import LocalNet
from localrecon.profiling import in_training
from localrecon.stage import frozen_statistics
from tenfold.randomness import keyed

COPYING_COSINE = 0.75
"""Mean cosine at the boundaries from which on modules want so exactly what the one before wants that it is suspicious ..."""
COPYING_ERROR = 0.1
"""... where the last head's error is at least this (cosines of the worst collapses on digits: 0.79 to 0.86; milder: less)."""


@dataclass(frozen=True)
class BoundaryReport:
    """Boundary k: what module k does with its output, and what module k + 1 asks of the same tensor.

    Attributes:
        gap: |g_in - g_out| / |g_out|.
        cosine: cosine of g_in and g_out, mean over samples.
        pooled_cosine: the same for gradients summed over positions (equal to it where there are none).
        certificate: <J^T g_in, J^T g_out> / (|J^T g_in| |J^T g_out|), J of the module's parameters. Where it is positive, a
            small step of module k lowers the loss of module k + 1, too.
    """

    gap: float
    cosine: float
    pooled_cosine: float
    certificate: float


@dataclass(frozen=True)
class ReconReport:
    """What ``diagnose`` found.

    Attributes:
        losses: loss of each head.
        accuracies: accuracy of each head, in [0, 1]; None with a loss of the user's.
        boundaries: what was found at each boundary.
        bp_alignment: cosine of the backbone's local gradients, all together, with the gradient of back-propagation.
        warnings: what looks wrong, in words.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float | None, ...]
    boundaries: tuple[BoundaryReport, ...]
    bp_alignment: float
    warnings: tuple[str, ...]

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Headers and rows of a table, one row per module."""
        headers = ["module", "loss", "accuracy", "gap to next", "cosine", "pooled cosine", "certificate"]
        rows: list[list[Any]] = []
        for k, (loss, accuracy) in enumerate(zip(self.losses, self.accuracies, strict=True)):
            row: list[Any] = [k + 1, f"{loss:.4f}", "-" if accuracy is None else f"{accuracy:.3f}"]
            if k < len(self.boundaries):
                b = self.boundaries[k]
                row += [f"{value:.3f}" for value in (b.gap, b.cosine, b.pooled_cosine, b.certificate)]
            rows.append(row + ["-"] * (len(headers) - len(row)))
        return headers, rows

    def to_markdown(self) -> str:
        """The table, the alignment with back-propagation, and the warnings, as Markdown."""
        headers, rows = self.rows()
        lines = [f"| {' | '.join(map(str, line))} |" for line in (headers, ["---"] * len(headers), *rows)]
        lines += ["", f"Cosine of local gradients with back-propagation's: {self.bp_alignment:.3f}."]
        return "\n".join(lines + [f"\nWarning: {warning}." for warning in self.warnings]) + "\n"


def diagnose(net: LocalNet, inputs: Inputs, labels: Labels, seed: int = 0) -> ReconReport:
    """What the modules of a net want on one batch, in training mode; the net is not changed (nor are random states).

    It holds the graph of the whole model once, for the gradient of back-propagation.

    Args:
        net: the net.
        inputs: inputs, as for ``local_step``.
        labels: labels, as for ``local_step``.
        seed: seed of dropout.

    Raises:
        UserError: labels that do not fit.
    """
    labels = checked_labels(net, labels)
    with in_training(net.model):
        net.heads.train()
        try:
            return _diagnose(net, inputs, labels, seed)
        finally:
            net.heads.train(net.training)


def _diagnose(net: LocalNet, inputs: Inputs, labels: Labels, seed: int) -> ReconReport:
    losses, boundaries = [], []
    accuracies: list[float | None] = []
    local: list[Tensor] = []
    context = net.chain.context(inputs)
    x: Any = inputs
    terms = max(1, terms_of(labels, net.plan.task))
    device = tensors_of(labels)[0].device
    before: tuple[Tensor, list[nn.Parameter], Tensor] | None = None  # output with its graph, parameters, g_out
    for stage in net.segments:
        if before is not None:
            x = x.detach().requires_grad_()
        head = {id(p) for p in stage.head_parameters()} if not stage.is_last else set()
        backbone = [p for p in stage.trained() if id(p) not in head]
        with keyed(seed, stage.index, device=device), frozen_statistics(stage.norms), stage.probing():
            out = stage.run_blocks(x, context)
            loss, correct = stage.judge(out, context, labels)
        asked = [out, *([x] if before is not None else []), *backbone]
        grads = list(torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True))
        g_out = grads.pop(0)
        if before is not None:
            g_in = grads.pop(0)
            assert g_in is not None
            boundaries.append(_boundary(before, g_in))
        assert g_out is not None
        local += [_or_zero(g, p) for g, p in zip(grads, backbone, strict=True)]
        losses.append(float(loss.detach()))
        accuracies.append(float(correct) / terms if net.loss is None else None)
        before = (out, backbone, g_out)
        x = out
    del before
    alignment = _cosine(local, _bp_gradient(net, inputs, labels, seed))
    warnings = []
    cosine = sum(b.cosine for b in boundaries) / max(1, len(boundaries))
    right = accuracies[-1]
    if right is not None and cosine >= COPYING_COSINE and right <= 1 - COPYING_ERROR:
        warnings.append(
            f"later modules copy the head before them: their gradients have a mean cosine of {cosine:.2f} with its, and the"
            f" last head is right on {100 * right:.0f} %; lower lam, or give stronger heads"
        )
    against = [k + 1 for k, b in enumerate(boundaries) if b.certificate < 0]
    if against:
        warnings.append(f"the update of module {', '.join(map(str, against))} raises the loss of the module after it")
    return ReconReport(tuple(losses), tuple(accuracies), tuple(boundaries), alignment, tuple(warnings))


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _boundary(before: tuple[Tensor, list[nn.Parameter], Tensor], g_in: Tensor) -> BoundaryReport:
    out, parameters, g_out = before
    ours, theirs = (
        [
            _or_zero(g, p)
            for g, p in zip(
                torch.autograd.grad(out, parameters, g, retain_graph=True, allow_unused=True), parameters, strict=True
            )
        ]
        for g in (g_out, g_in)
    )
    return BoundaryReport(
        gap=float((g_in - g_out).norm() / g_out.norm().clamp_min(1e-30)),
        cosine=float(F.cosine_similarity(g_in.flatten(1), g_out.flatten(1), dim=1).mean()),
        pooled_cosine=float(F.cosine_similarity(_pooled(g_in), _pooled(g_out), dim=1).mean()),
        certificate=_cosine(ours, theirs),
    )


def _pooled(g: Tensor) -> Tensor:
    return g.flatten(2).sum(dim=2) if g.ndim == 4 else g.sum(dim=1) if g.ndim == 3 else g


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    product = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    norms = [math.sqrt(sum(float(x.double().square().sum()) for x in side)) for side in (a, b)]
    return product / (norms[0] * norms[1]) if norms[0] * norms[1] else 0.0


def _bp_gradient(net: LocalNet, inputs: Inputs, labels: Labels, seed: int) -> list[Tensor]:
    """The gradient of the last loss for the backbone's parameters, in the order of the modules."""
    context = net.chain.context(inputs)
    x: Any = inputs
    parameters: list[Tensor] = []
    device = tensors_of(labels)[0].device
    for stage in net.segments:
        head = {id(p) for p in stage.head_parameters()} if not stage.is_last else set()
        parameters += [p for p in stage.trained() if id(p) not in head]
        with keyed(seed, stage.index, device=device), frozen_statistics(stage.norms), stage.probing():
            x = stage.run_blocks(x, context)
            if stage.is_last:
                loss, _ = stage.judge(x, context, labels)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [_or_zero(g, p) for g, p in zip(grads, parameters, strict=True)]
