"""Pretrained generators behind one protocol: a condition, a level, a seed per picture -> pictures.

Each picture has a generator of random numbers of its own, on the CPU, so that it depends neither on the batch that it is made
in nor on the kind of device. ``num_images_per_prompt`` is never used: in diffusers it shares the noise of an embedding among
the pictures of a prompt and gives the seeds to the wrong ones. No name on a hub is built in.
"""

import hashlib
import importlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genview.encoders import Encoder, clip_encoder, clip_of, digest_of, generator_encoder_name
from genview.levels import MOST
from tenfold import UserError

OWN_PARTS = {"genview.patches", "genview.sketch"}
"""Modules of ours whose classes a folder of ``genview train-tiny`` names."""
Kind = Literal["unclip", "img2img", "ip-adapter"]
Pixels = NDArray[np.uint8]


class ViewGenerator(Protocol):
    """What the runner needs of a generator.

    Attributes:
        id: digest of its settings and weights; views of two generators are never mixed.
        needs: what it is conditioned on, an embedding or the picture itself.
    """

    id: str
    needs: Literal["embedding", "picture"]

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings of images (N, 3, H, W) in [0, 1]."""

    def generate(
        self,
        conditions: Tensor,
        level: int,
        seeds: Sequence[int],
        *,
        guidance: float,
        prompts: Sequence[str] | None = None,
    ) -> Pixels:
        """Pictures (N, H, W, 3), one per condition and seed."""


def sinusoid(levels: Tensor, dim: int) -> Tensor:
    """The code of noise levels that the generator gets beside the embedding, cosines first. Shapes: (N,) -> (N, dim).

    [cos(l f_k), sin(l f_k)],    f_k = 10000^(-k / (dim / 2))
    """
    half = dim // 2
    frequencies = torch.exp(-np.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    angles = levels.float()[:, None] * frequencies.to(levels.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def noised(embeddings: Tensor, levels: Tensor, noise: Tensor, abar: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """An embedding with the noise of a level, and the level's code beside it, as Stable unCLIP is conditioned.

        e = (c - m) / s,    e~ = sqrt(abar_l) e + sqrt(1 - abar_l) eps,    y = [e~ s + m; code(l)]

    Level 0 is not quite without noise: with the usual schedule eps has weight 0.006.

    Shapes: ``embeddings`` and ``noise`` (N, D), ``levels`` (N,) int64, ``abar`` (1000,), ``mean`` and ``std`` (D,) -> (N, 2 D).
    Source: diffusers, StableUnCLIPImg2ImgPipeline.
    """
    e = (embeddings - mean) / std
    a = abar[levels][:, None]
    e = a.sqrt() * e + (1 - a).sqrt() * noise
    return torch.cat([e * std + mean, sinusoid(levels, embeddings.shape[1]).to(embeddings)], dim=1)


@dataclass(frozen=True)
class _Folder:
    """A pipeline as somebody saved it."""

    path: str
    index: dict[str, Any]
    options: dict[str, Any]
    id: str


def _read_folder(path: str | os.PathLike[str], expected: Sequence[str], option: str) -> _Folder:
    """What a folder of diffusers holds and how it has to be loaded; a name on a hub is left to diffusers.

    Raises:
        UserError: no such folder, no index, a part that is missing, weights that would have to be unpickled.
    """
    folder = Path(path).expanduser()
    shown = f"{option} {path}"
    if not folder.is_dir():
        text = str(path)
        if text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise UserError(f"{shown}: no such folder of a pipeline of diffusers")
        return _Folder(text, {}, {"use_safetensors": True}, f"hub:{text}")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        assert isinstance(index, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(f"{shown}: expected a pipeline of diffusers, with its model_index.json") from error
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    for name in expected:
        if not (folder / name).is_dir():
            hint = (
                "; a checkpoint of Stable unCLIP has the mean and deviation of its embeddings there"
                if name == "image_normalizer"
                else ""
            )
            raise UserError(f"{shown}: this pipeline has no {name}{hint}")
    for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"):
        entry = index.get(name)
        absent = not isinstance(entry, list) or entry[0] is None or not (folder / name).is_dir()
        if absent and name in index and name not in expected:
            options[name] = None
    parts: dict[Path, list[str]] = {}
    for path in folder.rglob("*.safetensors"):
        parts.setdefault(path.parent, []).append(path.name)
    if not parts:
        raise UserError(f"{shown}: no weights in safetensors; other formats would have to be unpickled: convert them")
    for variant in ("fp16", "bf16"):
        if any(all(f".{variant}." in name for name in names) for names in parts.values()):
            options["variant"] = variant  # diffusers takes the plain file of a part that has no such one
    return _Folder(str(folder), index, options, digest_of(folder))


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notices and bars of diffusers and transformers: a part is of another class than usual, a prompt is empty."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in both]
    try:
        for library in both:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in zip(both, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _load(kind: Any, found: _Folder, dtype: torch.dtype, option: str) -> Any:
    named = {entry[0] for entry in found.index.values() if isinstance(entry, list)}
    for module in OWN_PARTS & named:
        importlib.import_module(module)  # ours; diffusers imports no module that a folder names
    with quietly():
        try:
            pipe = kind.from_pretrained(found.path, torch_dtype=dtype, **found.options)
        except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            line = " ".join(str(error).split())[:240]
            raise UserError(f"{option} {found.path}: cannot be loaded as a {kind.__name__} ({line})") from error
    return pipe


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Number format of a generator; auto is fp16 on a GPU and fp32 on a CPU.

    Raises:
        UserError: fp16 on a CPU, which lacks its operators or takes forever.
    """
    if dtype == "auto":
        dtype = "fp16" if device == "cuda" else "fp32"
    if dtype == "fp16" and device == "cpu":
        raise UserError("--dtype fp16 needs a GPU: take fp32 or bf16 on a CPU")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def own_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _pixels(images: Any) -> Pixels:
    """uint8 out of what a pipeline gives in [0, 1]; NaN, where a number format has overflowed, is black."""
    return np.clip(np.rint(np.nan_to_num(np.asarray(images, np.float32)) * 255), 0, 255).astype(np.uint8)


