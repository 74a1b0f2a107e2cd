"""Where the object is: the first principal direction of a frozen encoder's tokens, and a threshold on it.

Shapes: N images, L tokens of an image, K channels of a token, M tokens altogether.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from tenfold import UserError, checkpoints

METHOD = "genview.foreground"
WEAK_MARGIN = 0.05
"""Margin of the sign, in standard deviations of the projection, below which it is a guess."""


class StreamingPCA:
    """Mean and scatter of vectors that come in pieces, in double precision; pieces merge in any order.

        S <- S_a + S_b + n_a n_b / (n_a + n_b) (m_b - m_a)(m_b - m_a)^T

    K x K numbers, however many vectors there are: 13 MB for K = 1280.

    Args:
        dim: size K of a vector.

    Attributes:
        count: vectors seen.
        mean: their mean (K,).
        scatter: sum of the outer products of their deviations from it (K, K).

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, vectors: Tensor) -> None:
        """Add vectors (..., K)."""
        x = vectors.detach().reshape(-1, vectors.shape[-1]).to("cpu", torch.float64)
        if not len(x):
            return
        piece = StreamingPCA(x.shape[1])
        piece.count, piece.mean = len(x), x.mean(dim=0)
        x = x - piece.mean
        piece.scatter = x.T @ x
        self.merge(piece)

    def merge(self, other: "StreamingPCA") -> None:
        """Add what another one has seen.

        Raises:
            ValueError: vectors of another size.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"vectors of {len(other.mean)} numbers cannot join vectors of {len(self.mean)}")
        total = self.count + other.count
        if not other.count:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(delta, delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(K, K), with M - 1 below.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors or more, got {self.count}")
        return self.scatter / (self.count - 1)

    def components(self, number: int = 1) -> Tensor:
        """The first principal directions (number, K), of unit length; the sign of each is arbitrary."""
        return torch.linalg.eigh(self.covariance()).eigenvectors.T.flip(0)[:number]


def exact_threshold(values: Tensor, quantile: float) -> float:
    """The value that a share ``1 - quantile`` of all values exceeds, exact to one of them.

    Raises:
        ValueError: no values, or a quantile outside of (0, 1).
    """
    if not values.numel() or not 0 < quantile < 1:
        raise ValueError(f"expected values and a quantile between 0 and 1, got {values.numel()} and {quantile}")
    order = values.flatten().sort().values
    return float(order[max(0, math.ceil(quantile * len(order)) - 1)])


def grid_of(tokens: int, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of a token grid, which is square where nothing else is said.

    Raises:
        ValueError: the number of tokens is no square, or not that of the grid.
    """
    side = math.isqrt(tokens)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        raise ValueError(f"{tokens} tokens do not form a grid of {rows} x {columns}: give the grid")
    return rows, columns


