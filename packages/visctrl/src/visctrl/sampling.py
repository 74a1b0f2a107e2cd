"""Feature gradual sampling: which references a step reads, and how much of each, so that many views become one thing.

Each view has a reference of its own, its anchor. In every injected step one more is drawn from all of them, and the step reads
both, the anchor with weight alpha:

    feature   A(Q, [K_a; K_b], [V_a; V_b]),  logits of a + log(alpha), of b + log(1 - alpha)
    latent    the reference's pass runs on a mixture of both noisy latents, and A(Q, K, V) reads that
    single    no drawing: one reference per view, drawn once; nothing ties the views together

What is drawn depends on (seed, round, view, step) alone, not on the order of views, their batch or the process that edits them.

Source: Li et al., Tuning-Free Visual Customization via View Iterative Self-Attention Control, arXiv 2406.06258, name the idea
(features drawn at random from several references, a factor alpha); formula, value and distribution are choices of this package.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.randomness import generator
from visctrl.config import SamplingConfig
from visctrl.errors import ShapeMismatchError
from visctrl.inversion import Trajectory
from visctrl.steppers import Stepper


@dataclass(frozen=True)
class FeatureGradualSampler:
    """The references of one view's steps.

    Args:
        config: kind and alpha.
        references: how many there are.
        view: number of the view.
        seed: seed of what is drawn.
        anchors: the first so many references are anchors, view by view in turn; default: all.
        first_round: number of the edit's first round, where one view is edited again and again.

    Raises:
        ValueError: no reference, or more anchors than references.
    """

    config: SamplingConfig
    references: int
    view: int
    seed: int = 0
    anchors: int | None = None
    first_round: int = 0

    def __post_init__(self) -> None:
        if self.references < 1:
            raise ValueError("an edit needs at least one reference")
        if self.anchors is not None and not 1 <= self.anchors <= self.references:
            raise ValueError(f"anchors must be in [1, {self.references}], got {self.anchors}")

    @property
    def anchor(self) -> int:
        """Number of the view's own reference."""
        if self.config.kind == "single":
            return self._drawn(self.view)
        return self.view % (self.anchors or self.references)

    def draw(self, number: int, step: int) -> list[tuple[int, float]]:
        """References of a step of a round with their weights, which sum to 1; the anchor first, and alone if drawn again."""
        anchor = self.anchor
        if self.config.kind == "single" or self.config.alpha == 1:
            return [(anchor, 1.0)]
        other = self._drawn(self.first_round + number, self.view, step)
        if other == anchor:
            return [(anchor, 1.0)]
        return [(anchor, self.config.alpha), (other, 1 - self.config.alpha)]

    def _drawn(self, *key: int) -> int:
        return int(torch.randint(self.references, (), generator=generator(self.seed, len(key), *key)))


def mix_latents(stepper: Stepper, level: int, a: Trajectory, b: Trajectory, alpha: float) -> Tensor:
    """Noisy latents between those of two references at one level.

        Z = s z_0 + r n;    z_0 = alpha z_0a + (1 - alpha) z_0b,    n = alpha n_a + (1 - alpha) n_b, set to the norm
                                                                        alpha |n_a| + (1 - alpha) |n_b|

    Clean parts are mixed as they are. Noises are brought back to their norm, which a mixture of independent ones loses (to
    0.71 at alpha 1/2), so that the network sees the noise level that it expects; equal references give themselves.

    Args:
        stepper: the schedule, of which s and r are the level's signal and noise.
        level: level of the result, 1 or more.
        a: trajectory of the first reference.
        b: trajectory of the second.
        alpha: weight of the first.

    Raises:
        ShapeMismatchError: references of two sizes.
    """
    if a.latents[0].shape != b.latents[0].shape:
        raise ShapeMismatchError(
            f"latents of references of two sizes, {tuple(a.latents[0].shape)} and {tuple(b.latents[0].shape)}, cannot be"
            " mixed: bring the references to one size, or take the sampling kind feature"
        )
    signal, noise = stepper.scales(level)
    clean = torch.lerp(b.latents[0], a.latents[0], alpha)
    noises = [(x.latents[level] - signal * x.latents[0]) / noise for x in (a, b)]
    mixed = torch.lerp(noises[1], noises[0], alpha)
    norms = [x.flatten(1).norm(dim=1) for x in (*noises, mixed)]
    wanted = alpha * norms[0] + (1 - alpha) * norms[1]
    scale = (wanted / norms[2].clamp_min(1e-12)).view(-1, *([1] * (mixed.ndim - 1)))
    return signal * clean + noise * scale * mixed
