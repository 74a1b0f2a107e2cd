"""The teacher's activations on disk: what they are depends on image and box, not on the student.

A cache is a folder: ``cache.json``, ``boxes.npy`` (T, K, 4) in pixels of the original image, ``count.npy`` (T,), and for
each signal ``NAME.npy`` (T, K, D), with ``NAME.scale.npy`` (T, K) where it is stored in 8 bits. Arrays are mapped into
memory, so that training holds no more of them than it reads.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from head_kd.config import Storage
from head_kd.configs import transforms
from head_kd.proposals import Proposals, Provenance
from head_kd.signals import box_heads
from head_kd.teacher import TeacherView, normalization
from tenfold import UserError, randomness
from tenfold.checkpoints import digest
from tenfold.files import reserve
from tenfold.readers import BROKEN_ARRAYS

HEADER = "cache.json"
"""What a cache is made of, written last."""
_DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


_PARTS = ("backbone.", "neck.", "rpn_head.", "roi_head.bbox_head.")


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Digest of all of a teacher that makes its targets, by which a cache knows it."""
    names = sorted(n for n in state_dict if n.startswith(_PARTS) and not n.endswith("num_batches_tracked"))
    return digest({name: state_dict[name] for name in names})


@dataclasses.dataclass(frozen=True)
class TargetCache:
    """A folder of cached targets, open for reading."""

    path: Path
    header: dict[str, Any]
    boxes: NDArray[np.float32]
    count: NDArray[np.int64]
    targets: dict[str, tuple[NDArray[Any], NDArray[np.float32] | None]]
    row: dict[Any, int]

    @classmethod
    def open(cls, path: str | Path) -> "TargetCache":
        """Open a cache.

        Args:
            path: its folder, or that of the `head-kd cache` which made it.

        Raises:
            UserError: no cache there, one that was not written to its end, or one that is damaged.
        """
        path = Path(path)
        if (path / "cache").is_dir():
            path = path / "cache"
        if not (path / HEADER).is_file():
            raise UserError(f"{path} holds no finished cache (no {HEADER}): make one with 'head-kd cache'")
        try:
            header = json.loads((path / HEADER).read_text(encoding="utf-8"))
            targets = {}
            for name in header["signals"]:
                scale = path / f"{name}.scale.npy"
                targets[name] = (
                    np.load(path / f"{name}.npy", mmap_mode="r"),
                    np.load(scale) if scale.exists() else None,
                )
            row = {image: number for number, image in enumerate(header["images"])}
            boxes, count = np.load(path / "boxes.npy", mmap_mode="r"), np.load(path / "count.npy")
        except (*BROKEN_ARRAYS, KeyError, TypeError) as error:
            raise UserError(f"{path}: this cache is damaged, make it again ({' '.join(str(error).split())})") from error
        return cls(path, header, boxes, count, targets, row)

    def check_teacher(self, state_dict: Mapping[str, Tensor], normalized: Mapping[str, Any]) -> None:
        """Check that the cache was made with this teacher.

        Args:
            state_dict: the teacher's weights.
            normalized: what ``teacher.normalization`` gives for its input.

        Raises:
            UserError: it was made with another one, or with another normalization of its input.
        """
        found = weights_digest(state_dict)
        if found != self.header["teacher"]:
            raise UserError(
                f"{self.path} was made with another teacher ({self.header['teacher'][:12]}, this one {found[:12]}):"
                " make a new one with 'head-kd cache'"
            )
        if dict(normalized) != self.header.get("input"):
            raise UserError(
                f"{self.path} was made with another normalization of the teacher's input ({self.header.get('input')}, now"
                f" {dict(normalized)}): make a new one with 'head-kd cache'"
            )

    def check_data(self, digest: str) -> None:
        """Check that the cache was made for this annotation file.

        Raises:
            UserError: it was made for another one.
        """
        if digest != self.header["data"]:
            raise UserError(
                f"{self.path} was made for other annotations ({self.header['data'][:9]}, these: {digest[:9]}): make a new one"
            )

    def regions(self, samples: Sequence[Any], device: torch.device) -> tuple[list[Proposals], list[dict[str, Tensor]]]:
        """Boxes of each image as its augmentation moved them, and signal -> (K, D) for them.

        Boxes follow resizing and flipping (and any transform whose ``homography_matrix`` is packed). The targets are
        those of the image as it was cached: an approximation where it is flipped or resized.

        Raises:
            UserError: an image that the cache does not hold, or boxes that cannot follow the augmentation.
        """
        boxes, targets = [], []
        for sample in samples:
            image = sample.metainfo["img_id"]
            if image not in self.row:
                raise UserError(f"{self.path} holds no image {image}: make a new one for this data")
            number = self.row[image]
            count = int(self.count[number])
            here = move_boxes(torch.from_numpy(np.array(self.boxes[number, :count])), sample.metainfo).to(device)
            ranks = torch.arange(count, 0, -1, device=device) / max(1, count)
            boxes.append(Proposals(here, ranks, Provenance.none(count, device)))
            found = {}
            for name, (array, scale) in self.targets.items():
                values = torch.from_numpy(np.array(array[number, :count])).float()
                if scale is not None:
                    values *= torch.from_numpy(scale[number, :count])[:, None]
                found[name] = values.to(device)
            targets.append(found)
        return boxes, targets