class _Diffusers:
    """What the generators on pipelines of diffusers share: texts, seeds, one call per batch.

    Attributes:
        usual_guidance: guidance scale of this kind where none is given.
    """

    usual_guidance = 7.5

    def __init__(self, pipe: Any, id: str, *, steps: int, size: int | None) -> None:
        self.pipe, self.id, self.steps, self.size = pipe, id, steps, size
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.to(memory_format=torch.channels_last)  # a third faster on a CPU, as diffusers advises for GPUs
        self._texts: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.pipe.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        """Its number format."""
        kind: torch.dtype = self.pipe.unet.dtype
        return kind

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, each computed once; zeros where the pipeline has no text encoder.

        Raises:
            UserError: prompts for a pipeline that has no text encoder.
        """
        if self.pipe.text_encoder is None:
            if any(prompts):
                raise UserError("this generator has no text encoder: it takes no prompts")
            width = int(self.pipe.unet.config.cross_attention_dim)
            return torch.zeros(len(prompts), 1, width, device=self.device, dtype=self.dtype)
        for prompt in prompts:
            if prompt not in self._texts:
                encoded = self.pipe.encode_prompt(prompt, self.device, 1, False)
                self._texts[prompt] = encoded[0] if isinstance(encoded, tuple) else encoded
        return torch.cat([self._texts[prompt] for prompt in prompts])

    def _sides(self) -> dict[str, int]:
        return {} if self.size is None else {"height": self.size, "width": self.size}

    def _asked(self, conditions: Tensor, level: int, guidance: float) -> dict[str, Any]:
        """What the pipeline is told of the conditions and the level."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        conditions: Tensor,
        level: int,
        seeds: Sequence[int],
        *,
        guidance: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Pixels:
        """Pictures of one level, each from its own condition and seed.

        Args:
            conditions: what ``embed`` gave: embeddings (N, D), or pictures (N, 3, S, S) in [0, 1].
            level: noise level, 0..999.
            seeds: one per picture.
            guidance: guidance scale; default: the usual one of this kind.
            prompts: text beside each picture; default: none.

        Raises:
            ValueError: a level outside of 0..999, or another number of seeds than of conditions.
            UserError: prompts for a pipeline that has no text encoder.
        """
        if not 0 <= level <= MOST:
            raise ValueError(f"a noise level must be in 0..{MOST}, got {level}")
        if len(conditions) != len(seeds):
            raise ValueError(f"{len(conditions)} conditions and {len(seeds)} seeds: one seed per picture")
        guidance = self.usual_guidance if guidance is None else guidance
        with quietly():
            out = self.pipe(
                prompt_embeds=self.texts(prompts or [""] * len(seeds)),
                negative_prompt_embeds=self.texts([""] * len(seeds)),
                generator=own_generators(seeds),
                guidance_scale=guidance,
                num_inference_steps=self.steps,
                output_type="np",
                **self._asked(conditions.to(self.device, self.dtype), level, guidance),
            )
        return _pixels(out.images)


