"""Pictures of a command as tensors, and a learner from its option."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mamba_fscil.data import Part, SessionData, match_classes, read_maps
from mamba_fscil.training.learner import IncrementalLearner
from tenfold import UserError, checkpoints
from tenfold.config import Device
from tenfold.images import Split, read_square
from tenfold.readers import IMAGE_SUFFIXES


def learner_of(path: str, device: Device = "cpu", *, option: str = "--learner") -> IncrementalLearner:
    """The learner that an option names."""
    return IncrementalLearner.load(path, device=device, option=option)


def pictures_in(folder: Path, option: str) -> list[Path]:
    """The pictures right in a folder, sorted.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(f"{option} {folder}: no picture in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def decoded(paths: Sequence[Path], size: int, *, skip_bad: bool = False) -> tuple[Tensor, list[Path], list[str]]:
    """Images (N, 3, size, size) uint8, their files, and what is wrong with those that were left out.

    Raises:
        UserError: a picture cannot be decoded; names the first, and how many more there are.
    """
    images, kept, faults = [], [], []
    for path in paths:
        try:
            images.append(torch.from_numpy(read_square(path, size).copy()).permute(2, 0, 1))
            kept.append(path)
        except UserError as error:
            faults.append(str(error))
    if faults and not (skip_bad and kept):
        more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UserError(
            f"{faults[0]}{more} (--skip_bad true leaves broken pictures out)" if kept else f"{faults[0]}{more}"
        )
    return torch.stack(images), kept, faults


def refuse_twice(images: Tensor, paths: Sequence[Path]) -> None:
    """Check that no picture is given twice, also under two names.

    Raises:
        UserError: two files hold the same picture.
    """
    seen: dict[str, Path] = {}
    for image, path in zip(images, paths, strict=True):
        key = checkpoints.digest([image])
        if key in seen:
            raise UserError(f"{path} is the same picture as {seen[key]}: each has to be given once")
        seen[key] = path


def inputs_of(learner: IncrementalLearner, source: str, option: str = "--images") -> tuple[Tensor | Split, list[str]]:
    """What an option names: one picture, a folder of them at any depth, or an npz file of maps; and a name for each."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{option} {source}: no such file or folder")
    if path.suffix == ".npz":
        maps = read_maps(path)
        return maps, [str(i) for i in range(len(maps))]
    if learner.backbone is None:
        raise UserError(f"{option} {source}: this learner was made from maps: give an npz file of maps")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise UserError(f"{option} {source}: no picture in this folder")
    labels = torch.zeros(len(files), dtype=torch.int64)
    return Split(labels, None, tuple(files), learner.size), [str(p) for p in files]


def test_part(learner: IncrementalLearner, data: SessionData, source: str) -> tuple[Part, list[str]]:
    """Test pictures with the learner's labels, and the learner's classes that they have none of.

    Raises:
        UserError: a class that the learner does not know, or pictures of another size.
    """
    labels = match_classes(data.classes, learner.classes, f"--data {source}")[data.test.labels]
    if data.test.maps is None and data.size != learner.size:
        raise UserError(f"--data {source}: images are {data.size} pixels wide, the learner's {learner.size}")
    present = set(labels.tolist())
    return data.test.relabeled(labels), [name for k, name in enumerate(learner.classes) if k not in present]
