"""The two class-sensitive losses: the incremental branch is silent on base classes, and its scan differs on novel ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba_fscil.config import Norm
from tenfold import distributed


@dataclass(frozen=True)
class ClassSensitiveTerms:
    """The loss and its parts, already weighted; a part without the rows that it needs is 0.

    Attributes:
        suppression_base: pulls the gate down on base rows.
        suppression_novel: pushes it up on novel ones; negative.
        separation: makes the scan's parameters differ between the two.
    """

    suppression_base: Tensor
    suppression_novel: Tensor
    separation: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the parts."""
        return self.suppression_base + self.suppression_novel + self.separation


def gate_size(gate: Tensor, norm: Norm) -> Tensor:
    """How large a gate is over some rows: a scalar whose gradient at a gate of zeros is 0.

    Args:
        gate: any shape.
        norm: ``rms`` root mean square, the same for any number of rows; ``fro_over_numel`` Frobenius norm over the number of
            entries, which falls with the root of it, as in the authors' code; ``mean_square`` as in the paper's figure.

    Source: Mamba-FSCIL, arXiv 2407.06136, framework figure and the authors' code.
    """
    if norm == "mean_square":
        return gate.square().mean()
    size = torch.linalg.vector_norm(gate)  # its subgradient at 0 is 0; sqrt of a sum would give NaN
    return size / (gate.numel() ** 0.5 if norm == "rms" else gate.numel())


class ClassSensitiveLoss(nn.Module):
    """Suppression of the gate on base rows, and separation of delta, B and C between base and novel rows.

        L = a size(G[base]) - b size(G[novel]) + s / 2 * sum over delta, B, C of |cos(mean of base rows, mean of novel rows)|

    The rows of all processes are taken together and cut into ``virtual_ranks`` equal groups, over which the terms are
    averaged; a term counts only where every group has the rows that it needs. So the result does not depend on how many
    processes there are, and 8 groups give what the authors' 8 GPUs give.

    Args:
        suppression_base: a.
        suppression_novel: b. Nothing bounds this term from below.
        separation: s.
        norm: how a gate's size is measured, see ``gate_size``.
        virtual_ranks: number of groups.

    Shapes: ``gate`` (B, L, D), ``params`` three of (B, n), ``labels`` (B,) -> ``ClassSensitiveTerms`` of scalars.

    Raises:
        ValueError: from ``forward``, for rows that the groups do not divide.

    Source: Mamba-FSCIL, arXiv 2407.06136, and its code, which computes the terms per GPU and unsquared.

    Example:
        >>> gate, params = torch.ones(4, 9, 8), (torch.eye(4), torch.eye(4), torch.eye(4))
        >>> terms = ClassSensitiveLoss(suppression_base=1.0, separation=0.1)(gate, params, torch.tensor([0, 1, 2, 3]), 2)
        >>> round(float(terms.total), 4)  # gates of size 1 on base rows; base and novel means are orthogonal
        1.0
    """

    def __init__(
        self,
        suppression_base: float = 1.0,
        suppression_novel: float = 0.0,
        separation: float = 0.1,
        norm: Norm = "rms",
        virtual_ranks: int = 1,
    ) -> None:
        super().__init__()
        self.suppression_base, self.suppression_novel = suppression_base, suppression_novel
        self.separation, self.norm, self.virtual_ranks = separation, norm, virtual_ranks

    def forward(
        self, gate: Tensor, params: tuple[Tensor, Tensor, Tensor], labels: Tensor, base_classes: int
    ) -> ClassSensitiveTerms:
        """The terms of one batch.

        Args:
            gate: gate of the incremental branch before its SiLU.
            params: mean low-rank delta, B and C of each row.
            labels: class of each row.
            base_classes: number of base classes, whose labels come first.
        """
        gate, labels = distributed.all_gather(gate), distributed.all_gather(labels)
        delta, B, C = (distributed.all_gather(p) for p in params)
        if len(labels) % self.virtual_ranks:
            raise ValueError(f"{len(labels)} rows do not make {self.virtual_ranks} equal groups (virtual_ranks)")
        base = (labels < base_classes).view(self.virtual_ranks, -1)
        has_base, has_novel = bool(base.any(dim=1).all()), bool((~base).any(dim=1).all())
        nothing = gate.new_zeros(())

        def grouped(x: Tensor) -> Tensor:
            return x.view(self.virtual_ranks, -1, *x.shape[1:])

        def sizes(rows: Tensor) -> Tensor:
            found = [gate_size(g[r], self.norm) for g, r in zip(grouped(gate), rows, strict=True)]
            return torch.stack(found).mean()

        down, up, apart = nothing, nothing, nothing
        if has_base and self.suppression_base:
            down = self.suppression_base * sizes(base)
        if has_novel and self.suppression_novel:
            up = -self.suppression_novel * sizes(~base)
        if has_base and has_novel and self.separation:
            cosines = [mean_cosine(grouped(p), base).abs().mean() for p in (delta, B, C)]
            apart = self.separation / 2 * torch.stack(cosines).sum()
        return ClassSensitiveTerms(down, up, apart)


def mean_cosine(rows: Tensor, base: Tensor) -> Tensor:
    """Cosine between the mean of base rows and the mean of the others, for each group.

    Shapes: ``rows`` (G, B, n), ``base`` (G, B) bool -> (G,).
    """
    weight = base[..., None].to(rows.dtype)
    a = (weight * rows).sum(dim=1) / weight.sum(dim=1)
    b = ((1 - weight) * rows).sum(dim=1) / (1 - weight).sum(dim=1)
    return torch.cosine_similarity(a, b, dim=1)
