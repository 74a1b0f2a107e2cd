"""The demonstration: a RetinaNet learns to detect drawn shapes, alone and with an R-CNN's knowledge.

A Faster R-CNN is trained first, as the teacher. Then the same small RetinaNet is trained from the same start on the same
images for the same steps in several ways: alone; with an R-CNN head as assistant that sees labels only; with the assistant
imitating the teacher's head (AKD); with its own class tower imitating it too (CKD); without a teacher (TF-HEAD); by
imitating the teacher's neck (PKD, FitNet); and by imitating the teacher's head directly, without an assistant.
All are measured by COCO's AP on images that none has seen.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import head_kd
from head_kd.config import DemoSettings, Distillation, TrainSettings
from head_kd.data import write_drawn
from head_kd.rendered import CLASSES, SOURCE, draw, font
from tenfold import checkpoints
from tenfold.claims import Study
from tenfold.cli import track
from tenfold.figures import arm_chart, image_grid
from tenfold.report import write_report
from tenfold.runs import Run

DATA = SOURCE
PLAIN_DATA = f"{SOURCE}; at this level without lines and letters, on weak noise"
VALIDATION_FIRST = 100_000
"""Index of the first measured image; no image is trained on and measured."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained at a level.

    Attributes:
        images: training images.
        validation: measured images.
        teacher_steps: of the teacher.
        teacher_batch: its images a step.
        steps: of each student, with 8 images.
        seeds: of the students.
        clutter: whether images have strong texture, lines and letters.
    """

    images: int
    validation: int
    teacher_steps: int
    teacher_batch: int
    steps: int
    seeds: tuple[int, ...]
    clutter: bool = True


SIZES = {
    "quick": Size(24, 12, 4, 4, 4, (0,)),
    "default": Size(384, 100, 180, 8, 180, (0,), clutter=False),
    "full": Size(512, 200, 600, 8, 360, (0, 1, 2, 3, 4)),
}
RATE = 6e-3
"""Highest learning rate of all students; not tuned, nor for any arm."""
TEACHER_RATE = 2e-3
TEACHER_SEED = 1000
_COMMON = {"warmup": 100, "rois_per_image": 32}
ARMS: dict[str, tuple[str, Distillation]] = {
    "plain": ("student alone", Distillation(preset="plain")),
    "assist": ("+ assistant, labels only", Distillation(preset="assist", **_COMMON)),  # type: ignore[arg-type]
    "akd": ("+ assistant + AKD", Distillation(preset="own", ckd_weight=0.0, **_COMMON)),  # type: ignore[arg-type]
    "akd_ckd": ("+ assistant + AKD + CKD", Distillation(preset="own", **_COMMON)),  # type: ignore[arg-type]
    "tf_head": ("TF-HEAD, no teacher", Distillation(preset="tf_head", **_COMMON)),  # type: ignore[arg-type]
    "pkd": ("PKD on the neck", Distillation(preset="pkd", warmup=100)),
    "fitnet": ("FitNet on the neck", Distillation(preset="fitnet", warmup=100)),
    "direct": ("direct imitation, no assistant", Distillation(preset="direct", **_COMMON)),  # type: ignore[arg-type]
}
LEVEL_ARMS = {
    "quick": ("plain", "assist", "akd"),
    "default": ("plain", "akd"),
    "full": tuple(ARMS),
}
WITH_TEACHER = ("akd", "akd_ckd", "pkd", "fitnet", "direct")


def train_teacher(folder: str, scratch: str, size: Size) -> float:
    """Train the Faster R-CNN, leave it in ``teacher.safetensors``, return its AP in percent."""
    import torch

    from head_kd import small, training

    torch.set_num_threads(1)
    train, val = _splits(scratch, size)
    cfg = small.experiment(
        small.faster_rcnn(), train, val, steps=size.teacher_steps, batch=size.teacher_batch, rate=TEACHER_RATE
    )
    from mmengine.config import Config

    settings = TrainSettings(student="demo", distill=Distillation(preset="plain"), seed=TEACHER_SEED, log_every=50)
    done = training.fit(Config(cfg), settings, None, quiet=True, description="teacher", work_dir=Path(scratch) / "log")
    checkpoints.save(
        Path(folder) / "teacher.safetensors",
        done.model.state_dict(),
        method="head_kd.teacher",
        version=head_kd.__version__,
        config={"classes": list(CLASSES)},
    )
    return 100 * max(0.0, float(done.run_hook.last_validation["bbox_mAP"]))


def train_arm(folder: str, scratch: str, arm: str, seed: int, size: Size, keep: bool) -> dict[str, float]:
    """Train one student and measure it; with ``keep`` its weights stay in ``students/``."""
    import torch
    from mmengine.config import Config

    from head_kd import compose, small, training
    from head_kd.checkpoints import student_weights

    torch.set_num_threads(1)
    train, val = _splits(scratch, size)
    plain = Config(small.experiment(small.retinanet(), train, val, steps=size.steps, batch=8, rate=RATE))
    how = ARMS[arm][1]
    teacher = Config({"model": small.faster_rcnn()})
    checkpoint = Path(folder) / "teacher.safetensors" if how.needs_teacher else None
    cfg = compose.pair(plain, teacher, checkpoint, how, seed=seed, reuse_features=how.needs_teacher)
    settings = TrainSettings(student="demo", distill=Distillation(preset="plain"), seed=seed, log_every=50)
    done = training.fit(cfg, settings, None, quiet=True, work_dir=Path(scratch) / "log")
    if keep:
        weights = student_weights(done.model.state_dict())
        checkpoints.save(
            Path(folder) / "students" / f"{arm}.safetensors",
            weights,
            method=training.METHOD,
            version=head_kd.__version__,
            config={"classes": list(CLASSES)},
        )
    found = done.run_hook.last_validation
    return {"AP": 100 * max(0.0, found["bbox_mAP"]), "AP50": 100 * max(0.0, found["bbox_mAP_50"])}


def _splits(scratch: str, size: Size) -> tuple[Any, Any]:
    data = Path(scratch) / "data"
    return (
        write_drawn(data, "train", 0, size.images, clutter=size.clutter),
        write_drawn(data, "val", VALIDATION_FIRST, size.validation, clutter=size.clutter),
    )


def run(settings: DemoSettings, folder: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Train, measure, decide the claims, draw; returns the summary."""
    size = SIZES[settings.level]
    seeds = tuple(settings.seeds or size.seeds)
    arms = LEVEL_ARMS[settings.level]
    study = Study(
        folder,
        package="head-kd",
        version=head_kd.__version__,
        command="demo",
        level=settings.level,
        data=DATA if size.clutter else PLAIN_DATA,
        seeds=seeds,
    )
    waiting = [
        (arm, seed)
        for seed in seeds
        for arm in arms
        if not (folder.path / "results" / f"{arm}-seed-{seed}.json").exists()
    ]
    with tempfile.TemporaryDirectory(prefix="head-kd-demo-") as scratch:
        _splits(scratch, size)
        processes = (
            1 if settings.level == "quick" else settings.processes
        )  # starting others takes longer than quick does
        _measure(folder, scratch, size, waiting, seeds[0], processes, quiet)
    study.over_arms(dict.fromkeys(arms, _must_be_there))
    _claims(study, settings.level)
    study.note(
        f"the teacher, a Faster R-CNN trained here for {size.teacher_steps} steps, has AP"
        f" {json.loads((folder.path / 'results' / 'teacher.json').read_text())['AP']:.1f} on the same images"
    )
    _pictures(folder, study, arms, size.clutter)
    summary = study.finish()
    captions = {
        "arms": "AP (percent) on images that none has seen: mean over seeds with its 95 % interval, below a dot for each seed.",
        "detections": "Detections above a score of 0.3 of the students of the first seed; white: ground truth.",
    }
    write_report(folder, "head-kd: a RetinaNet taught by a Faster R-CNN", captions)
    return summary