STILL = (
    "LoadImageFromFile", "LoadAnnotations", "PackDetInputs", "Resize", "RandomResize", "RandomChoiceResize", "RandomChoice",
    "RandomFlip", "Pad", "PhotoMetricDistortion", "YOLOXHSVRandomAug", "Corrupt", "FilterAnnotations", "Normalize",
)  # fmt: skip
"""Transforms that leave boxes where they are, or whose moves the size and the flip of an image tell."""
MOVING = ("RandomCrop", "RandomAffine", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "GeomTransform")
"""Transforms that record what they do in ``homography_matrix``."""


def check_pipeline(dataset: Any) -> None:
    """Check that cached boxes can follow the transforms of a training data set's config.

    Raises:
        UserError: one of them moves boxes in a way that no image tells.
    """
    steps = list(transforms(dataset))
    packed = any("homography_matrix" in (step.get("meta_keys") or ()) for step in steps)
    for step in steps:
        kind = str(step.get("type"))
        if kind not in STILL and not (packed and kind in MOVING):
            hint = ": let PackDetInputs pack 'homography_matrix'" if kind in MOVING else ": train without a cache"
            raise UserError(f"--cache: cached boxes cannot follow {kind} of the training pipeline{hint}")


def move_boxes(boxes: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """Boxes of an original image where its augmentation took them, clipped to it.

    Raises:
        UserError: something other than resizing and flipping moved the image, and its homography is not packed.
    """
    height, width = meta["img_shape"][:2]
    matrix = meta.get("homography_matrix")
    if matrix is not None:
        x1, y1, x2, y2 = boxes.unbind(1)
        corners = torch.stack([x1, y1, x2, y1, x1, y2, x2, y2], dim=1).view(-1, 4, 2)
        moved = torch.cat([corners, corners.new_ones(len(boxes), 4, 1)], dim=2) @ torch.as_tensor(matrix).to(corners).T
        points = moved[..., :2] / moved[..., 2:]
        out = torch.cat([points.amin(dim=1), points.amax(dim=1)], dim=1)
    else:
        scale = meta.get("scale_factor", (1.0, 1.0))
        original = meta["ori_shape"][:2]
        if abs(original[0] * scale[1] - height) > 1.5 or abs(original[1] * scale[0] - width) > 1.5:
            raise UserError(
                f"cached boxes cannot follow this pipeline (image {meta.get('img_id')} is {height}x{width} of {original[0]}x"
                f"{original[1]}): let PackDetInputs pack 'homography_matrix'"
            )
        out = boxes * boxes.new_tensor([scale[0], scale[1], scale[0], scale[1]])
        direction = str(meta.get("flip_direction") or "") if meta.get("flip") else ""
        if direction in ("horizontal", "diagonal"):
            out = torch.stack([width - out[:, 2], out[:, 1], width - out[:, 0], out[:, 3]], dim=1)
        if direction in ("vertical", "diagonal"):
            out = torch.stack([out[:, 0], height - out[:, 3], out[:, 2], height - out[:, 1]], dim=1)
    return torch.minimum(out.clamp_min(0), out.new_tensor([width, height, width, height]))


def choose_boxes(
    proposals: Tensor, truth: Tensor, size: tuple[int, int], count: int, generator: torch.Generator
) -> Tensor:
    """K boxes of an image: ground truth, ground truth moved a little, the teacher's best proposals, random background.

    At most a quarter are ground truth and jittered ground truth (shifted and scaled by up to 20 % of the side), an
    eighth is random, the rest are proposals (random boxes where there are too few).

    Args:
        proposals: boxes (P, 4) by falling score.
        truth: ground truth (G, 4).
        size: height and width of the image.
        count: number K of boxes.
        generator: source of the random boxes.
    """
    height, width = size
    quarter = count // 4
    parts = [truth[:quarter]]
    if len(truth):
        wanted = quarter - len(parts[0])
        base = truth[torch.arange(wanted) % len(truth)]
        side = (base[:, 2:] - base[:, :2]).repeat(1, 2)
        parts.append(base + 0.2 * side * (2 * torch.rand(base.shape, generator=generator) - 1))
    parts.append(proposals[: count - count // 8 - sum(map(len, parts))])
    missing = count - sum(map(len, parts))
    corner = torch.rand((missing, 2), generator=generator) * torch.tensor([width * 0.9, height * 0.9])
    extent = (0.05 + 0.45 * torch.rand((missing, 2), generator=generator)) * torch.tensor([width, height])
    parts.append(torch.cat([corner, corner + extent], dim=1))
    boxes = torch.cat(parts)
    boxes = torch.minimum(boxes.clamp_min(0), boxes.new_tensor([width, height, width, height]))
    low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
    return torch.cat([low, high], dim=1)


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """A new array on the disk, which has its whole size there at once."""
    array: NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)
    reserve(path)
    return array


@torch.no_grad()
def write_cache(
    path: str | Path,
    teacher: TeacherView,
    batches: Iterable[tuple[Tensor, Sequence[Any]]],
    images: int,
    *,
    names: Sequence[str],
    data: str,
    boxes_per_image: int = 64,
    storage: Storage = "fp16",
    seed: int = 0,
) -> TargetCache:
    """Run the teacher once over the images and write what training asks of it.

    Args:
        path: folder, new or of an unfinished cache; ``cache.json`` is written last.
        teacher: a two-stage teacher.
        batches: preprocessed images (N, 3, H, W) with their data samples, not augmented.
        images: number T of images.
        names: signals of the teacher's first box head.
        data: digest of the annotation file, which training is checked against.
        boxes_per_image: number K of boxes per image; with fewer than 64, gains shrink.
        storage: number format, fp32, fp16, or int8 with one scale per box.
        seed: seed of the random boxes.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if not teacher.two_stage:
        raise UserError("a cache needs a teacher with a RoI head: the targets of a dense head depend on every pixel")
    if len(box_heads(teacher.detector.roi_head)) > 1:
        raise UserError(
            "a cache holds one activation for each box, and a cascade's later stages look at boxes that the assistant moves:"
            " train without a cache"
        )
    ids: list[Any] = []
    boxes = _mapped(path / "boxes.npy", np.float32, (images, boxes_per_image, 4))
    count = np.full(images, boxes_per_image, dtype=np.int64)
    arrays: dict[str, Any] = {}
    scales = {name: np.ones((images, boxes_per_image), dtype=np.float32) for name in names}
    for batch, samples in batches:
        maps = teacher.features(batch, samples)
        found = teacher.detector.rpn_head.predict(maps, list(samples), rescale=False)
        chosen = []
        for sample, proposed in zip(samples, found, strict=True):
            draws = randomness.generator(seed, len(ids))
            ids.append(sample.metainfo["img_id"])
            size = sample.metainfo["img_shape"][:2]
            chosen.append(
                choose_boxes(
                    proposed.bboxes.cpu(), sample.gt_instances.bboxes.cpu().float(), size, boxes_per_image, draws
                )
            )
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(chosen)]).to(
            batch.device
        )
        values = teacher.at_rois(maps, rois, names)
        first = len(ids) - len(chosen)
        for name, value in values.items():
            block = value.view(len(chosen), boxes_per_image, -1).cpu().numpy()
            if name not in arrays:
                shape = (images, boxes_per_image, block.shape[2])
                arrays[name] = _mapped(path / f"{name}.npy", _DTYPES[storage], shape)
            if storage == "int8":
                scale = np.maximum(np.abs(block).max(axis=2), 1e-12) / 127
                scales[name][first : first + len(chosen)] = scale
                block = np.round(block / scale[:, :, None])
            arrays[name][first : first + len(chosen)] = block
        for i, (sample, chosen_boxes) in enumerate(zip(samples, chosen, strict=True)):
            w, h = sample.metainfo.get("scale_factor", (1.0, 1.0))
            boxes[first + i] = (chosen_boxes / chosen_boxes.new_tensor([w, h, w, h])).numpy()
    for array in (boxes, *arrays.values()):
        array.flush()
    np.save(path / "count.npy", count)
    if storage == "int8":
        for name, scale in scales.items():
            np.save(path / f"{name}.scale.npy", scale)
    header = {
        "teacher": weights_digest(teacher.detector.state_dict()),
        "input": normalization(teacher.detector.data_preprocessor),
        "data": data,
        "signals": list(arrays),
        "boxes": boxes_per_image,
        "storage": storage,
        "images": ids,
    }
    (path / HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")
    return TargetCache.open(path)
