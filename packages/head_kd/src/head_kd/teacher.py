"""The teacher: a frozen detector beside the model, with its own input normalization, read at the student's regions."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from head_kd.checkpoints import Weights, read_weights
from head_kd.configs import config_classes, resolve_config
from head_kd.signals import box_heads, capturing, forward_stage, is_two_stage, predictors, resolve
from tenfold import UserError
from tenfold.checkpoints import check_shapes, digest

_COUNTER = "num_batches_tracked"
"""A buffer of BatchNorm that files of older versions lack, and that evaluation does not read."""


class Renormalize:
    """A batch normalized for one detector, as another one's preprocessor would have normalized it.

        y_c = (x_p(c) * std_p(c) + mean_p(c) - mean'_c) / std'_c,    0 where images are padded

    with p the swap of channels where exactly one of both turns BGR into RGB. Equal settings leave the batch as it is.

    Args:
        source: data preprocessor that made the batch (the student's).
        target: data preprocessor whose batch is wanted (the teacher's).
    """

    def __init__(self, source: Any, target: Any) -> None:
        (mean_s, std_s, swap_s), (mean_t, std_t, swap_t) = map(_normalization, (source, target))
        self.swap = swap_s != swap_t
        if self.swap:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.scale = (std_s / std_t).view(1, 3, 1, 1)
        self.shift = ((mean_s - mean_t) / std_t).view(1, 3, 1, 1)
        self.pad_value = float(getattr(target, "pad_value", 0) or 0)
        self.identity = not self.swap and bool((self.scale == 1).all() and (self.shift == 0).all())

    def __call__(self, batch: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """``batch`` (N, 3, H, W) for the target; ``image_sizes`` are height and width of each image before padding."""
        if self.identity:
            return batch
        x = batch.flip(1) if self.swap else batch
        x = x * self.scale.to(x) + self.shift.to(x)
        for image, (height, width) in zip(x, image_sizes, strict=True):
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return x


def _normalization(preprocessor: Any) -> tuple[Tensor, Tensor, bool]:
    """Mean and standard deviation of three channels, and whether channels are swapped on the way."""
    swap = bool(getattr(preprocessor, "_channel_conversion", False))
    if not getattr(preprocessor, "_enable_normalize", False):
        return torch.zeros(3), torch.ones(3), swap
    mean, std = (getattr(preprocessor, key).detach().cpu().float().view(-1).expand(3) for key in ("mean", "std"))
    return mean, std, swap


class TeacherView:
    """A frozen teacher: always in eval mode, without gradients, outside of the model's parameters and checkpoints.

    Attributes:
        missing: tensors that its file does not hold; only what no term reads may be among them.

    Args:
        detector: the teacher; it is frozen in place.
        classes: its classes in order, where known.
        reuse_features: whether to keep each image's feature maps in memory and use them again when the image comes back
            with the same flip and size. Exact only where nothing but a flip is random in the pipeline.
    """

    def __init__(self, detector: Any, *, classes: Sequence[str] | None = None, reuse_features: bool = False) -> None:
        self.detector = detector.requires_grad_(False).eval()
        self.classes = None if classes is None else tuple(classes)
        self.renormalize: Renormalize | None = None
        self.missing: tuple[str, ...] = ()
        self._memory: dict[Any, list[Tensor]] | None = {} if reuse_features else None

    @classmethod
    def load(cls, config: Any, checkpoint: str | Path, *, reuse_features: bool = False) -> "TeacherView":
        """Build a teacher from a config and load its weights.

        Args:
            config: mmdet config, its path, or ``mmdet::folder/name.py`` for one that mmdet ships.
            checkpoint: ``.pth`` (read without unpickling foreign objects) or ``.safetensors`` file.
            reuse_features: as for the class.

        Raises:
            UserError: no such file, or a checkpoint of another config; the message names the first keys that differ.
        """
        cfg = resolve_config(config)
        weights = read_weights(checkpoint)
        with torch.random.fork_rng(devices=[]):
            detector = MODELS.build(cfg.model)
        missing = load_all(detector, weights.state_dict, checkpoint)
        view = cls(detector, classes=weights.classes or config_classes(cfg), reuse_features=reuse_features)
        view.missing = missing
        return view

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherView":
        return self  # copies of the model (an EMA) share the teacher

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the teacher as ``nn.Module._apply`` does."""
        self.detector._apply(function)
        if self._memory:
            self._memory.clear()

    @property
    def two_stage(self) -> bool:
        """Whether it has a RoI head."""
        return is_two_stage(self.detector)

    @torch.no_grad()
    def features(self, batch: Tensor, samples: Sequence[Any]) -> list[Tensor]:
        """Feature maps of its neck for a batch that was normalized for the student.

        Args:
            batch: images (N, 3, H, W).
            samples: mmdet's data samples; ``img_shape`` says where padding begins.
        """
        keys = None
        if self._memory is not None:
            keys = [
                (
                    s.metainfo["img_id"],
                    s.metainfo.get("flip_direction"),
                    s.metainfo["img_shape"],
                    tuple(batch.shape[2:]),
                )
                for s in samples
            ]
            if all(key in self._memory for key in keys):
                return [torch.stack(maps) for maps in zip(*(self._memory[key] for key in keys), strict=True)]
        if self.renormalize is not None:
            batch = self.renormalize(batch, [s.metainfo["img_shape"][:2] for s in samples])
        maps = [m.float() for m in self.detector.extract_feat(batch)]
        if keys is not None and self._memory is not None:
            self._memory.update({key: [m[i].clone() for m in maps] for i, key in enumerate(keys)})
        return maps

    @torch.no_grad()
    def at_rois(
        self, features: Sequence[Tensor], rois: Tensor, names: Sequence[str], stage: int = 0
    ) -> dict[str, Tensor]:
        """Activations (M, D) of its box head at the regions ``rois`` (M, 5)."""
        head = box_heads(self.detector.roi_head)[stage]
        with capturing(resolve(head, names, "the teacher's box head")) as seen:
            forward_stage(self.detector.roi_head, stage, list(features), rois)
        return {name: values[0].flatten(1).float() for name, values in seen.items()}

    @torch.no_grad()
    def at_maps(self, features: Sequence[Tensor], names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Activations (N, D, H, W) of its dense head, for each level."""
        head = self.detector.bbox_head
        with capturing(resolve(head, names, "the teacher's dense head")) as seen:
            head(list(features))
        return {name: [value.float() for value in values] for name, values in seen.items()}

    def fingerprint(self) -> str:
        """Digest of all its parameters and buffers."""
        return digest(self.detector.state_dict())


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The head of a detector's config, with its settings of training and measuring.

    Attributes:
        kind: roi or dense.
        head: config of the head itself.
        train_cfg: assigner and sampler; None where the config does not train.
        test_cfg: settings of measuring.
    """

    kind: str
    head: Any
    train_cfg: Any
    test_cfg: Any


def head_config(cfg: Any) -> HeadConfig:
    """The head of an mmdet config that an assistant is a copy of."""
    model = cfg.model
    if "roi_head" in model:
        return HeadConfig("roi", model.roi_head, (model.get("train_cfg") or {}).get("rcnn"), model.test_cfg.rcnn)
    return HeadConfig("dense", model.bbox_head, model.get("train_cfg"), model.get("test_cfg"))


def load_roi_head(cfg: Any, weights: Weights, checkpoint: str | Path) -> nn.Module:
    """A teacher's RoI head with its weights, frozen, without the rest of the teacher.

    Raises:
        UserError: the config has no RoI head, or the checkpoint is of another one.
    """
    found = head_config(cfg)
    if found.kind != "roi":
        raise UserError("teacher: a cache holds the activations of a RoI head, which this teacher does not have")
    with torch.random.fork_rng(devices=[]):
        head: nn.Module = MODELS.build({**copy.deepcopy(found.head), "test_cfg": found.test_cfg, "train_cfg": None})
    prefix = "roi_head."
    state_dict = {k.removeprefix(prefix): v for k, v in weights.state_dict.items() if k.startswith(prefix)}
    load_all(head, state_dict, checkpoint)
    return head.requires_grad_(False)


def load_all(module: nn.Module, state_dict: Mapping[str, Tensor], checkpoint: str | Path) -> tuple[str, ...]:
    """Load a checkpoint into a detector or a head of one; returns the names of the tensors that it does not fill.

    Only what no term reads may be missing: the layers that predict classes and boxes, whose inputs are the signals, and
    mask heads.

    Raises:
        UserError: another tensor is missing or has another shape; the first of them are named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    fitting = {k: v for k, v in state_dict.items() if k in expected and tuple(v.shape) == expected[k]}
    missing = [name for name in expected if name not in fitting and not name.endswith(_COUNTER)]
    spared = _unread(module)
    needed = [name for name in missing if not name.startswith(spared)]
    if needed:
        share = (
            f"{checkpoint} fills {len(expected) - len(missing)} of {len(expected)} tensors of the configured"
            f" {type(module).__name__}"
        )
        wanted = {name: expected[name] for name in (*fitting, *needed)}
        given = {name: tensor for name, tensor in state_dict.items() if name in wanted or name not in expected}
        try:
            check_shapes(checkpoint, wanted, given)
        except UserError as error:
            raise UserError(f"{share}; {str(error).partition(': ')[2]}") from None
    module.load_state_dict(fitting, strict=False)
    return tuple(missing)


def _unread(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of tensors that no term reads."""
    prefixes = []
    for name, part in module.named_modules():
        if name.rpartition(".")[2] == "mask_head":
            prefixes.append(f"{name}.")
        prefixes += [f"{name}.{child}.".removeprefix(".") for child in predictors(part)]
    return tuple(prefixes)


def normalization(preprocessor: Any) -> dict[str, Any]:
    """Mean, standard deviation and order of channels of a detector's input, as plain values."""
    mean, std, swap = _normalization(preprocessor)
    return {"mean": mean.tolist(), "std": std.tolist(), "swap": swap}
