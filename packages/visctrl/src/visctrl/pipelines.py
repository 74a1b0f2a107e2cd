"""The method as users of diffusers expect it: a callback for their own pipelines, and a pipeline of its own."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from typing_extensions import override

from visctrl.config import VisCtrlConfig
from visctrl.control import SelfAttentionController, Source
from visctrl.engine import Reference, VisCtrl
from visctrl.inversion import Trajectory
from visctrl.masks import to_images, to_pictures
from visctrl.outcome import EditOutput


class VisCtrlCallback(PipelineCallback):  # type: ignore[misc]  # diffusers has no types
    """Injection within the call of any pipeline whose denoiser the engine knows (ControlNet, PAG-free variants, your own).

        engine = VisCtrl(pipe, config)
        callback = VisCtrlCallback(engine, engine.reference(reference_image))
        with callback.attach():
            pipe(prompt, latents=engine.invert(image).latents[-1], num_inference_steps=config.steps,
                 guidance_scale=4.0, callback_on_step_end=callback,
                 callback_on_step_end_tensor_inputs=callback.tensor_inputs)

    Args:
        engine: the engine of the pipeline's denoiser and scheduler.
        reference: the reference.
        guidance_scale: the guidance scale of the call; default: the engine's.
        mask: where the target's subject is, (H, W), for mode subject and for the background lock.
        trajectory: of the target, for the background lock.

    Raises:
        ValueError: the settings ask for a background lock, a mask is given, and no trajectory is.
    """

    tensor_inputs = ["latents"]  # noqa: RUF012  # the base class's own form

    def __init__(
        self,
        engine: VisCtrl,
        reference: Reference,
        *,
        guidance_scale: float | None = None,
        mask: Tensor | None = None,
        trajectory: Trajectory | None = None,
    ) -> None:
        super().__init__(cutoff_step_ratio=1.0)
        if mask is not None and engine.config.lock and trajectory is None:
            raise ValueError("a background lock needs the target's trajectory: give trajectory=, or set lock to False")
        self.engine = engine
        self.reference = reference
        self.guidance_scale = engine.guidance(engine.config) if guidance_scale is None else guidance_scale
        self.mask = mask
        self.trajectory = trajectory

    @contextlib.contextmanager
    def attach(self) -> Iterator["VisCtrlCallback"]:
        """Within the block, calls of the pipeline are injected; afterwards its processors are the same objects as before.

        Raises:
            UserError: as for ``SelfAttentionController.attach``; a model without room for a bank.
        """
        engine = self.engine
        config = dataclasses.replace(engine.config, guidance=self.guidance_scale, bank="memory")
        features = engine.features(self.reference, config)
        stepper = engine.adapter.stepper(config.steps, self.reference.latents)
        times = [engine.adapter.model_time(t) for t in stepper.timesteps[: stepper.injected(config.start)]]
        controller = SelfAttentionController(
            config.layers, mode=config.mode, strength=config.strength, bias=config.bias
        )
        grid = engine.adapter.grid(self.reference.latents)
        own = None if self.mask is None else self.mask[None]
        with (
            controller.attach(engine.adapter.model, grid=grid),
            controller.injecting(
                [Source(features.bank, grid, self.reference.mask)],
                timesteps=times,
                groups=2 if self.guidance_scale > 1 and engine.adapter.family != "flux" else 1,
                own_mask=own,
            ),
        ):
            yield self

    @override
    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Hold what is outside of the mask to the target, after each step."""
        if self.mask is None or self.trajectory is None or not self.engine.config.lock:
            return callback_kwargs
        z = callback_kwargs["latents"]
        small = torch.nn.functional.adaptive_max_pool2d(self.mask.float()[None, None], z.shape[-2:])
        m = (small >= 0.5).to(z.device, z.dtype)
        level = len(self.trajectory.latents) - 2 - step_index
        callback_kwargs["latents"] = m * z + (1 - m) * self.trajectory.latents[level].to(z.device, z.dtype)
        return callback_kwargs


@dataclass
class VisCtrlPipelineOutput(BaseOutput):  # type: ignore[misc]
    """What the pipeline gives.

    Attributes:
        images: the edited pictures.
        nsfw_content_detected: what the safety checker said, where there is one.
        edit: everything else.
    """

    images: list[Image.Image]
    nsfw_content_detected: list[bool] | None
    edit: EditOutput


class VisCtrlStableDiffusionPipeline(StableDiffusionPipeline):  # type: ignore[misc]
    """Stable Diffusion with ``pipe(target, reference)``; made of a pipeline that is there, sharing its parts.

    pipe = VisCtrlStableDiffusionPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(...))
    edited = pipe(target, reference, prompt="a photo of a dog").images[0]
    """

    @torch.no_grad()
    def __call__(
        self,
        target: Image.Image | Sequence[Image.Image],
        reference: Image.Image,
        *,
        prompt: str = "",
        reference_prompt: str = "",
        negative_prompt: str = "",
        target_mask: Image.Image | None = None,
        reference_mask: Image.Image | None = None,
        config: VisCtrlConfig | None = None,
        ip_adapter_image: Any = None,
    ) -> VisCtrlPipelineOutput:
        """Edit one picture or several of one size.

        Args:
            target: the pictures.
            reference: the reference.
            prompt: what the result shows.
            reference_prompt: what the reference shows.
            negative_prompt: what the result does not show.
            target_mask: where the targets' subject is, white on black.
            reference_mask: where the reference's subject is.
            config: settings; default: ``VisCtrlConfig()``.
            ip_adapter_image: for a pipeline with an IP-Adapter.

        Raises:
            UserError: see ``VisCtrl``.
        """
        engine = VisCtrl(self, config)
        targets = [np.asarray(x.convert("RGB")) for x in ([target] if isinstance(target, Image.Image) else target)]
        multiple = engine.adapter.multiple
        more = {} if ip_adapter_image is None else {"ip_adapter_image": ip_adapter_image}
        source = engine.reference(
            to_images([np.asarray(reference.convert("RGB"))], multiple),
            mask=_mask(reference_mask, multiple),
            conditions=engine.conditions(reference_prompt, **more),
        )
        found = engine.edit(
            to_images(targets, multiple),
            source,
            mask=_mask(target_mask, multiple),
            conditions=engine.conditions(prompt, negative_prompt, **more),
        )
        pictures = to_pictures(found.images, *targets[0].shape[:2])
        return VisCtrlPipelineOutput([Image.fromarray(x) for x in pictures], found.unsafe, found)


def _mask(mask: Image.Image | None, multiple: int) -> Tensor | None:
    if mask is None:
        return None
    x = torch.from_numpy(np.asarray(mask.convert("L")) / 255.0).float()
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple, 0, -x.shape[0] % multiple))
