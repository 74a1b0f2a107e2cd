"""Deterministic steps between noise levels, in both directions, on an explicit list of levels.

Schedulers of diffusers supply timesteps, noise levels and the kind of prediction; the step itself is made here, since
inverse and forward schedulers disagree about levels in places (spacings that do not divide, v-prediction).

Notation: level 0 is the clean end, level n the noisiest; the network is asked at ``timesteps[i - 1]`` for level i. Denoising
visits i = n, ..., 1; the step that leaves level i has the index k = n - i. Shapes: latents (B, C, h, w) or (B, N, C).
"""

import copy
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tenfold import UserError

Prediction = Literal["epsilon", "v_prediction", "sample"]
IGNORED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "thresholding")
"""Settings of schedulers that say how they space or clip, and that are not followed."""
CONSISTENCY = frozenset({"LCMScheduler", "TCDScheduler"})


class Stepper(ABC):
    """A schedule of n + 1 levels, and the step between two of them.

    Args:
        levels: n + 1 noise levels, from the clean end to the noisiest.
        timesteps: n timesteps, of level 1 to n, at which the network is asked.
        steps: number of steps that were asked for; more than n where a step would have been an identity or singular.
        head: steps that were left out at the noisy end.
    """

    def __init__(self, levels: list[float], timesteps: list[float], *, steps: int | None = None, head: int = 0) -> None:
        if len(levels) != len(timesteps) + 1 or not timesteps:
            raise ValueError(f"expected one level more than timesteps, got {len(levels)} and {len(timesteps)}")
        self.levels = levels
        self.timesteps = timesteps
        self.steps = len(timesteps) if steps is None else steps
        self.head = head

    def __len__(self) -> int:
        return len(self.timesteps)

    def injected(self, start: float) -> int:
        """The level at which injection begins, for a start that is a share of the steps that were asked for.

        Steps k >= S = floor(start * steps + 1/2) are injected, that is levels n - S and below.
        """
        skipped = max(0, int(start * self.steps + 0.5) - self.head)
        return max(0, len(self) - skipped)

    @property
    def key(self) -> tuple[float, ...]:
        """What tells this schedule from another."""
        return tuple(round(x, 6) for x in (*self.levels, *self.timesteps))

    @abstractmethod
    def scales(self, level: int) -> tuple[float, float]:
        """What the clean latents and the noise are multiplied by at a level."""

    @abstractmethod
    def move(self, z: Tensor, output: Tensor, asked: Tensor, at: int, source: int, to: int) -> Tensor:
        """``z`` moved from level ``source`` to level ``to``, in float32 or wider.

        Args:
            z: latents at level ``source``.
            output: what the network said.
            asked: the latents that it was asked about.
            at: the level whose timestep it was asked at.
            source: level of ``z``.
            to: level of the result.
        """


class DDIMStepper(Stepper):
    """Steps of DDIM with eta 0, for networks that predict noise, velocity or the clean picture.

        MOVE(z, e, a -> b) = sqrt(b) (z - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - b) e
        e = output                                        epsilon
        e = sqrt(a) v + sqrt(1 - a) w                     v-prediction, asked about w
        e = (w - sqrt(a) x0) / sqrt(1 - a)                prediction of the clean picture

    where a is the cumulative alpha of a level, in the conversions that of the level asked at. With the same e,
    MOVE(MOVE(z, e, a -> b), e, b -> a) = z.

    Args:
        levels: cumulative alphas, decreasing, all above 0.
        timesteps: as for ``Stepper``.
        prediction: what the network predicts.
        steps: as for ``Stepper``.
        head: as for ``Stepper``.

    Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021, Eq. 12 with sigma = 0.
    """

    def __init__(
        self,
        levels: list[float],
        timesteps: list[float],
        prediction: Prediction = "epsilon",
        *,
        steps: int | None = None,
        head: int = 0,
    ) -> None:
        super().__init__(levels, timesteps, steps=steps, head=head)
        if not all(0 < level <= 1 for level in levels):
            raise ValueError("levels must be in (0, 1]: a level of 0 holds no signal to step from")
        self.prediction = prediction

    @override
    def scales(self, level: int) -> tuple[float, float]:
        return math.sqrt(self.levels[level]), math.sqrt(1 - self.levels[level])

    @override
    def move(self, z: Tensor, output: Tensor, asked: Tensor, at: int, source: int, to: int) -> Tensor:
        z, output, asked = (x if x.dtype == torch.float64 else x.float() for x in (z, output, asked))
        e = self.noise(output, asked, at)
        a, b = self.levels[source], self.levels[to]
        return math.sqrt(b / a) * z + (math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)) * e

    def noise(self, output: Tensor, asked: Tensor, at: int) -> Tensor:
        """The predicted noise. Shapes: as the latents'."""
        a = self.levels[at]
        if self.prediction == "v_prediction":
            return math.sqrt(a) * output + math.sqrt(1 - a) * asked
        if self.prediction == "sample":
            return (asked - math.sqrt(a) * output) / math.sqrt(1 - a)
        return output


