"""How much noise goes on an image's embedding: by its foreground, the same for all, at random, or by your own function."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenfold.randomness import key

MOST = 999
"""The largest noise level, the last step of the schedule."""
NoisePolicy = Callable[[float, int], int]
"""A policy: foreground ratio and number of the image -> noise level."""


def _check_level(level: int) -> int:
    if not 0 <= level <= MOST:
        raise ValueError(f"a noise level must be in 0..{MOST}, got {level}")
    return level


def _check_ratio(ratio: float) -> float:
    if math.isnan(ratio) or not 0 <= ratio <= 1:
        raise ValueError(f"a foreground ratio must be in [0, 1], got {ratio}")
    return ratio


@dataclass(frozen=True)
class AdaptivePolicy:
    """More noise where more of the image is foreground: its meaning is robust there, and diversity affordable.

        l = levels[b],    b = number of edges below p;    by default l = 100 clip(ceil(5 p) - 1, 0, 4)

    Args:
        edges: increasing inner edges of the bins of p; a p on an edge belongs to the bin below it.
        levels: level of each bin, one more than edges.

    Raises:
        ValueError: edges that do not increase or lie outside of (0, 1), a wrong number of levels, a level outside of 0..999.

    Source: GenView, ECCV 2024; bins of the authors' current code. Their table's sixth level, 500, no ratio can reach.

    Example:
        >>> [AdaptivePolicy()(p) for p in (0.1, 0.5, 0.9)]
        [0, 200, 400]
    """

    edges: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
    levels: Sequence[int] = (0, 100, 200, 300, 400)

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if not increasing or not all(0 < edge < 1 for edge in self.edges):
            raise ValueError(f"edges must increase within (0, 1), got {list(self.edges)}")
        if len(self.levels) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges need {len(self.edges) + 1} levels, got {len(self.levels)}")
        for level in self.levels:
            _check_level(level)

    def __call__(self, ratio: float, index: int = 0) -> int:
        """The level of a foreground ratio."""
        ratio = _check_ratio(ratio)
        return self.levels[sum(ratio > edge for edge in self.edges)]


@dataclass(frozen=True)
class ConstantPolicy:
    """The same level for every image.

    Args:
        level: in 0..999.

    Raises:
        ValueError: a level outside of 0..999.
    """

    level: int

    def __post_init__(self) -> None:
        _check_level(self.level)

    def __call__(self, ratio: float, index: int = 0) -> int:
        """The level."""
        _check_ratio(ratio)
        return self.level


@dataclass(frozen=True)
class RandomPolicy:
    """A level at random, from those given; it depends on the seed and the image's number alone.

    Args:
        levels: levels, equally likely; with repetitions, in that proportion.
        seed: seed of the draws.

    Raises:
        ValueError: no level, or one outside of 0..999.
    """

    levels: Sequence[int] = (0, 100, 200, 300, 400)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a random policy needs at least one level")
        for level in self.levels:
            _check_level(level)

    def __call__(self, ratio: float, index: int = 0) -> int:
        """The level of image number ``index``."""
        _check_ratio(ratio)
        return self.levels[key(self.seed, index) % len(self.levels)]
