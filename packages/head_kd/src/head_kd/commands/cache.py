"""`head-kd cache`: what training asks of a teacher, saved once."""

import sys
from collections.abc import Iterator
from typing import Any

from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from torch import Tensor

from head_kd.cache import HEADER, check_pipeline, write_cache
from head_kd.commands._files import check_teacher, student_config
from head_kd.config import CacheSettings
from head_kd.configs import innermost, transforms
from head_kd.data import annotation_digest
from head_kd.signals import box_heads, head_signals
from head_kd.stack import build, said_nothing, start, use_device
from head_kd.teacher import Renormalize, TeacherView
from head_kd.training.guard import split
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import track


def run(settings: CacheSettings, invocation: Invocation) -> None:
    """Run the teacher once over the training images, not augmented, and write a ``TargetCache`` into the run."""
    run = invocation.folder
    device = use_device(settings.device)
    check_teacher(settings.teacher, settings.teacher_weights)
    start()
    cfg = student_config(settings.student, settings.data, run, split=settings.split, skip_bad=settings.skip_bad)
    check_pipeline(cfg.train_dataloader.dataset)
    teacher = TeacherView.load(settings.teacher, settings.teacher_weights)
    if not teacher.two_stage:
        raise UserError("a cache needs a teacher with a RoI head: the targets of a dense head depend on every pixel")
    teacher.detector.to(device)
    data = _plain_data(cfg)
    preprocessor = build(cfg.model.data_preprocessor).to(device)
    teacher.renormalize = Renormalize(preprocessor, teacher.detector.data_preprocessor)

    def batches() -> Iterator[tuple[Tensor, list[Any]]]:
        starts = range(0, len(data), settings.batch_size)
        for first in track(starts, "caching the teacher's targets", len(starts), quiet=invocation.quiet):
            items = [data[i] for i in range(first, min(first + settings.batch_size, len(data)))]
            yield split(preprocessor(pseudo_collate(items), False))

    names = tuple(head_signals(box_heads(teacher.detector.roi_head)[0]))
    with run.replacing_folder("cache") as folder:
        write_cache(
            folder,
            teacher,
            batches(),
            len(data),
            names=names,
            data=annotation_digest(cfg),
            boxes_per_image=settings.boxes,
            storage=settings.storage,
            seed=settings.seed,
        )
        size = sum(file.stat().st_size for file in folder.iterdir())
        header = folder / HEADER
        told = header.read_text(encoding="utf-8")
        header.unlink()
    run.write_text(f"cache/{HEADER}", told)  # last: it says that the rest is there
    made = {"images": len(data), "boxes": settings.boxes, "signals": list(names)}
    run.write_json("report.json", {**made, "bytes": size, "path": str(run.path / "cache")})
    sys.stdout.write(
        f"{len(data)} images, {settings.boxes} boxes each, {', '.join(names)}: {size / 1e6:.1f} MB; train with"
        f" --cache {run.path}\n"
    )


def _plain_data(cfg: Any) -> Any:
    """A config's training data without augmentation: loaded, resized as for measuring, packed."""
    dataset = innermost(cfg.train_dataloader.dataset)
    resize = [t for t in transforms(cfg.test_dataloader.dataset) if t["type"] == "Resize"][:1]
    dataset.pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        *resize,
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]
    with said_nothing():
        return DATASETS.build(dataset)
