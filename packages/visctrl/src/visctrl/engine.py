"""The method: invert both pictures, denoise the target with the reference's features, and again from the result.

Shapes: B targets, latents (B, C, h, w), images (B, 3, H, W) in [-1, 1].
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tenfold import UserError
from visctrl.banks import FeatureBank, Where, time_key
from visctrl.config import VisCtrlConfig
from visctrl.control import SelfAttentionController, Source
from visctrl.errors import BankMismatchError, ShapeMismatchError, UnsupportedModelError
from visctrl.families import Conditions, adapter_of
from visctrl.guard import DriftGuard
from visctrl.inversion import Trajectory, denoise, invert
from visctrl.layers import self_attention_layers
from visctrl.outcome import EditOutput, State
from visctrl.provenance import Trace, provenance_of
from visctrl.sampling import FeatureGradualSampler, mix_latents
from visctrl.steppers import Stepper, warn_of_what_is_not_followed

Hook = Callable[[int, int, Tensor], Tensor | None]
"""Called after a step with round, step and latents; what it returns takes their place."""


@dataclass
class Reference:
    """A picture to take features from, inverted once for each schedule.

    Attributes:
        latents: (1, C, h, w).
        conditions: its prompt.
        mask: where its subject is, (H, W), or None.
        size: height and width of the picture.
        inversions: how often it was inverted.
        log_weight: added to the logits of its keys, where there are several references.
    """

    latents: Tensor
    conditions: Conditions
    mask: Tensor | None
    size: tuple[int, int]
    inversions: int = 0
    made: dict[Any, "Features"] = field(default_factory=dict)
    log_weight: float = 0.0


@dataclass(frozen=True)
class Features:
    """A reference under one schedule: its trajectory, and its features where they are kept."""

    trajectory: Trajectory
    bank: FeatureBank | None


class VisCtrl:
    """Edits pictures with a pretrained model of diffusers; the model is as it was after each call.

    Args:
        source: a pipeline, an adapter, or a denoiser with its scheduler.
        config: settings of an edit.
        scheduler: the scheduler, in place of the pipeline's.

    Attributes:
        rows: pictures that went through the network so far.

    Source: Li et al., Tuning-Free Visual Customization via View Iterative Self-Attention Control, arXiv 2406.06258. The
    paper's body leaves rounds in latent space, the guard, the refinement and partial inversion open; they are ours.
    """

    def __init__(self, source: Any, config: VisCtrlConfig | None = None, *, scheduler: Any = None) -> None:
        self.adapter = adapter_of(source, scheduler)
        self.config = config or VisCtrlConfig()
        self.rows = 0
        self_attention_layers(self.adapter.model)
        warn_of_what_is_not_followed(self.adapter.scheduler)

    def guidance(self, config: VisCtrlConfig) -> float:
        """The guidance scale of the sampling.

        Raises:
            UnsupportedModelError: a scale above 1 for a model that takes no prompts.
        """
        if config.guidance is None:
            return 4.0 if self.adapter.prompted else 1.0
        if config.guidance > 1 and not self.adapter.prompted:
            raise UnsupportedModelError(f"guidance {config.guidance:g}: the model takes no prompts to be guided by")
        return config.guidance

    def conditions(self, prompt: str = "", negative_prompt: str = "", **more: Any) -> Conditions:
        """What the network is told for a prompt, computed once."""
        return self.adapter.conditions(prompt, negative_prompt, **more)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images in [-1, 1].

        Raises:
            ShapeMismatchError: not (B, 3, H, W), or sides that the model cannot halve as often as it has to.
        """
        multiple = self.adapter.multiple
        if images.ndim != 4 or images.shape[-2] % multiple or images.shape[-1] % multiple:
            raise ShapeMismatchError(
                f"images are {tuple(images.shape)}, expected (B, 3, H, W) with sides that are multiples of {multiple}"
            )
        return self.adapter.encode(images)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, not clipped."""
        return self.adapter.decode(latents)

    @torch.inference_mode()
    def invert(self, images: Tensor, prompt: str = "", *, conditions: Conditions | None = None) -> Trajectory:
        """The whole trajectory of pictures, under the engine's settings."""
        z = self.encode(images)
        stepper = self.adapter.stepper(self.config.steps, z)
        told = conditions or self.conditions(prompt)
        return self._invert(z, told, self.config, stepper, len(stepper))

    @torch.inference_mode()
    def denoise(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents at the clean end from those at the noisiest, under the engine's settings, without injection."""
        stepper, g = self.adapter.stepper(self.config.steps, latents), self._inversion_guidance(self.config)
        branches = self.adapter.branches(conditions, g)

        def predict(w: Tensor, i: int, last: bool) -> Tensor:
            return self._guided(self._call(w, stepper.timesteps[i - 1], branches), len(branches), g)

        return denoise(predict, latents, stepper)

    @torch.inference_mode()
    def reference(
        self,
        image: Tensor,
        prompt: str = "",
        *,
        mask: Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> Reference:
        """A reference, encoded; it is inverted when the first edit needs it.

        Args:
            image: (1, 3, H, W) in [-1, 1].
            prompt: what it shows.
            mask: where its subject is, (H, W).
            conditions: in place of the prompt.

        Raises:
            ShapeMismatchError: not one picture, or a mask of another size.
        """
        if image.shape[0] != 1:
            raise ShapeMismatchError(f"a reference is one picture, got {image.shape[0]}")
        _check_mask(mask, image, "the reference's mask")
        z = self.encode(image)
        return Reference(z, conditions or self.conditions(prompt), mask, (image.shape[-2], image.shape[-1]))

    @torch.inference_mode()
    def features(self, reference: Reference, config: VisCtrlConfig | None = None) -> Features:
        """The reference's trajectory and bank under the settings of a round; made once."""
        config = config or self.config
        key = self._key(reference, config)
        if key not in reference.made:
            stepper = self.adapter.stepper(config.steps, reference.latents)
            level = stepper.injected(config.start)
            reference.made[key] = self._features(reference, config, stepper, level, self.guidance(config))
        return reference.made[key]

    def adopt(self, reference: Reference, features: Features, config: VisCtrlConfig | None = None) -> None:
        """Use features that were made before, under the same settings.

        Raises:
            BankMismatchError: they are of another model, schedule or size, or have too few levels.
        """
        config = config or self.config
        stepper = self.adapter.stepper(config.steps, reference.latents)
        features.trajectory.check(stepper, tuple(reference.latents.shape[1:]))
        if features.bank is not None:
            features.bank.check(self._about(reference, stepper))
        if len(features.trajectory) < stepper.injected(config.start):
            raise BankMismatchError(
                f"the features have {len(features.trajectory)} levels, expected {stepper.injected(config.start)} or more"
            )
        reference.made[self._key(reference, config)] = features

    def _about(self, reference: Reference, stepper: Stepper) -> dict[str, Any]:
        return self.adapter.about | {"schedule": list(stepper.key), "latents": list(reference.latents.shape[1:])}

    def _key(self, reference: Reference, config: VisCtrlConfig) -> tuple[Any, ...]:
        """What features depend on."""
        stepper = self.adapter.stepper(config.steps, reference.latents)
        kind = config.bank if config.bank != "auto" else f"auto {config.max_bank}"
        guided = self.guidance(config) > 1
        rows, inverting = config.guidance_rows, self._inversion_guidance(config)
        return (
            stepper.key,
            stepper.injected(config.start),
            config.layers,
            config.refine,
            inverting,
            rows,
            guided,
            kind,
        )

    def _features(
        self, reference: Reference, config: VisCtrlConfig, stepper: Stepper, level: int, g: float
    ) -> Features:
        bank: FeatureBank | None = None
        if config.bank != "stream":
            limit = config.bank_bytes if config.bank == "auto" else None
            where: Where = "pinned" if config.bank == "pinned" else "memory"
            bank = FeatureBank(where, max_bytes=limit, about=self._about(reference, stepper))
        inverting = self._inversion_guidance(config)
        branches = self._recorded(reference.conditions, config, g)
        alike = len(branches) == len(self.adapter.branches(reference.conditions, inverting))
        free = bank is not None and config.refine > 1 and alike and not self.adapter.joint
        controller = SelfAttentionController(config.layers)
        reference.inversions += 1
        try:
            if free:
                assert bank is not None
                with controller.attach(self.adapter.model):
                    found = self._invert(
                        reference.latents, reference.conditions, config, stepper, level, record=(controller, bank)
                    )
                again = (found.fallen_back[:, 0]).nonzero().flatten() + 1  # recorded at what was then thrown away
            else:
                found = self._invert(reference.latents, reference.conditions, config, stepper, level)
                again = torch.arange(1, level + 1)
            if bank is not None and len(again):
                with controller.attach(self.adapter.model, grid=self.adapter.grid(reference.latents)):
                    for i in again.tolist():
                        with controller.recording(bank):
                            self._call(found.latents[i], stepper.timesteps[i - 1], branches)
        except MemoryError as error:
            if self.adapter.joint:
                raise UserError(f"max_bank {config.max_bank}: {error}; this model cannot go without a bank") from error
            found = self._invert(reference.latents, reference.conditions, config, stepper, level)
            bank = None  # the reference then rides in the targets' batches
        return Features(found, bank)

    def _recorded(self, conditions: Conditions, config: VisCtrlConfig, g: float) -> Sequence[Mapping[str, Tensor]]:
        """Branches of the reference that are recorded."""
        if config.guidance_rows == "match":
            return self.adapter.branches(conditions, g)
        return self.adapter.branches(conditions, 1.0 if conditions.uncond is not None else g)

    def _inversion_guidance(self, config: VisCtrlConfig) -> float:
        return self.guidance(config) if config.inversion_guidance is None else config.inversion_guidance

    def _call(self, z: Tensor, timestep: float, branches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The network's answers for all branches, one after another."""
        rows = z.repeat(len(branches), *([1] * (z.ndim - 1)))
        self.rows += len(rows)
        return self.adapter.network(rows, self.adapter.model_time(timestep), _stacked(branches, len(z)))

    def _guided(self, out: Tensor, branches: int, g: float) -> Tensor:
        if branches == 1:
            return out
        null, own = out.float().chunk(2)
        return null + g * (own - null)

    def _invert(
        self,
        z: Tensor,
        conditions: Conditions,
        config: VisCtrlConfig,
        stepper: Stepper,
        until: int,
        record: tuple[SelfAttentionController, FeatureBank] | None = None,
    ) -> Trajectory:
        g = self._inversion_guidance(config)
        branches = self.adapter.branches(conditions, g)

        def predict(w: Tensor, i: int, last: bool) -> Tensor:
            if record is None or not last:
                return self._guided(self._call(w, stepper.timesteps[i - 1], branches), len(branches), g)
            with record[0].recording(record[1]):
                return self._guided(self._call(w, stepper.timesteps[i - 1], branches), len(branches), g)

        found = invert(predict, z, stepper, refine=config.refine, until=until)
        about = self.adapter.about | {"prompt": conditions.prompt, "guidance": g}
        return dataclasses.replace(found, about=about)

    @torch.inference_mode()
    def edit(
        self,
        target: Tensor,
        reference: Reference | Sequence[Reference] | Tensor,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        mask: Tensor | None = None,
        conditions: Conditions | None = None,
        trajectory: Trajectory | None = None,
        sampler: FeatureGradualSampler | None = None,
        history: bool = False,
        provenance: bool = False,
        hook: Hook | None = None,
    ) -> EditOutput:
        """Targets with the reference's appearance.

        Args:
            target: images (B, 3, H, W) in [-1, 1].
            reference: one or several (their keys side by side), or one image.
            prompt: what the result shows.
            negative_prompt: what it does not.
            mask: where the subjects are, (H, W) or (B, H, W): for mode subject and for the background lock.
            conditions: in place of the prompts.
            trajectory: of these very targets under the schedule of the first round, where it is there already.
            sampler: which references each step reads; default: all, in every step.
            history: keep the pictures of each round.
            provenance: compute where the parts came from.
            hook: called after each step.

        Returns:
            Pictures, and what happened on the way.

        Raises:
            ValueError: no reference, or an empty mask.
            ShapeMismatchError: a mask of another size.
            UserError: see the parts: unsupported models, missing features, diverged inversions.
        """
        began, before = time.perf_counter(), self.rows
        config = self.config
        references = _listed(self, reference)
        _check_mask(mask, target, "the target's mask")
        own_mask = None if mask is None else mask.expand(len(target), *mask.shape[-2:])
        if config.mode == "subject" and own_mask is None and all(r.mask is None for r in references):
            raise ValueError("mode subject needs a mask of the target, of the reference, or of both")
        told = conditions or self.conditions(prompt, negative_prompt)
        z = self.encode(target)
        state = State(z.float(), target.to(z.device), config.rounds)
        guard = DriftGuard(config.max_residual, config.max_clipped, config.max_layout) if config.guard else None
        trace: Trace | None = None
        for number in range(config.rounds):
            active = state.active()
            if not len(active):
                break
            own = config.of_round(number)
            stepper = self.adapter.stepper(own.steps, z)
            level = stepper.injected(own.start)
            until = level if own.partial else len(stepper)
            if number == 0 and trajectory is not None:
                trajectory.check(stepper, tuple(z.shape[1:]))
                if len(trajectory) < until:
                    raise BankMismatchError(f"the trajectory has {len(trajectory)} levels, expected {until} or more")
                found = trajectory
            else:
                found = self._invert(state.latents[active], told, own, stepper, until)
            reasons = [""] * len(active) if guard is None else guard.before(found.residual, own.refine > 1)
            state.note_residuals(number, active, found.residual)
            if number and any(reasons):
                keep = [i for i, reason in enumerate(reasons) if not reason]
                state.stop(active, reasons)
                if not keep:
                    break
                found, active = _rows_of(found, keep), active[keep]
            elif any(reasons):
                warnings.warn(f"round 1: {next(filter(None, reasons))}", stacklevel=2)
            masks = None if own_mask is None else own_mask[active.cpu()]
            trace = self._trace(own, stepper, level) if provenance else None
            edited = self._round(
                found, references, told, own, stepper, level, until, masks, trace, hook, number, sampler
            )
            images = self.decode(edited)
            first = None if state.first is None else state.first[active]
            reasons = [""] * len(active) if guard is None else guard.after(images, state.target[active], first)
            state.keep(number, active, edited, images, reasons)
            state.take_trace(active, trace)
            if history:
                state.remember()
        images, unsafe = self._checked(state.images)
        grids = [self.adapter.grid(r.latents) for r in references]
        shown = provenance_of(state.origins, self.adapter.grid(z), grids) if provenance else None
        return EditOutput(
            images=images,
            latents=state.latents,
            history=state.history if history else None,
            residuals=state.residuals,
            rounds=state.rounds,
            verdicts=state.verdicts,
            rows=self.rows - before,
            seconds=time.perf_counter() - began,
            provenance=None if shown is None else shown.places,
            read_from=None if shown is None else shown.references,
            shares=None if shown is None else shown.shares,
            unsafe=unsafe,
        )

    def _trace(self, config: VisCtrlConfig, stepper: Stepper, level: int) -> Trace | None:
        """The last chosen plain layer, at the last injected step."""
        controller = SelfAttentionController(config.layers)
        with controller.attach(self.adapter.model):
            plain = [x.index for x in controller.layers if x.index in controller.chosen and x.kind == "plain"]
        if not plain or not level:
            return None
        return Trace(plain[-1], time_key(self.adapter.model_time(stepper.timesteps[0])))

    def _round(
        self,
        found: Trajectory,
        references: Sequence[Reference],
        told: Conditions,
        config: VisCtrlConfig,
        stepper: Stepper,
        level: int,
        until: int,
        masks: Tensor | None,
        trace: Trace | None,
        hook: Hook | None,
        number: int,
        sampler: FeatureGradualSampler | None,
    ) -> Tensor:
        """Latents after one round, from those at level ``until``."""
        g = self.guidance(config)
        branches = self.adapter.branches(told, g)
        features = [self.features(reference, config) for reference in references]
        riding = [i for i, f in enumerate(features) if f.bank is None]
        sources = [
            Source(f.bank, self.adapter.grid(r.latents), r.mask, r.log_weight, number)
            for number, (f, r) in enumerate(zip(features, references, strict=True))
        ]
        times = [self.adapter.model_time(t) for t in stepper.timesteps[:level]]
        z = found.latents[until]
        lock = None
        if masks is not None and config.lock:
            small = torch.nn.functional.adaptive_max_pool2d(masks.float()[:, None], z.shape[-2:])
            lock = (small >= 0.5).to(z.device, z.dtype)
        recorded = [self._recorded(reference.conditions, config, g) for reference in references]
        every = [(j, 1.0) for j in range(len(references))]
        controller = SelfAttentionController(
            config.layers, mode=config.mode, strength=config.strength, bias=config.bias
        )
        controller.trace = trace
        model = self.adapter.model
        with controller.attach(model, grid=self.adapter.grid(z)):
            for i in range(until, 0, -1):
                injects = i <= level and config.strength > 0
                drawn = every if sampler is None else sampler.draw(number, len(stepper) - i)
                if injects and sampler is not None and sampler.config.kind == "latent" and len(drawn) == 2:
                    (a, alpha), (b, _) = drawn
                    between = mix_latents(stepper, i, features[a].trajectory, features[b].trajectory, alpha)
                    with controller.recording(FeatureBank()) as bank:
                        self._call(between, stepper.timesteps[i - 1], recorded[a])
                    read, ride = [dataclasses.replace(sources[a], bank=bank)], []
                else:
                    shares = {j: sources[j].log_weight + math.log(share) for j, share in drawn}
                    read = [dataclasses.replace(sources[j], log_weight=weight) for j, weight in shares.items()]
                    ride = [j for j, _ in drawn if j in riding and injects]
                paths, beside = [features[j].trajectory.latents[i] for j in ride], [recorded[j] for j in ride]
                with controller.injecting(
                    read, timesteps=times, groups=len(branches), own_mask=masks, riding=sum(map(len, beside))
                ):
                    out = self._call_beside(z, stepper.timesteps[i - 1], branches, paths, beside)
                z = stepper.move(z, self._guided(out, len(branches), g), z, i, i, i - 1)
                if lock is not None:
                    z = lock * z + (1 - lock) * found.latents[i - 1]
                if hook is not None:
                    given = hook(number, until - i, z)
                    z = z if given is None else given
        return z

    def _call_beside(
        self,
        z: Tensor,
        timestep: float,
        branches: Sequence[Mapping[str, Tensor]],
        paths: Sequence[Tensor],
        extra: Sequence[Sequence[Mapping[str, Tensor]]],
    ) -> Tensor:
        """As ``_call``, with references riding ahead in the batch; answers of the targets alone."""
        if not paths:
            return self._call(z, timestep, branches)
        ahead = torch.cat([path.repeat(len(own), 1, 1, 1) for path, own in zip(paths, extra, strict=True)])
        rows = torch.cat([ahead, z.repeat(len(branches), 1, 1, 1)])
        parts = [_stacked(own, 1) for own in extra] + [_stacked(branches, len(z))]
        told = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.rows += len(rows)
        return self.adapter.network(rows, self.adapter.model_time(timestep), told)[len(ahead) :]

    def _checked(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Pictures after the pipeline's safety checker, where it has one."""
        pipe = self.adapter.pipe
        if getattr(pipe, "safety_checker", None) is None:
            return images, None
        _, unsafe = pipe.run_safety_checker(
            ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy(), self.adapter.device, self.adapter.dtype
        )
        black = torch.tensor(unsafe, device=images.device).view(-1, 1, 1, 1)
        return torch.where(black, -1.0, images), [bool(x) for x in unsafe]

    @torch.inference_mode()
    def sweep(
        self,
        target: Tensor,
        reference: Reference,
        grid: Mapping[str, Sequence[Any]],
        *,
        prompt: str = "",
        mask: Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> Iterator[tuple[VisCtrlConfig, EditOutput]]:
        """Edits under every combination of settings, with the inversions and features that they share made once.

        Args:
            target: as for ``edit``.
            reference: as for ``edit``.
            grid: setting -> its values, such as ``{"start": [0.2, 0.4], "strength": [0.5, 1.0]}``.
            prompt: as for ``edit``.
            mask: as for ``edit``.
            conditions: as for ``edit``.

        Yields:
            Settings and result of each combination, the last setting changing fastest.
        """
        combinations: list[dict[str, Any]] = [{}]
        for name, values in grid.items():
            combinations = [found | {name: value} for found in combinations for value in values]
        told = conditions or self.conditions(prompt)
        own, z = self.config, self.encode(target)
        inverted: dict[Any, Trajectory] = {}
        starts = [float(x) for x in grid.get("start", [own.start])]
        try:
            for changes in combinations:
                config = dataclasses.replace(own, **changes)
                stepper = self.adapter.stepper(config.steps, z)
                until = max(stepper.injected(start) for start in starts) if config.partial else len(stepper)
                key = (stepper.key, config.refine, self._inversion_guidance(config), until)
                if key not in inverted:
                    inverted[key] = self._invert(z, told, config, stepper, until)
                first = dataclasses.replace(config, start=min(starts))
                self._share(reference, first, config)
                self.config = config
                yield config, self.edit(target, reference, conditions=told, mask=mask, trajectory=inverted[key])
        finally:
            self.config = own

    def _share(self, reference: Reference, widest: VisCtrlConfig, config: VisCtrlConfig) -> None:
        """Let a round use features that were made for an earlier start."""
        reference.made.setdefault(self._key(reference, config), self.features(reference, widest))


def _stacked(branches: Sequence[Mapping[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """Arguments of all branches, each for so many pictures."""
    return {name: torch.cat([b[name].expand(rows, *b[name].shape[1:]) for b in branches]) for name in branches[0]}


def _rows_of(found: Trajectory, keep: Sequence[int]) -> Trajectory:
    index = torch.tensor(keep, dtype=torch.long, device=found.latents[0].device)
    return dataclasses.replace(
        found,
        latents=[z[index] for z in found.latents],
        residuals=found.residuals[..., keep],
        fallen_back=found.fallen_back[:, keep],
    )


def _listed(engine: VisCtrl, reference: Reference | Sequence[Reference] | Tensor) -> list[Reference]:
    if isinstance(reference, Tensor):
        return [engine.reference(reference)]
    found = [reference] if isinstance(reference, Reference) else list(reference)
    if not found:
        raise ValueError("an edit needs at least one reference")
    return found


def _check_mask(mask: Tensor | None, image: Tensor, name: str) -> None:
    if mask is None:
        return
    if mask.shape[-2:] != image.shape[-2:]:
        raise ShapeMismatchError(f"{name} is {tuple(mask.shape[-2:])}, the picture {tuple(image.shape[-2:])}")
    if not bool((mask >= 0.5).any()):
        raise ValueError(f"{name} is empty")
