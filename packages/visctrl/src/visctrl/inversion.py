"""From a picture's latents to the noise that gives them back: DDIM or flow inversion, refined to a fixed point.

Shapes: B pictures with latents z (B, ...), n levels, m evaluations per level.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tenfold import checkpoints
from visctrl.errors import BankMismatchError, DivergedError
from visctrl.steppers import Stepper

METHOD = "visctrl.trajectory"
Predict = Callable[[Tensor, int, bool], Tensor]
"""What the network says about latents at a level; the flag is True in the last evaluation of the level."""


@dataclass(frozen=True)
class Trajectory:
    """Latents of a picture at the levels 0 (clean) to n (noisiest reached).

    Attributes:
        latents: one tensor (B, ...) per level, in float32 or wider.
        timesteps: timesteps at which the network was asked, of levels 1 to n.
        levels: noise levels 0 to n.
        residuals: relative change in each evaluation, (n, m, B).
        fallen_back: whether the refinement did not contract, so that the plain step stands, (n, B).
        about: what it is of: model, prompt, guidance.
    """

    latents: list[Tensor]
    timesteps: list[float]
    levels: list[float]
    residuals: Tensor
    fallen_back: Tensor
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def residual(self) -> Tensor:
        """The largest relative change of a last evaluation over the levels, for each picture (B,).

        With one evaluation per level it is the size of the largest step, and says nothing about the inverse.
        """
        if not len(self):
            return torch.zeros(self.latents[0].shape[0])
        return self.residuals[:, -1].amax(dim=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file."""
        tensors = {f"latents.{i}": z.cpu() for i, z in enumerate(self.latents)}
        tensors |= {"residuals": self.residuals.cpu(), "fallen_back": self.fallen_back.cpu()}
        config = {"timesteps": self.timesteps, "levels": self.levels, "about": self.about}
        checkpoints.save(path, tensors, method=METHOD, config=config)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """Read what ``save`` wrote, bit for bit.

        Raises:
            UserError: another kind of file.
        """
        found = checkpoints.load(path, method=METHOD)
        latents = [found.tensors[f"latents.{i}"] for i in range(len(found.config["levels"]))]
        return cls(
            latents,
            list(found.config["timesteps"]),
            list(found.config["levels"]),
            found.tensors["residuals"],
            found.tensors["fallen_back"],
            dict(found.config["about"]),
        )

    def check(self, stepper: Stepper, shape: tuple[int, ...]) -> None:
        """Make sure that it is of this schedule and of pictures of this shape.

        Raises:
            BankMismatchError: it is of another one.
        """
        n = len(self)
        same = n <= len(stepper) and self.timesteps == stepper.timesteps[:n]
        if not same or any(abs(a - b) > 1e-6 for a, b in zip(self.levels, stepper.levels, strict=False)):
            raise BankMismatchError(
                f"the trajectory is of another schedule: timesteps {_few(self.timesteps)}, expected {_few(stepper.timesteps)}"
            )
        if tuple(self.latents[0].shape[1:]) != shape:
            raise BankMismatchError(
                f"the trajectory is of latents {tuple(self.latents[0].shape[1:])}, expected {shape}"
            )


def _few(values: list[float]) -> str:
    return ", ".join(f"{x:g}" for x in values[:4]) + (", ..." if len(values) > 4 else "")


def invert(predict: Predict, z: Tensor, stepper: Stepper, *, refine: int = 3, until: int | None = None) -> Trajectory:
    """The trajectory of latents from the clean end up to a level.

        w_0 = z_{i-1};    w_{q+1} = MOVE(z_{i-1}, eps(w_q, tau_i), i-1 -> i),  q < m;    z_i = w_m

    At the fixed point one denoising step from z_i returns z_{i-1} exactly; m = 1 is plain inversion. For each picture by
    itself: where an evaluation changes more than the one before it, further changes are halved (damping); where the last one
    still changes more than the first, or is not finite, the plain step stands and ``fallen_back`` says so.

    Args:
        predict: the network, as ``predict(latents, level, last)``.
        z: latents of the pictures.
        stepper: the schedule.
        refine: evaluations m per level.
        until: last level; default: the noisiest.

    Raises:
        ValueError: fewer than one evaluation.
        DivergedError: the network's first answer at a level is not finite.

    Source: Pan et al., Effective Real Image Editing with Accelerated Iterative Diffusion Inversion, ICCV 2023; damping and
    falling back are a choice of this package.

    Example:
        >>> stepper = DDIMStepper([0.9, 0.6, 0.3], [300.0, 600.0])
        >>> trajectory = invert(lambda z, level, last: torch.zeros_like(z), torch.ones(1, 4, 8, 8), stepper)
        >>> len(trajectory.latents), trajectory.latents[0].shape
        (3, torch.Size([1, 4, 8, 8]))
    """
    if refine < 1:
        raise ValueError(f"refine must be 1 or more, got {refine}")
    z = z if z.dtype == torch.float64 else z.float()
    until = len(stepper) if until is None else until
    latents, residuals, fallen = [z], [], []
    for i in range(1, until + 1):
        z, found, back = _level(predict, z, stepper, i, refine)
        latents.append(z)
        residuals.append(found)
        fallen.append(back)
    rows = latents[0].shape[0]
    return Trajectory(
        latents,
        stepper.timesteps[:until],
        stepper.levels[: until + 1],
        torch.stack(residuals) if residuals else torch.zeros(0, refine, rows),
        torch.stack(fallen) if fallen else torch.zeros(0, rows, dtype=torch.bool),
    )


def _level(predict: Predict, z: Tensor, stepper: Stepper, i: int, refine: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents at level i, the relative change of each evaluation (m, B), and which pictures fell back (B,)."""
    w, plain, changes = z, z, []
    factor = torch.ones(z.shape[0], device=z.device, dtype=z.dtype)
    for q in range(refine):
        moved = stepper.move(z, predict(w, i, q == refine - 1), w, i, i - 1, i)
        if q == 0:
            if not bool(torch.isfinite(moved).all()):
                raise DivergedError(f"inversion: the network's answer at level {i} of {len(stepper)} is not finite")
            plain = moved
        changes.append(_norm(moved - w) / _norm(moved).clamp_min(1e-12))
        if q:
            factor = torch.where(changes[q] > changes[q - 1], factor / 2, factor)
        step = _rows(factor, z)
        w = torch.where(step == 1, moved, w + step * (moved - w))
    found = torch.stack(changes)
    back = (found[-1] > found[0]) | ~torch.isfinite(_norm(w))
    return torch.where(_rows(back, z), plain, w), found.float().nan_to_num(torch.inf), back


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *([1] * (like.ndim - 1)))


def denoise(predict: Predict, z: Tensor, stepper: Stepper, *, start: int | None = None) -> Tensor:
    """Latents at the clean end, from those at level ``start`` (default: the noisiest), without any injection."""
    z = z if z.dtype == torch.float64 else z.float()
    for i in range(len(stepper) if start is None else start, 0, -1):
        z = stepper.move(z, predict(z, i, True), z, i, i, i - 1)
    return z
