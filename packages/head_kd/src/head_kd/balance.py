"""Distillation weights from gradients: how strongly each term pulls at the student's maps, next to the detection loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OURS = ("assist", "akd", "ckd", "neck")
"""First words of the names of all losses that are not the student's own."""


def gradient_norms(losses: Mapping[str, Any], terms: Mapping[str, Tensor], features: Sequence[Tensor]) -> Tensor:
    """Norm of the gradient at the student's maps: of the student's detection loss first, then of each term.

    Args:
        losses: detection losses by name, those of assistants among them, which do not count.
        terms: distillation terms by name.
        features: the student's maps, in the graph of both.

    Shapes: (1 + number of terms,) float64; 0 for a term that does not reach the maps.
    """
    detection = sum(
        torch.as_tensor(v).mean() if isinstance(v, Tensor) else sum(x.mean() for x in v)
        for k, v in losses.items()
        if "loss" in k and not k.startswith(OURS)
    )
    norms = []
    for value in (detection, *terms.values()):
        if not isinstance(value, Tensor) or not value.requires_grad:
            norms.append(torch.zeros((), dtype=torch.float64))
            continue
        grads = torch.autograd.grad(value, features, retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum().cpu() for g in grads if g is not None]
        norms.append(torch.stack(squares or [torch.zeros(())]).sum().sqrt())
    return torch.stack(norms)


def shared_factors(norms: Tensor, ratio: float) -> Tensor:
    """Factors f with ||grad of f_k term_k|| = ratio / K * ||grad of the detection loss|| for each of the K terms.

    Args:
        norms: what ``gradient_norms`` gives, or a sum of several.
        ratio: share of all terms together.

    Shapes: (1 + K,) -> (K,); 1 for a term without gradient.
    Source: ours.
    """
    share = ratio / max(1, len(norms) - 1)
    return torch.where(norms[1:] > 0, share * norms[0] / norms[1:].clamp_min(1e-30), torch.ones_like(norms[1:]))
