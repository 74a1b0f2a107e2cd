"""Families of pretrained models behind one interface: pictures to latents and back, prompts, and one call of the network.

Shapes: B pictures (B, 3, H, W) in [-1, 1], latents (B, C, h, w).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from visctrl.errors import UnsupportedModelError
from visctrl.layers import unwrapped
from visctrl.steppers import Stepper, stepper_of

Rows = Mapping[str, Tensor]
"""Further arguments of the network, one row each; ``a/b`` is entry b of the dictionary a."""
A = TypeVar("A", bound="type[ModelAdapter]")
ADAPTERS: "list[type[ModelAdapter]]" = []


def register_adapter(adapter: A) -> A:
    """Make a class of adapter known to ``adapter_of``; the one that was registered last is asked first."""
    ADAPTERS.insert(0, adapter)
    return adapter


@dataclass(frozen=True)
class Conditions:
    """What the network is told besides latents and timestep, of one prompt.

    Attributes:
        cond: rows of the prompt.
        uncond: rows of the negative prompt; None for models without guidance.
        prompt: the prompt.
    """

    cond: Rows
    uncond: Rows | None = None
    prompt: str = ""


class ModelAdapter(ABC):
    """One family.

    Args:
        pipe: a pipeline of diffusers.
        network: the denoiser.
        scheduler: scheduler that gives timesteps and levels.

    Attributes:
        prompted: whether the model takes prompts.
        joint: whether the network attends to picture and text together, so that a bank is needed.
    """

    family: ClassVar[str]
    prompted: ClassVar[bool] = True
    joint: ClassVar[bool] = False

    def __init__(self, pipe: Any, network: nn.Module, scheduler: Any) -> None:
        self.pipe = pipe
        self.model: Any = unwrapped(network)
        self.scheduler = scheduler

    @classmethod
    @abstractmethod
    def of(cls, source: Any, scheduler: Any = None) -> "ModelAdapter | None":
        """The adapter of a pipeline or network of this family, else None."""

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        found = getattr(self.pipe, "_execution_device", None)
        return torch.device(found) if found is not None else next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format that the network computes in, also where its weights are stored in another one."""
        own = getattr(self.model, "dtype", None)  # diffusers looks through layerwise casting
        if isinstance(own, torch.dtype) and own.is_floating_point:
            return own
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def multiple(self) -> int:
        """What height and width of pictures have to be multiples of."""
        return 1

    @property
    def size(self) -> int:
        """Side of the pictures that the model was made for."""
        side = getattr(self.model.config, "sample_size", 64)
        return int(side if isinstance(side, int) else side[0])

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents of pictures."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents."""

    def conditions(self, prompt: str = "", negative: str = "", **more: Any) -> Conditions:
        """What the network is told for a prompt."""
        return Conditions({}, None, prompt)

    def branches(self, conditions: Conditions, guidance: float) -> Sequence[Rows]:
        """Rows of each branch: [prompt], or [negative prompt, prompt] where guidance is more than 1."""
        if guidance <= 1 or conditions.uncond is None:
            return [conditions.cond]
        return [conditions.uncond, conditions.cond]

    def model_time(self, timestep: float) -> float:
        """The timestep as the network is called with it."""
        return timestep

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Height and width of the latents, for masks."""
        return latents.shape[-2], latents.shape[-1]

    def stepper(self, steps: int, latents: Tensor) -> Stepper:
        """The schedule of so many steps."""
        return stepper_of(self.scheduler, steps)

    @abstractmethod
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        """What the network says about latents (B, C, h, w), in their shape."""

    @property
    def about(self) -> dict[str, Any]:
        """What features depend on besides the schedule."""
        config = self.model.config
        name = getattr(config, "_name_or_path", "") or config.get("_name_or_path", "")
        return {"family": self.family, "model": type(self.model).__name__, "weights": str(name)}


def adapter_of(source: Any, scheduler: Any = None) -> ModelAdapter:
    """The adapter of a pipeline, of a denoiser with its scheduler, or the adapter itself.

    Raises:
        UnsupportedModelError: a pipeline whose parts are those of no family, or which has parts that an edit would ignore.
    """
    if isinstance(source, ModelAdapter):
        return source
    for part, name in (("controlnet", "a ControlNet"), ("adapter", "a T2I-Adapter")):
        if getattr(source, part, None) is not None:
            raise UnsupportedModelError(
                f"{type(source).__name__} has {name}, which the engine would not call: use VisCtrlCallback in the"
                " pipeline's own call"
            )
    for kind in ADAPTERS:
        found = kind.of(source, scheduler)
        if found is not None:
            return found
    parts = ", ".join(getattr(source, "components", {})) or "none"
    raise UnsupportedModelError(
        f"{type(source).__name__} is of no family that is known ({', '.join(sorted(k.family for k in ADAPTERS))});"
        f" its parts: {parts}"
    )


class _Autoencoder(ModelAdapter):
    """Families whose pictures go through an autoencoder.

    Raises:
        UnsupportedModelError: a denoiser that takes more than the latents: a mask, another picture, a depth map.
    """

    def __init__(self, pipe: Any, network: nn.Module, scheduler: Any) -> None:
        super().__init__(pipe, network, scheduler)
        given, expected = int(self.model.config.in_channels), self.channels
        if given != expected:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} takes {given} channels, the latents have {expected}: a model of inpainting, of"
                " instructions, of depth or the like is not known: take the text-to-image model of its family"
            )

    @property
    def channels(self) -> int:
        """Channels that the denoiser takes where it takes latents alone."""
        return int(self.pipe.vae.config.latent_channels)

    def _moments(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and deviation of the autoencoder's latents, by channel where it names them."""
        config = self.pipe.vae.config
        mean, deviation = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return config.get("shift_factor") or 0.0, 1 / config.scaling_factor
        middle, spread = (torch.tensor(x, device=z.device, dtype=z.dtype).view(1, -1, 1, 1) for x in (mean, deviation))
        return middle, spread / config.scaling_factor

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    @property
    @override
    def multiple(self) -> int:
        return self.factor * int(getattr(self.model.config, "patch_size", 1) or 1)

    @property
    @override
    def size(self) -> int:
        return super().size * self.factor

    @override
    def encode(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        with _wide(vae):
            dtype = next(vae.parameters()).dtype
            found = vae.encode(images.to(self.device, dtype))
        z = (found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents).float()
        mean, deviation = self._moments(z)
        return (z - mean) / deviation

    @override
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, deviation = self._moments(latents)
        z = latents * deviation + mean
        with _wide(vae):
            return vae.decode(z.to(self.device, next(vae.parameters()).dtype), return_dict=False)[0].float()


class _wide:  # noqa: N801
    """Within the block, an autoencoder that overflows in half precision computes in float32."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.before = next(vae.parameters()).dtype
        self.needed = self.before == torch.float16 and bool(vae.config.get("force_upcast", False))

    def __enter__(self) -> None:
        if self.needed:
            self.vae.to(torch.float32)

    def __exit__(self, *_: object) -> None:
        if self.needed:
            self.vae.to(self.before)


def _is_unet(network: nn.Module) -> bool:
    return type(unwrapped(network)).__name__ == "UNet2DConditionModel"


def _called(pipe: Any, *names: str) -> bool:
    return all(getattr(pipe, name, None) is not None for name in names)


def _warn_of_length(tokenizer: Any, prompt: str, negative: str = "") -> None:
    most = int(tokenizer.model_max_length)
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        found = len(tokenizer(text).input_ids)
        if found > most:
            said = f"the {name} has {found} tokens, of which the model reads {most}"
            warnings.warn(f"{said}: the end of '{text[:40]}...' is cut off", stacklevel=4)


def _nested(rows: Rows) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in rows.items():
        first, _, rest = name.partition("/")
        if rest:
            out.setdefault(first, {})[rest] = value
        else:
            out[name] = value
    return out


@register_adapter
class SDAdapter(_Autoencoder):
    """Stable Diffusion 1.x and 2.x: a U-Net with a text encoder."""

    family = "sd"

    @classmethod
    @override
    def of(cls, source: Any, scheduler: Any = None) -> ModelAdapter | None:
        fits = _called(source, "unet", "vae", "text_encoder", "tokenizer", "scheduler")
        if not fits or getattr(source, "text_encoder_2", None) is not None or not _is_unet(source.unet):
            return None
        return cls(source, source.unet, scheduler or source.scheduler)

    def __init__(self, pipe: Any, network: nn.Module, scheduler: Any) -> None:
        super().__init__(pipe, network, scheduler)
        config = self.model.config
        for name, why in (
            ("time_cond_proj_dim", "the guidance as a number, as models distilled for few steps do"),
            ("class_embed_type", "a class or another picture besides the prompt"),
            ("num_class_embeds", "a class besides the prompt"),
        ):
            if config.get(name) is not None:
                raise UnsupportedModelError(
                    f"the U-Net takes {why} ({name} {config.get(name)}), which is not known here"
                )

    @override
    def conditions(self, prompt: str = "", negative: str = "", **more: Any) -> Conditions:
        """What the network is told.

        Args:
            prompt: the prompt.
            negative: the negative prompt.
            more: ``ip_adapter_image``, where an IP-Adapter is loaded.
        """
        _warn_of_length(self.pipe.tokenizer, prompt, negative)
        own, null = self.pipe.encode_prompt(prompt, self.device, 1, True, negative)
        pair: tuple[dict[str, Tensor], dict[str, Tensor]] = (
            {"encoder_hidden_states": own},
            {"encoder_hidden_states": null},
        )
        self._add_pictures(pair, more.get("ip_adapter_image"))
        return Conditions(pair[0], pair[1], prompt)

    def _add_pictures(self, pair: tuple[dict[str, Tensor], dict[str, Tensor]], picture: Any) -> None:
        needed = getattr(self.model.config, "encoder_hid_dim_type", None) == "ip_image_proj"
        if needed != (picture is not None):
            raise UnsupportedModelError(
                "an IP-Adapter is loaded and no ip_adapter_image is given: give one, or call unload_ip_adapter()"
                if needed
                else "ip_adapter_image is given and no IP-Adapter is loaded"
            )
        if picture is None:
            return
        loaded = len(self.model.encoder_hid_proj.image_projection_layers)
        given = len(picture) if isinstance(picture, list) else 1
        if given != loaded:
            raise UnsupportedModelError(
                f"{loaded} IP-Adapters are loaded and {given} pictures are given: ip_adapter_image takes one per adapter"
            )
        found = self.pipe.prepare_ip_adapter_image_embeds(picture, None, self.device, 1, True)
        for number, both in enumerate(found):
            null, own = both.chunk(2)
            for rows, part in zip(pair, (own, null), strict=True):
                rows[f"added_cond_kwargs/image_embeds/{number}"] = part

    @override
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        given = _nested({name: x.to(z.device, self.dtype) for name, x in rows.items()})
        added = given.get("added_cond_kwargs", {})
        pictures = [x for name, x in added.items() if name.startswith("image_embeds/")]
        if pictures:
            given["added_cond_kwargs"] = {k: x for k, x in added.items() if "/" not in k} | {"image_embeds": pictures}
        return self.model(z.to(self.dtype), torch.tensor(timestep, device=z.device), return_dict=False, **given)[0]


@register_adapter
class SDXLAdapter(SDAdapter):
    """Stable Diffusion XL: two text encoders, sizes as further conditions."""

    family = "sdxl"

    @classmethod
    @override
    def of(cls, source: Any, scheduler: Any = None) -> ModelAdapter | None:
        if not _called(source, "unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler") or not _is_unet(
            source.unet
        ):
            return None
        return cls(source, source.unet, scheduler or source.scheduler)

    def __init__(self, pipe: Any, network: nn.Module, scheduler: Any) -> None:
        super().__init__(pipe, network, scheduler)
        config = self.model.config
        if config.addition_time_embed_dim is None or config.projection_class_embeddings_input_dim is None:
            return
        numbers, text = divmod(
            config.projection_class_embeddings_input_dim - pipe.text_encoder_2.config.projection_dim,
            config.addition_time_embed_dim,
        )
        if (numbers, text) != (6, 0):
            raise UnsupportedModelError(
                f"the U-Net takes {numbers} numbers about the picture, expected 6 (its size, crop and target size): a refiner"
                " is not known here: take the base model"
            )

    @override
    def conditions(self, prompt: str = "", negative: str = "", **more: Any) -> Conditions:
        if self.pipe.tokenizer is not None:
            _warn_of_length(self.pipe.tokenizer, prompt, negative)
        own, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=True, negative_prompt=negative or None
        )
        pair: tuple[dict[str, Tensor], dict[str, Tensor]] = (
            {"encoder_hidden_states": own, "added_cond_kwargs/text_embeds": pooled},
            {"encoder_hidden_states": null, "added_cond_kwargs/text_embeds": null_pooled},
        )
        self._add_pictures(pair, more.get("ip_adapter_image"))
        return Conditions(pair[0], pair[1], prompt)

    @override
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        side = (z.shape[-2] * self.factor, z.shape[-1] * self.factor)
        times = torch.tensor([[*side, 0, 0, *side]], dtype=self.dtype).repeat(len(z), 1)
        return super().network(z, timestep, dict(rows) | {"added_cond_kwargs/time_ids": times})


@register_adapter
class PixArtAdapter(_Autoencoder):
    """PixArt-alpha and -sigma: a transformer with self-attention and cross-attention."""

    family = "pixart"

    @classmethod
    @override
    def of(cls, source: Any, scheduler: Any = None) -> ModelAdapter | None:
        network = getattr(source, "transformer", None)
        known = {"PixArtTransformer2DModel", "Transformer2DModel"}
        if network is None or type(unwrapped(network)).__name__ not in known or not _called(source, "vae", "scheduler"):
            return None
        return cls(source, network, scheduler or source.scheduler)

    @override
    def conditions(self, prompt: str = "", negative: str = "", **more: Any) -> Conditions:
        own, mask, null, null_mask = self.pipe.encode_prompt(prompt, True, negative, device=self.device)
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return Conditions(
            dict(zip(names, (own, mask), strict=True)), dict(zip(names, (null, null_mask), strict=True)), prompt
        )

    @override
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.config.sample_size == 128:
            h, w = (side * self.factor for side in z.shape[-2:])
            added["resolution"] = torch.tensor([[h, w]], device=z.device, dtype=self.dtype).repeat(len(z), 1)
            added["aspect_ratio"] = torch.tensor([[h / w]], device=z.device, dtype=self.dtype).repeat(len(z), 1)
        given = {name: x.to(z.device, self.dtype) for name, x in rows.items()}
        times = torch.full((len(z),), timestep, device=z.device)
        out = self.model(z.to(self.dtype), timestep=times, added_cond_kwargs=added, return_dict=False, **given)[0]
        return out[:, : z.shape[1]]  # where the network also predicts a variance, that comes second


@register_adapter
class SD3Adapter(_Autoencoder):
    """Stable Diffusion 3 and 3.5; built and tested on random weights, its quality is not verified."""

    family = "sd3"
    joint = True

    @classmethod
    @override
    def of(cls, source: Any, scheduler: Any = None) -> ModelAdapter | None:
        network = getattr(source, "transformer", None)
        if network is None or type(unwrapped(network)).__name__ != "SD3Transformer2DModel":
            return None
        return cls(source, network, scheduler or source.scheduler) if _called(source, "vae", "scheduler") else None

    @override
    def conditions(self, prompt: str = "", negative: str = "", **more: Any) -> Conditions:
        own, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=True, negative_prompt=negative
        )
        names = ("encoder_hidden_states", "pooled_projections")
        return Conditions(
            dict(zip(names, (own, pooled), strict=True)), dict(zip(names, (null, null_pooled), strict=True)), prompt
        )

    @override
    def stepper(self, steps: int, latents: Tensor) -> Stepper:
        h, w = self.grid(latents)
        return stepper_of(self.scheduler, steps, tokens=h * w // self.model.config.patch_size**2)

    @override
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        given = {name: x.to(z.device, self.dtype) for name, x in rows.items()}
        times = torch.full((len(z),), timestep, device=z.device)
        return self.model(z.to(self.dtype), timestep=times, return_dict=False, **given)[0]


@register_adapter
class FluxAdapter(_Autoencoder):
    """Flux.1; guidance is an input of the network. Built and tested on random weights, its quality is not verified."""

    family = "flux"
    joint = True

    @property
    @override
    def channels(self) -> int:
        return 4 * super().channels

    @classmethod
    @override
    def of(cls, source: Any, scheduler: Any = None) -> ModelAdapter | None:
        network = getattr(source, "transformer", None)
        if network is None or type(unwrapped(network)).__name__ != "FluxTransformer2DModel":
            return None
        return cls(source, network, scheduler or source.scheduler) if _called(source, "vae", "scheduler") else None

    @property
    @override
    def multiple(self) -> int:
        return 2 * self.factor

    @property
    @override
    def size(self) -> int:
        return int(getattr(self.pipe, "default_sample_size", 128)) * self.factor

    @override
    def conditions(self, prompt: str = "", negative: str = "", **more: Any) -> Conditions:
        own, pooled, _ = self.pipe.encode_prompt(prompt, None, device=self.device)
        return Conditions({"encoder_hidden_states": own, "pooled_projections": pooled}, None, prompt)

    @override
    def branches(self, conditions: Conditions, guidance: float) -> Sequence[Rows]:
        if not self.model.config.guidance_embeds:
            return [conditions.cond]
        return [dict(conditions.cond) | {"guidance": torch.full((1,), guidance)}]

    @override
    def model_time(self, timestep: float) -> float:
        return timestep / 1000

    @override
    def grid(self, latents: Tensor) -> tuple[int, int]:
        return latents.shape[-2] // 2, latents.shape[-1] // 2

    @override
    def stepper(self, steps: int, latents: Tensor) -> Stepper:
        h, w = self.grid(latents)
        return stepper_of(self.scheduler, steps, tokens=h * w)

    @override
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        b, c, h, w = z.shape
        packed = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        place = torch.zeros(h // 2, w // 2, 3, device=z.device, dtype=self.dtype)
        place[..., 1] += torch.arange(h // 2, device=z.device)[:, None]
        place[..., 2] += torch.arange(w // 2, device=z.device)[None]
        given = {name: x.to(z.device, self.dtype) for name, x in rows.items()}
        words = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=z.device, dtype=self.dtype)
        times = torch.full((b,), timestep, device=z.device)
        out = self.model(
            packed.to(self.dtype),
            timestep=times,
            img_ids=place.reshape(-1, 3),
            txt_ids=words,
            return_dict=False,
            **given,
        )[0]
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


@register_adapter
class UnconditionalAdapter(ModelAdapter):
    """A network that is called as ``network(latents, timestep).sample``: ``UNet2DModel`` and the like, on pixels or a codec.

    Args:
        network: the denoiser.
        scheduler: its scheduler.
        codec: something with ``encode(images)`` and ``decode(latents)``; default: the network's latents are pixels.
        pipe: the pipeline that it is of, if any.
    """

    family = "unconditional"
    prompted = False

    def __init__(self, network: nn.Module, scheduler: Any, codec: Any = None, pipe: Any = None) -> None:
        super().__init__(pipe, network, scheduler)
        self.codec = codec

    @classmethod
    @override
    def of(cls, source: Any, scheduler: Any = None) -> ModelAdapter | None:
        network = source if isinstance(source, nn.Module) else getattr(source, "unet", None)
        scheduler = scheduler or getattr(source, "scheduler", None)
        if network is None or scheduler is None or type(unwrapped(network)).__name__ != "UNet2DModel":
            return None
        if getattr(source, "vqvae", None) is not None or getattr(source, "vae", None) is not None:
            return None
        return cls(network, scheduler, pipe=None if source is network else source)

    @property
    @override
    def multiple(self) -> int:
        if self.codec is not None:
            return int(self.codec.multiple)
        return int(2 ** (len(getattr(self.model.config, "block_out_channels", (1,))) - 1))

    @override
    def encode(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        return x if self.codec is None else self.codec.encode(x)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        return latents.float() if self.codec is None else self.codec.decode(latents.float())

    @override
    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        return self.model(z.to(self.dtype), torch.tensor(timestep, device=z.device)).sample