def center_margin(projections: Tensor, grid: tuple[int, int]) -> float:
    """How much larger projections are in the middle half of the grid than at its border, in standard deviations.

    Shapes: ``projections`` (N, L) -> number.
    """
    rows, columns = grid
    a = projections.double().reshape(-1, rows, columns)
    y, x = torch.arange(rows)[:, None], torch.arange(columns)[None]
    middle = (y >= rows // 4) & (y < rows - rows // 4) & (x >= columns // 4) & (x < columns - columns // 4)
    border = (y == 0) | (y == rows - 1) | (x == 0) | (x == columns - 1)
    middle = middle & ~border if bool((middle & ~border).any()) else middle
    spread = a.std()
    return float((a[:, middle].mean() - a[:, border].mean()) / spread) if spread > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class ForegroundModel:
    """A direction and a threshold that tell an image's foreground tokens from the rest.

        a_h = <z_h - m, u>,    foreground where a_h > alpha,    p = mean_h 1[a_h > alpha]

    The official code projects without the mean, which only shifts alpha; there a person looks at saved masks to tell the
    side of u, here the middle of the pictures does.

    Attributes:
        direction: u, of unit length, oriented so that larger means foreground (K,).
        mean: m (K,).
        threshold: alpha.
        quantile: share of all tokens of the fit that lie at or below the threshold.
        encoder: name of the encoder and of the layer; statistics belong to one encoder.
        grid: rows and columns of its tokens.
        margin: how sure the sign is, see ``center_margin``.
        sign: auto, or the side that the user gave.
        images: images of the fit.

    Source: GenView, ECCV 2024, section 3 and the authors' code; quantile 0.6 as in their README (40 % foreground).

    Example:
        >>> batches = [torch.randn(16, 49, 8) for _ in range(4)]
        >>> model = ForegroundModel.fit(lambda: batches, encoder="mine", sign="+1")
        >>> model.ratio(batches[0]).shape
        torch.Size([16])
    """

    direction: Tensor
    mean: Tensor
    threshold: float
    quantile: float
    encoder: str
    grid: tuple[int, int]
    margin: float
    sign: str
    images: int

    @classmethod
    def fit(
        cls,
        batches: Callable[[], Iterable[Tensor]],
        *,
        encoder: str,
        quantile: float = 0.6,
        sign: Literal["auto", "+1", "-1"] = "auto",
        grid: tuple[int, int] | None = None,
        component: int = 0,
    ) -> "ForegroundModel":
        """Fit on tokens (N, L, K), which are gone through twice: for the direction, then for the exact threshold.

        Args:
            batches: gives the batches of tokens, the same each time that it is called.
            encoder: name of what made them.
            quantile: share of tokens that count as background.
            sign: auto orients by the middle of the pictures; +1 and -1 take the direction whose largest entry is positive
                or negative.
            grid: rows and columns of the tokens; default: square.
            component: which principal direction, from 0.

        Raises:
            ValueError: no tokens, or no such grid.
        """
        pca: StreamingPCA | None = None
        images = 0
        for tokens in batches():
            pca = pca or StreamingPCA(tokens.shape[-1])
            pca.update(tokens)
            images += len(tokens)
            grid = grid_of(tokens.shape[1], grid)
        if pca is None or grid is None:
            raise ValueError("a foreground model needs tokens of at least one image")
        return cls._of(pca, batches, encoder, quantile, sign, grid, component, images)

    @classmethod
    def _of(
        cls,
        pca: StreamingPCA,
        batches: Callable[[], Iterable[Tensor]],
        encoder: str,
        quantile: float,
        sign: str,
        grid: tuple[int, int],
        component: int,
        images: int,
    ) -> "ForegroundModel":
        u = pca.components(component + 1)[component]
        u = u * u[u.abs().argmax()].sign()
        a = torch.cat([((t.to("cpu", torch.float64) - pca.mean) @ u).float() for t in batches()])
        margin = center_margin(a, grid)
        flip = (margin < 0) if sign == "auto" else (sign == "-1")
        if flip:
            u, a, margin = -u, -a, -margin
        if sign == "auto" and abs(margin) < WEAK_MARGIN:
            warnings.warn(
                f"the side of the foreground is a guess: its margin is {margin:.3f} standard deviations, expected"
                f" {WEAK_MARGIN} or more; look at the masks (genview inspect) and give --sign +1 or -1",
                stacklevel=3,
            )
        threshold = exact_threshold(a, quantile)
        return cls(u.float(), pca.mean.float(), threshold, quantile, encoder, grid, margin, sign, images)

    def project(self, tokens: Tensor) -> Tensor:
        """a_h of each token. Shapes: (..., K) -> (...), float32.

        Raises:
            ValueError: tokens of another encoder's size.
        """
        if tokens.shape[-1] != len(self.direction):
            raise ValueError(
                f"tokens of {tokens.shape[-1]} channels, but the foreground model of {self.encoder} is for"
                f" {len(self.direction)}"
            )
        u, mean = self.direction.to(tokens.device), self.mean.to(tokens.device)
        return (tokens.float() - mean) @ u

    def mask(self, tokens: Tensor) -> Tensor:
        """Which tokens are foreground. Shapes: (N, L, K) -> (N, L) bool."""
        return self.project(tokens) > self.threshold

    def ratio(self, tokens: Tensor) -> Tensor:
        """p of each image. Shapes: (N, L, K) -> (N,) in [0, 1]."""
        return self.mask(tokens).float().mean(dim=-1)

    def soft_maps(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of foreground and background of each token, see ``soft_maps``. Shapes: (N, L, K) -> (N, L), (N, L)."""
        return soft_maps(self.project(tokens))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.safetensors`` file that names the encoder."""
        config = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in {"direction", "mean"}
        }
        checkpoints.save(path, {"direction": self.direction, "mean": self.mean}, method=METHOD, config=config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, encoder: str | None = None) -> "ForegroundModel":
        """Read what ``save`` wrote.

        Args:
            path: the file.
            encoder: name of the encoder that it is wanted for; default: any.

        Raises:
            UserError: no such file, another file, or the statistics of another encoder.
        """
        found = checkpoints.load(path, method=METHOD)
        values = dict(found.config)
        rows, columns = values.pop("grid")
        model = cls(found.tensors["direction"], found.tensors["mean"], grid=(rows, columns), **values)
        if encoder is not None and model.encoder != encoder:
            raise UserError(f"{path}: a foreground model of {model.encoder}, expected one of {encoder}: fit it again")
        return model


def soft_maps(projections: Tensor, eps: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Weights of foreground and background out of projections, each with sum 1 over an image.

        M_f = (a - min a) / (max a - min a + eps),    M_b = 1 - M_f

    In float32, where eps does not vanish; constant projections give zeros and a uniform background.

    Shapes: (N, L) -> (N, L), (N, L).
    Source: GenView's authors' code.
    """
    a = projections.float()
    low, high = a.amin(dim=-1, keepdim=True), a.amax(dim=-1, keepdim=True)
    front = (a - low) / (high - low + eps)
    back = 1 - front
    return front / (front.sum(dim=-1, keepdim=True) + eps), back / (back.sum(dim=-1, keepdim=True) + eps)