class UnCLIPGenerator(_Diffusers):
    """Variations of a picture from its noised CLIP embedding, by Stable unCLIP.

    The same class for a real checkpoint and for the tiny one of ``genview train-tiny``.

    Args:
        pipe: a ``StableUnCLIPImg2ImgPipeline``.
        id: digest of its weights.
        steps: denoising steps.
        size: side of the pictures; default: the pipeline's own.
        encoder_name: name of its image encoder, as in a foreground model.

    Source: GenView, ECCV 2024: guidance 10, 20 steps, one variation per image, an empty prompt.
    """

    needs: Literal["embedding", "picture"] = "embedding"
    usual_guidance = 10.0

    def __init__(
        self, pipe: Any, id: str = "unsaved", *, steps: int = 20, size: int | None = None, encoder_name: str = ""
    ) -> None:
        super().__init__(pipe, id, steps=steps, size=size)
        self.encoder: Encoder = clip_of(pipe.image_encoder, encoder_name or f"generator:{id}")
        processor = pipe.feature_extractor
        if processor is not None and getattr(processor, "image_mean", None):
            self.encoder.mean = torch.tensor(processor.image_mean).view(-1, 1, 1)
            self.encoder.std = torch.tensor(processor.image_std).view(-1, 1, 1)
        self.encoder.dtype = next(pipe.image_encoder.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "auto",
        steps: int = 20,
        size: int | None = None,
        option: str = "--generator",
    ) -> "UnCLIPGenerator":
        """Load a pipeline from a folder, or from a hub by a name that the user gives.

        Raises:
            UserError: no such pipeline, or one without ``image_encoder`` or ``image_normalizer``.
        """
        from diffusers import StableUnCLIPImg2ImgPipeline

        found = _read_folder(
            path, ("image_encoder", "image_normalizer", "image_noising_scheduler", "unet", "vae"), option
        )
        kind = choose_dtype(dtype, device)
        pipe = _load(StableUnCLIPImg2ImgPipeline, found, kind, option).to(device)
        name = generator_encoder_name(Path(found.path)) if found.index else ""
        return cls(pipe, found.id, steps=steps, size=size, encoder_name=name)

    def embed(self, images: Tensor) -> Tensor:
        """CLIP embeddings (N, D), float32."""
        return self.encoder(images).pooled

    def _asked(self, conditions: Tensor, level: int, guidance: float) -> dict[str, Any]:
        return {"image_embeds": conditions, "noise_level": level, **self._sides()}


class Img2ImgGenerator(_Diffusers):
    """Variations of a picture by noising its latents, for any img2img pipeline of Stable Diffusion.

    The level is the share of the schedule that is undone: strength = level / 1000, at least one step. It is not the noise of
    an embedding: for the same number a picture keeps its layout here.

    Args:
        pipe: a ``StableDiffusionImg2ImgPipeline``.
        id: digest of its weights.
        steps: denoising steps of the whole schedule.
        size: side that the pictures are brought to; default: the pipeline's own.

    Source: SDEdit, arXiv 2108.01073; used for training data by DA-Fusion, arXiv 2302.07944.
    """

    needs: Literal["embedding", "picture"] = "picture"

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "auto",
        steps: int = 20,
        size: int | None = None,
        option: str = "--generator",
    ) -> "Img2ImgGenerator":
        """Load a pipeline from a folder, or from a hub by a name that the user gives.

        Raises:
            UserError: no such pipeline.
        """
        from diffusers import StableDiffusionImg2ImgPipeline

        found = _read_folder(path, ("unet", "vae"), option)
        kind = choose_dtype(dtype, device)
        return cls(
            _load(StableDiffusionImg2ImgPipeline, found, kind, option).to(device), found.id, steps=steps, size=size
        )

    @property
    def side(self) -> int:
        """Side of the pictures."""
        return self.size or int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    def embed(self, images: Tensor) -> Tensor:
        """The pictures themselves, at the pipeline's size."""
        return torch.nn.functional.interpolate(
            images, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)

    def _asked(self, conditions: Tensor, level: int, guidance: float) -> dict[str, Any]:
        return {"image": conditions, "strength": max(level / 1000, 1 / self.steps)}


