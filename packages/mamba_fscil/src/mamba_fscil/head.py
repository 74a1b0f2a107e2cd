"""A classifier that is fixed before anything is learned: the vertices of a simplex, one per class, future ones included."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import UserError, distributed


def simplex_etf(dim: int, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """K unit vectors of R^d with pairwise inner products -1 / (K - 1), as the columns of (d, K).

        W = sqrt(K / (K - 1)) U (I - 1 1^T / K),   U orthonormal columns by QR of a uniform random matrix

    Args:
        dim: dimension d.
        classes: number K of vectors.
        generator: what the matrix is drawn from; default: torch's global one.

    Raises:
        UserError: fewer than 2 classes, or more than ``dim``.

    Source: NC-FSCIL, arXiv 2302.03004, Eq. 2.
    """
    if not 2 <= classes <= dim:
        raise UserError(
            f"a simplex of {classes} classes does not fit into {dim} dimensions: expected 2 to {dim} classes"
        )
    drawn = torch.rand(dim, classes, generator=generator, dtype=torch.float64)
    u, _ = torch.linalg.qr(drawn)
    centered = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return ((classes / (classes - 1)) ** 0.5 * u @ centered).float()


class ETFHead(nn.Module):
    """Cosines of embeddings with the fixed vectors of the classes; ``W`` is a buffer and belongs to the model.

    Args:
        dim: dimension d of an embedding.
        capacity: number K of classes that there can ever be.
        generator: what the vectors are drawn from.

    Raises:
        UserError: more classes than dimensions.

    Source: NC-FSCIL, arXiv 2302.03004, section 4.1.

    Example:
        >>> head = ETFHead(dim=8, capacity=5)
        >>> cosines = head.W.T @ head.W  # 1 with itself, -1 / (K - 1) with all others
        >>> bool((cosines - (1.25 * torch.eye(5) - 0.25)).abs().max() < 1e-5)
        True
    """

    W: Tensor

    def __init__(self, dim: int, capacity: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("W", simplex_etf(dim, capacity, generator))

    @property
    def capacity(self) -> int:
        """Number of classes that there can ever be."""
        return self.W.shape[1]

    def forward(self, embeddings: Tensor, seen: int | None = None) -> Tensor:
        """Cosines with the first ``seen`` classes; default: all.

        Shapes: ``embeddings`` (B, d) -> (B, seen).
        """
        return F.normalize(embeddings, dim=1) @ self.W[:, :seen]


def dot_regression_loss(
    embeddings: Tensor, W: Tensor, labels: Tensor, *, balanced: bool = False, weight: float = 10.0
) -> Tensor:
    """Squared distance of each embedding's cosine with its class vector from 1.

        L = weight / 2 * mean_i (<w_{y_i}, mu_i / |mu_i|> - 1)^2

    Balanced, it is the mean over the classes that are present of the mean within each class. Counts are those of the batches
    of all processes together, and the mean over processes of what each returns is the loss of the whole batch.

    Args:
        embeddings: mu.
        W: class vectors of unit length.
        labels: class of each embedding.
        balanced: whether each class counts the same.
        weight: factor of the loss.

    Shapes: ``embeddings`` (B, d), ``W`` (d, K), ``labels`` (B,) int64 in [0, K) -> scalar.

    Source: NC-FSCIL, arXiv 2302.03004, Eq. 5. The authors' code writes the balanced form by class-wise lengths of targets,
    which is the same.

    Example:
        >>> dot_regression_loss(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]))
        tensor(0.)
    """
    cosine = (F.normalize(embeddings, dim=1) * W.t()[labels]).sum(dim=1)
    each = (cosine - 1).square()
    if not balanced:
        return weight / 2 * each.mean()
    everyone = distributed.all_gather(labels)
    counts = torch.bincount(everyone, minlength=W.shape[1])
    share = distributed.world_size() / (counts[labels] * (counts > 0).sum())
    return weight / 2 * (share * each).sum()