class FlowStepper(Stepper):
    """Euler steps of flow matching: z' = z + (sigma' - sigma) u.

    Args:
        levels: sigmas, increasing from 0.
        timesteps: as for ``Stepper``.
        steps: as for ``Stepper``.
        head: as for ``Stepper``.

    Source: Lipman et al., Flow Matching for Generative Modeling, ICLR 2023; the sign is that of diffusers.
    """

    @override
    def scales(self, level: int) -> tuple[float, float]:
        return 1 - self.levels[level], self.levels[level]

    @override
    def move(self, z: Tensor, output: Tensor, asked: Tensor, at: int, source: int, to: int) -> Tensor:
        z, output = (x if x.dtype == torch.float64 else x.float() for x in (z, output))
        return z + (self.levels[to] - self.levels[source]) * output


def warn_of_what_is_not_followed(scheduler: Any) -> None:
    """Warn of settings of a scheduler, or of a kind of it, that the steps here do not follow."""
    ignored = [name for name in IGNORED if scheduler.config.get(name)]
    if ignored or type(scheduler).__name__ in CONSISTENCY:
        what = ", ".join(ignored) or "steps of its own for consistency models"
        warnings.warn(
            f"{type(scheduler).__name__} has {what}: timesteps here are evenly spaced and steps those of DDIM",
            stacklevel=3,
        )


def stepper_of(scheduler: Any, steps: int, *, tokens: int | None = None) -> Stepper:
    """The schedule of a scheduler of diffusers, of any class that has cumulative alphas or flow sigmas.

    Spacing, offset, final level and kind of prediction are read from its configuration. A step from level 0 to level 0
    (``steps_offset`` 0 with ``set_alpha_to_one`` false) is an identity and left out; so is the noisiest level where it
    holds no signal (``rescale_betas_zero_snr``).

    Args:
        scheduler: the scheduler; it does not change.
        steps: number of steps.
        tokens: image tokens, for flow schedules that shift by the size of the picture.

    Raises:
        UserError: more steps than the schedule has timesteps, or a scheduler of another kind.
    """
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__:
        return _flow(scheduler, steps, tokens)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"the scheduler {type(scheduler).__name__} has neither cumulative alphas nor flow sigmas")
    total = int(config.num_train_timesteps)
    if not 1 <= steps <= total:
        raise UserError(f"steps: expected 1 to {total}, the timesteps of the model's schedule, got {steps}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in {"epsilon", "v_prediction", "sample"}:
        raise UserError(f"the scheduler predicts '{prediction}', expected epsilon, v_prediction or sample")
    spacing, offset = config.get("timestep_spacing", "leading"), int(config.get("steps_offset", 0))
    if spacing == "trailing":
        times = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    elif spacing == "linspace":
        times = np.linspace(0, total - 1, steps).round()[::-1]
    elif spacing == "leading":
        times = (np.arange(steps) * (total // steps)).round()[::-1] + offset
    else:
        raise UserError(f"the scheduler's timestep_spacing is '{spacing}', expected leading, trailing or linspace")
    timesteps = [int(t) for t in times[::-1]]
    if timesteps[-1] >= total:
        raise UserError(f"steps_offset {offset} leads beyond the {total} timesteps of the schedule")
    alphas = [float(x) for x in scheduler.alphas_cumprod.double()]
    levels = [1.0 if config.get("set_alpha_to_one", True) else alphas[0], *(alphas[t] for t in timesteps)]
    if math.isclose(levels[1], levels[0], rel_tol=1e-12):
        del levels[0], timesteps[0]
    head = 0
    while timesteps and levels[-1] <= 1e-12:
        del levels[-1], timesteps[-1]
        head += 1
    if not timesteps:
        raise UserError(f"steps: {steps} leaves no step between two different noise levels")
    return DDIMStepper(levels, [float(t) for t in timesteps], prediction, steps=steps, head=head)


def _flow(scheduler: Any, steps: int, tokens: int | None) -> FlowStepper:
    own, config = copy.deepcopy(scheduler), scheduler.config
    given: dict[str, Any] = {}
    if config.get("use_dynamic_shifting", False):
        if tokens is None:
            raise UserError("the scheduler shifts by the size of the picture: the number of image tokens is needed")
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
        given["mu"] = config.get("base_shift", 0.5) + slope * (tokens - low)
        if "sigmas" in inspect.signature(own.set_timesteps).parameters:
            given["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    own.set_timesteps(**({} if "sigmas" in given else {"num_inference_steps": steps}), **given)
    sigmas = [float(x) for x in own.sigmas][::-1]
    return FlowStepper(sigmas, [float(t) for t in own.timesteps][::-1], steps=steps)