def _must_be_there(seed: int) -> dict[str, float]:
    raise AssertionError(f"seed {seed} was not measured")


def _measure(
    folder: Run, scratch: str, size: Size, waiting: list[tuple[str, int]], first: int, processes: int, quiet: bool
) -> None:
    """Train what is missing, in worker processes, and save each result; those that need the teacher wait for it."""
    has_teacher = (folder.path / "results" / "teacher.json").exists()
    if not waiting and has_teacher:
        return
    path = str(folder.path)
    folder.own("teacher.safetensors")
    tasks = [] if has_teacher else [("teacher", TEACHER_SEED)]
    tasks += [task for task in waiting if has_teacher or task[0] not in WITH_TEACHER]
    later = [task for task in waiting if task not in tasks]
    progress = iter(track(range(len(tasks + later)), "training students and their teacher", quiet=quiet))

    def save(arm: str, seed: int, values: dict[str, float]) -> None:
        seconds = values.pop("seconds")
        if arm == "teacher":
            folder.write_json("results/teacher.json", values)
        else:
            folder.write_json(f"results/{arm}-seed-{seed}.json", {"seconds": seconds, "values": {arm: values}})
        next(progress, None)

    next(progress)
    if processes == 1:
        for arm, seed in tasks + later:
            save(arm, seed, _timed(path, scratch, arm, seed, size, seed == first))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending = {
            pool.submit(_timed, path, scratch, arm, seed, size, seed == first): (arm, seed) for arm, seed in tasks
        }
        while pending:
            ready, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                arm, seed = pending.pop(future)
                save(arm, seed, future.result())
                if arm == "teacher":
                    pending |= {pool.submit(_timed, path, scratch, a, s, size, s == first): (a, s) for a, s in later}


