"""Accuracy of nearest neighbors: the quickest look at features, with nothing to train."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 4
"""Entries of a group in the search for the largest ones."""
ROWS = 32
"""Queries whose products are sorted at once: what sorting needs beside the products is small."""


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and where they are, as ``topk``, which it saves most of its work in long rows.

    A row is cut into groups of four; the k largest entries lie in the k groups of the largest maxima, so that only those are
    sorted. The groups of the largest maxima are found in the same way.

    Shapes: (Q, M) -> (Q, k), (Q, k) int64, in falling order.
    """
    where = _among_groups(values, k)
    found = values.gather(1, where).topk(k, dim=1)
    return found.values, where.gather(1, found.indices)


def _among_groups(values: Tensor, k: int) -> Tensor:
    """Places (Q, 4 k or a few more) that hold the k largest entries of each row; all places of a short row."""
    count = values.shape[1]
    own = torch.arange(count, device=values.device)
    if count <= 2 * GROUP * k:
        return own.expand(len(values), -1)
    groups = count // GROUP
    maxima = values[:, : groups * GROUP].view(len(values), GROUP, groups).amax(dim=1)
    near = _among_groups(maxima, k)
    tops = near.gather(1, maxima.gather(1, near).topk(k, dim=1, sorted=False).indices)
    among = own[: groups * GROUP : groups, None]  # entries of a group stand ``groups`` apart
    return torch.cat([(tops[:, None] + among).flatten(1), own[groups * GROUP :].expand(len(values), -1)], dim=1)


@torch.no_grad()
def knn_votes(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 128,
) -> Tensor:
    """Weighted votes of the nearest neighbors for each class.

        v_c = sum over the k nearest j with y_j = c of exp(cos(x, b_j) / T)

    Chunks of queries meet the bank in one product each, all in one buffer, and votes are added in place: memory is that of
    ``chunk`` rows, and the bank is not copied (one in float32 is scaled in the products). There are no gradients.

    Args:
        queries: features to classify.
        bank: features of known class.
        labels: their classes.
        classes: number of classes.
        k: neighbors; of a smaller bank, all.
        temperature: T; votes are divided by the largest of a query, which changes no order.
        chunk: queries at once.

    Shapes: (Q, D), (M, D), (M,) int64 -> (Q, classes).

    Raises:
        ValueError: an empty bank, or features and labels that do not fit.

    Source: Wu et al., arXiv 1805.01978, section 3.4: k = 200, T = 0.07.
    """
    if not len(bank) or len(bank) != len(labels) or queries.shape[1:] != bank.shape[1:]:
        raise ValueError(
            f"bank {tuple(bank.shape)}, labels {tuple(labels.shape)}, queries {tuple(queries.shape)}: no fit"
        )
    if k > len(bank):
        warnings.warn(f"k is {k}, but the bank holds {len(bank)}: all of them vote", stacklevel=2)
        k = len(bank)
    known = bank.float()
    scale = 1 / torch.linalg.vector_norm(known, dim=1).clamp_min(1e-12)
    votes = known.new_zeros(len(queries), classes)
    products = known.new_empty(min(chunk, len(queries)), len(known))
    for start in range(0, len(queries), chunk):
        part = F.normalize(queries[start : start + chunk].float().to(known.device), dim=1)
        found = torch.mm(part, known.T, out=products[: len(part)])
        for row in range(0, len(part), ROWS):
            near, where = largest(found[row : row + ROWS].mul_(scale), k)
            strength = ((near - near[:, :1]) / temperature).exp()
            votes[start + row : start + row + len(near)].scatter_add_(1, labels[where], strength)
    return votes


def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    top: Sequence[int] = (1, 5),
    chunk: int = 128,
) -> dict[int, float]:
    """Share of queries in percent whose class is among the ``top`` most voted ones, by ``top``.

    A class without a vote is in no ranking: where all neighbors are of one class, only that class counts.

    Shapes: (Q, D), (Q,), (M, D), (M,).

    Example:
        >>> points, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn_accuracy(points, labels, points, labels, k=1, top=(1,))
        {1: 100.0}
    """
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    votes = knn_votes(queries, bank, bank_labels, classes, k=k, temperature=temperature, chunk=chunk)
    order = votes.topk(min(max(top), classes), dim=1)
    right = (order.indices == query_labels[:, None].to(votes.device)) & (order.values > 0)
    return {t: 100 * float(right[:, :t].any(dim=1).double().mean()) for t in top}
