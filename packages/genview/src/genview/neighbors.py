"""Accuracy of nearest neighbors: the quickest look at features, with nothing to train."""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and where they are, as ``topk``, which it saves most of its work in long rows.

    A row is cut into groups; the k largest entries lie in the k groups of the largest maxima, so that only those are sorted.

    Shapes: (Q, M) -> (Q, k), (Q, k) int64, in falling order.
    """
    size = math.isqrt(values.shape[1] // k)
    if size < 4:
        found = values.topk(k, dim=1)
        return found.values, found.indices
    groups = values.shape[1] // size
    own = torch.arange(values.shape[1], device=values.device)
    split = values[:, : groups * size].view(len(values), size, groups)
    tops = split.amax(dim=1).topk(k, dim=1, sorted=False).indices
    rest = own[groups * size :].expand(len(values), -1)
    among = own[: groups * size : groups, None]  # entries of a group stand ``groups`` apart
    where = torch.cat([(tops[:, None] + among).flatten(1), rest], dim=1)
    found = values.gather(1, where).topk(k, dim=1)
    return found.values, where.gather(1, found.indices)


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

    Chunks of queries meet the bank in one product each, and votes are added in place: memory is that of ``chunk`` rows, and the
    bank is not copied (one in float32 is scaled in the products).

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
    for start in range(0, len(queries), chunk):
        part = F.normalize(queries[start : start + chunk].float().to(known.device), dim=1)
        near, where = largest((part @ known.T).mul_(scale), k)
        strength = ((near - near[:, :1]) / temperature).exp()
        votes[start : start + chunk].scatter_add_(1, labels[where], strength)
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

    Shapes: (Q, D), (Q,), (M, D), (M,).

    Example:
        >>> points, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn_accuracy(points, labels, points, labels, k=1, top=(1,))
        {1: 100.0}
    """
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    votes = knn_votes(queries, bank, bank_labels, classes, k=k, temperature=temperature, chunk=chunk)
    order = votes.topk(min(max(top), classes), dim=1).indices
    right = order == query_labels[:, None].to(order.device)
    return {t: 100 * float(right[:, :t].any(dim=1).double().mean()) for t in top}