def _timed(path: str, scratch: str, arm: str, seed: int, size: Size, keep: bool) -> dict[str, float]:
    """One training, on one thread, and the seconds that it took."""
    begun = time.perf_counter()
    is_teacher = arm == "teacher"
    values = (
        {"AP": train_teacher(path, scratch, size)} if is_teacher else train_arm(path, scratch, arm, seed, size, keep)
    )
    return {**values, "seconds": time.perf_counter() - begun}


def _claims(study: Study, level: str) -> None:
    def difference(id: str, better: str, worse: str, required: str = ">= 0", main: bool = False) -> None:
        text = f"{ARMS[better][0]}: AP minus that of {ARMS[worse][0]}"
        study.difference(id, text, (better, "AP"), (worse, "AP"), required=required, main=main)

    difference("akd_beats_plain", "akd", "plain", ">= 2", main=True)
    if level != "default":
        difference("assistant_helps", "assist", "plain")
        difference("akd_adds", "akd", "assist")
    if level == "full":
        difference("akd_beats_pkd", "akd", "pkd")
        difference("akd_beats_fitnet", "akd", "fitnet")
        difference("direct_is_worse", "akd", "direct")
        for id, arm, other, text in (
            ("ckd", "akd_ckd", "akd", "CKD on top of AKD"),
            ("tf", "tf_head", "plain", "TF-HEAD against the student alone"),
        ):
            values = study.values((arm, "AP")) - study.values((other, "AP"))
            from tenfold.claims import interval, mean_ci95

            study.note(
                f"{text}: {interval(*mean_ci95(values.tolist()))} AP at this scale; reported, not required ({id})"
            )


def _pictures(folder: Run, study: Study, arms: tuple[str, ...], clutter: bool) -> None:
    arm_chart(
        folder.own("figures/arms.png"),
        {ARMS[arm][0]: study.values((arm, "AP")).tolist() for arm in arms},
        xlabel="AP on held-out drawn images, percent",
    )
    shown = [arm for arm in ("plain", "assist", "akd", "akd_ckd") if arm in arms]
    images = [VALIDATION_FIRST + i for i in range(5)]
    rows: list[list[NDArray[np.uint8]]] = [[_boxed(*draw(index, clutter=clutter), []) for index in images]]
    for arm in shown:
        file = folder.own(f"students/{arm}.safetensors")
        rows.append(
            [
                _boxed(draw(i, clutter=clutter)[0], [], found)
                for i, found in zip(images, predict(file, images, clutter=clutter), strict=True)
            ]
        )
    for name in arms:
        folder.own(f"students/{name}.safetensors")
    titles = ["ground truth", *(ARMS[arm][0] for arm in shown)]
    image_grid(folder.own("figures/detections.png"), rows, row_titles=titles, cell=1.7)


def predict(
    weights: Path, images: list[int], *, clutter: bool, threshold: float = 0.3
) -> list[list[tuple[int, list[float], float]]]:
    """Detections (class, x1 y1 x2 y2, score) of a student's file on drawn images."""
    import head_kd.ops_fallback  # noqa: F401, I001
    import torch
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict

    from head_kd import small
    from head_kd.checkpoints import read_weights

    register_all_modules(init_default_scope=True)
    model = MODELS.build(ConfigDict(small.retinanet())).eval()
    model.load_state_dict(read_weights(weights).state_dict)
    meta = {"img_shape": (128, 128), "ori_shape": (128, 128), "scale_factor": (1.0, 1.0)}
    inputs = [torch.from_numpy(draw(i, clutter=clutter)[0][..., ::-1].copy()).permute(2, 0, 1) for i in images]
    with torch.no_grad():
        found = model.test_step(
            {"inputs": inputs, "data_samples": [DetDataSample(metainfo=dict(meta)) for _ in images]}
        )
    out = []
    for sample in found:
        p = sample.pred_instances
        keep = p.scores > threshold
        rows = zip(p.labels[keep].tolist(), p.bboxes[keep].tolist(), p.scores[keep].tolist(), strict=True)
        out.append(list(rows))
    return out


_COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))


def _boxed(
    image: NDArray[np.uint8], truth: list[tuple[int, list[float]]], detections: list[tuple[int, list[float], float]]
) -> NDArray[np.uint8]:
    """An image, three times as large, with white boxes of the ground truth and colored ones of detections."""
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(image).resize((384, 384), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for label, (x, y, w, h) in truth:
        pen.rectangle([3 * x, 3 * y, 3 * (x + w), 3 * (y + h)], outline=(255, 255, 255), width=5)
        pen.text(
            (3 * x + 6, 3 * y + 4),
            CLASSES[label],
            font=font(22),
            fill=(255, 255, 255),
            stroke_width=2,
            stroke_fill=(0, 0, 0),
        )
    for label, box, score in detections:
        pen.rectangle([3 * v for v in box], outline=_COLORS[label], width=5)
        where = (3 * box[0] + 6, 3 * box[1] + 4)
        text = f"{CLASSES[label]} {score:.1f}"
        pen.text(where, text, font=font(22), fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)
