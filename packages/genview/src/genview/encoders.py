"""Frozen encoders that give tokens, by the names that all commands take.

``timm:NAME`` (any model of timm), ``packaged:NAME`` (weights that install as a package), ``hf:PATH`` (a CLIP vision model of
transformers), ``generator:DIR`` (the image encoder inside a folder of diffusers, so that one pass serves the foreground and
the condition of the generator).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genview.quality import Tokens
from tenfold import UserError, checkpoints, models
from tenfold.models import IMAGENET

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of the pixels of OpenAI's and OpenCLIP's models."""


def digest_of(folder: Path) -> str:
    """Digest of the settings and weights in a folder of diffusers, whatever the folder is called."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors"}):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        found.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


def generator_encoder_name(folder: Path) -> str:
    """Name of the image encoder of a generator: by its settings and weights, wherever the folder lies."""
    return f"generator:{digest_of(folder / 'image_encoder')}"


class Encoder:
    """A frozen model that takes images in [0, 1] of any size and gives tokens.

    Args:
        name: what it is called in files; statistics of one encoder are refused with another.
        model: the module.
        size: side of the square that images are brought to.
        mean: pixel mean that the model expects.
        std: pixel standard deviation that it expects.
        dtype: number format of the model.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.size, self.dtype = name, size, dtype
        model = model.eval().requires_grad_(False)
        self.model = model if next(model.parameters()).dtype == dtype else model.to(dtype)
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def to(self, device: torch.device | str) -> "Encoder":
        """Move the model."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def prepared(self, images: Tensor) -> Tensor:
        """Images as the model takes them: shorter side to its size (bicubic), middle square, normalized."""
        x = images.to(self.device, torch.float32)
        short = min(x.shape[-2:])
        if short != self.size:
            sides = [max(self.size, round(side * self.size / short)) for side in x.shape[-2:]]
            x = F.interpolate(x, sides, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in x.shape[-2:])
        x = x[..., top : top + self.size, left : left + self.size]
        return ((x - self.mean.to(x.device)) / self.std.to(x.device)).to(self.dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tokens:
        """Tokens and one vector of each image. Shapes: (N, 3, H, W) in [0, 1]."""
        return self._tokens(self.prepared(images))

    def _tokens(self, x: Tensor) -> Tokens:
        raise NotImplementedError


class TimmTokens(Encoder):
    """Tokens of a model of timm: the patches of a transformer, the last map of a convolutional network.

    Raises:
        UserError: the model gives no map and no tokens.
    """

    def _tokens(self, x: Tensor) -> Tokens:
        model = cast(Any, self.model)
        features = model.forward_features(x)
        if not isinstance(features, Tensor) or features.ndim not in {3, 4}:
            raise UserError(f"{self.name}: expected a model of timm with maps or tokens")
        width = model.num_features
        if features.ndim == 4:
            last = (
                features if features.shape[-1] == width and features.shape[1] != width else features.permute(0, 2, 3, 1)
            )
            grid = (last.shape[1], last.shape[2])
            tokens = last.flatten(1, 2)
        else:
            tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
            patch = getattr(model, "patch_embed", None)
            side = int(tokens.shape[1] ** 0.5)
            rows, columns = tuple(getattr(patch, "grid_size", (side, side)))
            grid = (rows, columns) if rows * columns == tokens.shape[1] else (1, tokens.shape[1])
        vector = model.forward_head(features, pre_logits=not isinstance(getattr(model, "head", None), nn.Linear))
        return Tokens(tokens.float(), vector.float().flatten(1), grid)


class HFCLIPTokens(Encoder):
    """Tokens of a CLIP vision model of transformers, with its final normalization, which the library leaves out for patches."""

    def _tokens(self, x: Tensor) -> Tokens:
        model = cast(Any, self.model)
        out = model(pixel_values=x)
        tower = getattr(model, "vision_model", model)
        tokens = getattr(tower, "post_layernorm", nn.Identity())(out.last_hidden_state[:, 1:])
        vector = out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output
        side = int(tokens.shape[1] ** 0.5)
        return Tokens(tokens.float(), vector.float(), (side, side))


def build_encoder(
    spec: str,
    *,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    option: str = "--encoder",
) -> Encoder:
    """The frozen encoder that a name stands for.

    Args:
        spec: timm:NAME, packaged:NAME, hf:PATH or generator:DIR.
        weights: file of weights for timm:NAME, or ``random``; default: the published ones, which timm downloads.
        device: where it computes.
        dtype: number format of its weights.
        option: option that gave the name, for messages.

    Raises:
        UserError: an unknown name, a folder that holds no such encoder.
    """
    kind, _, name = spec.partition(":")
    if kind == "generator":
        folder = Path(name).expanduser() / "image_encoder"
        if not (folder / "config.json").is_file():
            raise UserError(f"{option} {spec}: {folder} holds no config.json of an image encoder")
        found = clip_encoder(folder, generator_encoder_name(folder.parent), option)
        processor = folder.parent / "feature_extractor/preprocessor_config.json"
        if processor.is_file():
            about = json.loads(processor.read_text(encoding="utf-8"))
            found.mean, found.std = (
                torch.tensor(about.get(key, value)).view(-1, 1, 1)
                for key, value in zip(("image_mean", "image_std"), CLIP, strict=True)
            )
        return found.to(device)
    if kind == "hf":
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"{option} {spec}: expected the folder of a CLIP vision model, with its config.json")
        return clip_encoder(folder, f"hf:{folder.name}", option).to(device)
    if kind not in {"timm", "packaged"}:
        raise UserError(f"{option} {spec}: expected timm:NAME, packaged:NAME, hf:PATH or generator:DIR")
    published = kind == "timm" and weights is None
    model = models.build(spec, pretrained=published, option=option)
    if kind == "timm" and weights is not None and weights != "random":
        checkpoints.load_foreign_into(model, weights, option=f"{option}_weights")
    mean, std = models.expected_statistics(model) or IMAGENET
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    return TimmTokens(spec, model, int(size), tuple(mean), tuple(std), dtype).to(device)


def clip_encoder(folder: Path, name: str, option: str = "--encoder") -> HFCLIPTokens:
    """A CLIP vision model out of a folder of transformers.

    Raises:
        UserError: the folder holds another model, or cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types for it
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model: Any
        if isinstance(about, dict) and about.get("_class_name") == "ConvEncoder":
            from genview.patches import ConvEncoder

            model = ConvEncoder.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
        else:
            model = CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{option} {folder}: not a CLIP vision model ({' '.join(str(error).split())[:200]})") from error
    finally:
        if shows:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return clip_of(model, name)


def clip_of(model: Any, name: str) -> HFCLIPTokens:
    """A CLIP vision model that is there, with the pixel statistics of its family."""
    return HFCLIPTokens(name, model, int(model.config.image_size), *CLIP)