def _one_each(images: Any, embeddings: list[Tensor], device: torch.device, number: int, guided: bool) -> list[Tensor]:
    """Image prompts as they were given, one per picture, in place of the pipeline's own preparation.

    diffusers repeats the prompts of a batch once per picture, so that every picture sees those of all others
    (https://github.com/huggingface/diffusers/issues/9813).
    """
    return [part.to(device) for part in embeddings]


class IPAdapterGenerator(_Diffusers):
    """Variations of a picture as an image prompt of Stable Diffusion, by an IP-Adapter that the pipeline has loaded.

    The level weakens the prompt: scale = 1 - level / 1000.

    Args:
        pipe: a ``StableDiffusionPipeline`` with ``image_encoder`` and ``load_ip_adapter`` done.
        id: digest of its weights.
        steps: denoising steps.
        size: side of the pictures; default: the pipeline's own.

    Source: IP-Adapter, arXiv 2308.06721.
    """

    needs: Literal["embedding", "picture"] = "embedding"

    def __init__(self, pipe: Any, id: str = "unsaved", *, steps: int = 20, size: int | None = None) -> None:
        super().__init__(pipe, id, steps=steps, size=size)
        if getattr(pipe, "image_encoder", None) is None or not hasattr(pipe.unet, "encoder_hid_proj"):
            raise ValueError("the pipeline has no IP-Adapter: call its load_ip_adapter first")
        self.encoder: Encoder = clip_of(pipe.image_encoder, f"generator:{id}")
        pipe.prepare_ip_adapter_image_embeds = _one_each

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        adapter: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "auto",
        steps: int = 20,
        size: int | None = None,
        option: str = "--generator",
    ) -> "IPAdapterGenerator":
        """Load a pipeline from a folder and an adapter's ``.safetensors`` file, beside which ``image_encoder/`` lies.

        Raises:
            UserError: no such pipeline or adapter.
        """
        from diffusers import StableDiffusionPipeline

        weights = Path(adapter).expanduser()
        encoder = weights.parent / "image_encoder"
        if weights.suffix != ".safetensors" or not weights.is_file() or not encoder.is_dir():
            raise UserError(
                f"--adapter {adapter}: expected a .safetensors file of an IP-Adapter, image_encoder/ beside it"
            )
        found = _read_folder(path, ("unet", "vae"), option)
        found.options.pop("image_encoder", None)
        kind = choose_dtype(dtype, device)
        vision = clip_encoder(encoder, "", "--adapter").model.to(kind)
        options = {**found.options, "image_encoder": vision}
        loaded = _load(StableDiffusionPipeline, _Folder(found.path, found.index, options, found.id), kind, option)
        with quietly():
            try:
                loaded.load_ip_adapter(
                    str(weights.parent), subfolder="", weight_name=weights.name, image_encoder_folder=None
                )
            except (OSError, ValueError, KeyError, RuntimeError, IndexError, AttributeError) as error:
                line = " ".join(str(error).split())[:200]
                raise UserError(f"--adapter {adapter}: not an IP-Adapter for this pipeline ({line})") from error
        with weights.open("rb") as file:
            own = hashlib.file_digest(file, "blake2b").hexdigest()[:8]
        return cls(loaded.to(device), f"{found.id}-{own}", steps=steps, size=size)

    def embed(self, images: Tensor) -> Tensor:
        """CLIP embeddings (N, D), float32."""
        return self.encoder(images).pooled

    def _asked(self, conditions: Tensor, level: int, guidance: float) -> dict[str, Any]:
        self.pipe.set_ip_adapter_scale(1 - level / 1000)
        shown = conditions[:, None]
        both = torch.cat([torch.zeros_like(shown), shown]) if guidance > 1 else shown
        return {"ip_adapter_image_embeds": [both], **self._sides()}


def load_generator(
    kind: Kind,
    path: str,
    *,
    adapter: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    steps: int = 20,
    size: int | None = None,
) -> ViewGenerator:
    """The generator that a command names.

    Raises:
        UserError: no such pipeline, or an IP-Adapter without its file.
    """
    if kind == "ip-adapter":
        if adapter is None:
            raise UserError("--kind ip-adapter needs --adapter, the adapter's .safetensors file")
        return IPAdapterGenerator.from_pretrained(path, adapter, device=device, dtype=dtype, steps=steps, size=size)
    found: UnCLIPGenerator | Img2ImgGenerator = (
        UnCLIPGenerator.from_pretrained(path, device=device, dtype=dtype, steps=steps, size=size)
        if kind == "unclip"
        else Img2ImgGenerator.from_pretrained(path, device=device, dtype=dtype, steps=steps, size=size)
    )
    return found
