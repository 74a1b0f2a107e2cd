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
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import track
from tenfold.figures import arm_chart, image_grid
from tenfold.report import write_report
from tenfold.runs import Run

DATA = f"{SOURCE.partition(' with ')[0]}, weak, without lines and letters"
CLUTTER = False
"""Strong noise, lines and letters would take more steps than the levels have: after 400, such a teacher had AP 20, not 42."""
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
    """

    images: int
    validation: int
    teacher_steps: int
    teacher_batch: int
    steps: int
    seeds: tuple[int, ...]


SIZES = {
    "quick": Size(24, 12, 4, 4, 4, (0,)),
    "default": Size(384, 100, 240, 8, 200, (0, 1)),
    "full": Size(512, 200, 450, 8, 250, (0, 1, 2, 3, 4)),
}
RATE = 6e-3
"""Highest learning rate of all students; not tuned, nor for any arm."""
TEACHER_RATE = 2e-3
PROPOSALS = {"nms_pre": 200, "max_per_image": 100}
"""Of the students: on images of 128 pixels the authors' 2000 and 1000 are nearly every anchor, and NMS most of a step."""
TEACHER_SEED = 1000
_COMMON = {"warmup": 100, "rois_per_image": 32}
ARMS: dict[str, tuple[str, Distillation]] = {
    "plain": ("student alone", Distillation(preset="plain")),
    "assist": ("+ assistant, labels only", Distillation(preset="assist", **_COMMON)),  # type: ignore[arg-type]
    "akd": ("+ assistant + AKD", Distillation(preset="own", akd_weight=1.25, ckd_weight=0.0, **_COMMON)),  # type: ignore[arg-type]
    "akd_ckd": ("+ assistant + AKD + CKD", Distillation(preset="own", akd_weight=1.25, **_COMMON)),  # type: ignore[arg-type]
    "tf_head": ("TF-HEAD, no teacher", Distillation(preset="tf_head", **_COMMON)),  # type: ignore[arg-type]
    "pkd": ("PKD on the neck", Distillation(preset="pkd", neck_weight=0.4, warmup=100)),
    "fitnet": ("FitNet on the neck", Distillation(preset="fitnet", neck_weight=0.08, warmup=100)),
    "direct": ("direct imitation, no assistant", Distillation(preset="direct", **_COMMON)),  # type: ignore[arg-type]
}
LEVEL_ARMS = {
    "quick": ("plain", "assist", "akd"),
    "default": ("plain", "akd"),
    "full": ("plain", "assist", "akd", "pkd", "fitnet"),
}
REPORTED = ("akd_ckd", "tf_head", "direct")
"""Arms of the full level that no claim is decided by; on the first seeds alone, to pay for more steps of the others."""
REPORTED_SEEDS = 2
WITH_TEACHER = ("akd", "akd_ckd", "pkd", "fitnet", "direct")


def train_teacher(folder: str, scratch: str, size: Size) -> float:
    """Train the Faster R-CNN, leave it in ``teacher.safetensors``, return its AP in percent."""
    import torch

    from head_kd import small, training

    torch.set_num_threads(1)
    train, val = _splits(scratch, size)
    cfg = small.experiment(
        small.faster_rcnn(),
        train,
        val,
        steps=size.teacher_steps,
        batch=size.teacher_batch,
        rate=TEACHER_RATE,
        memory=True,
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
    plain = Config(small.experiment(small.retinanet(), train, val, steps=size.steps, batch=8, rate=RATE, memory=True))
    how = ARMS[arm][1]
    teacher = Config({"model": small.faster_rcnn()})
    checkpoint = Path(folder) / "teacher.safetensors" if how.needs_teacher else None
    cfg = compose.pair(plain, teacher, checkpoint, how, seed=seed, reuse_features=how.needs_teacher)
    cfg.model.proposals = dict(PROPOSALS)
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
        write_drawn(data, "train", 0, size.images, clutter=CLUTTER),
        write_drawn(data, "val", VALIDATION_FIRST, size.validation, clutter=CLUTTER),
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
        data=DATA,
        seeds=seeds,
    )
    more = REPORTED if settings.level == "full" else ()
    tasks = [(arm, seed) for n, seed in enumerate(seeds) for arm in (*arms, *(more if n < REPORTED_SEEDS else ()))]
    waiting = [task for task in tasks if not _result(folder, *task).exists()]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="head-kd-demo-") as scratch:
        _splits(scratch, size)
        processes = (
            1 if settings.level == "quick" else settings.processes
        )  # starting others takes longer than quick does
        _measure(folder, scratch, size, waiting, seeds[0], processes, quiet)
    study.over_arms(dict.fromkeys(arms, _must_be_there))
    _claims(study, settings.level)
    extra = {
        arm: [
            float(json.loads(_result(folder, arm, s).read_text())["values"][arm]["AP"]) for s in seeds[:REPORTED_SEEDS]
        ]
        for arm in more
    }
    _report(study, extra)
    measured = [json.loads(file.read_text()) for file in sorted((folder.path / "results").glob("*.json"))]
    ap = next(m["AP"] for m in measured if "AP" in m)
    study.note(
        f"one teacher for all, a Faster R-CNN trained here for {size.teacher_steps} steps, has AP {ap:.1f} on the same images"
    )
    study.note(f"trainings and their evaluation: {sum(m['cpu_seconds'] for m in measured):.0f} s of one core")
    _pictures(folder, {arm: study.values((arm, "AP")).tolist() for arm in arms} | extra)
    whole = len(waiting) == len(tasks)
    seconds = time.perf_counter() - begun if whole else sum(m["seconds"] for m in measured) / processes
    summary = study.finish(seconds)
    captions = {
        "arms": "AP (percent) on images that none has seen: mean over seeds with its 95 % interval, below a dot for each seed.",
        "detections": "Students of the first seed: of each image with n objects, the n best detections after suppression over"
        " all classes, so that no threshold favors a student. Green: right place (IoU 0.5) and class; orange: right place,"
        " wrong class; red: no object there. White: ground truth.",
    }
    write_report(folder, "head-kd: a RetinaNet taught by a Faster R-CNN", captions)
    return summary


def _result(folder: Run, arm: str, seed: int) -> Path:
    return folder.path / "results" / f"{arm}-seed-{seed}.json"


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
        times = {key: values.pop(key) for key in ("seconds", "cpu_seconds")}
        if arm == "teacher":
            folder.write_json("results/teacher.json", {**times, **values})
        else:
            folder.write_json(f"results/{arm}-seed-{seed}.json", {**times, "values": {arm: values}})
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
    """One training, on one thread, and the seconds that it took, by the clock and of the processor."""
    begun, used = time.perf_counter(), time.process_time()
    is_teacher = arm == "teacher"
    values = (
        {"AP": train_teacher(path, scratch, size)} if is_teacher else train_arm(path, scratch, arm, seed, size, keep)
    )
    return {**values, "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - used}


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


def _report(study: Study, extra: dict[str, list[float]]) -> None:
    """What is not claimed, with its sign."""
    for arm, other, text in (
        ("akd_ckd", "akd", "CKD on top of AKD"),
        ("tf_head", "plain", "TF-HEAD against the student alone"),
        ("direct", "plain", "direct imitation without an assistant against the student alone"),
    ):
        if arm in extra:
            values = np.array(extra[arm]) - study.values((other, "AP"))[: len(extra[arm])]
            found = interval(*mean_ci95(values.tolist()))
            study.note(f"{text}: {found} AP ({len(values)} seeds, weight not tuned); reported, not required")


def _pictures(folder: Run, values: dict[str, list[float]]) -> None:
    arms = tuple(values)
    arm_chart(
        folder.own("figures/arms.png"),
        {ARMS[arm][0]: values[arm] for arm in arms},
        xlabel="AP on held-out drawn images, percent",
    )
    shown = [arm for arm in ("plain", "assist", "akd") if arm in arms]
    images = [VALIDATION_FIRST + i for i in range(5)]
    drawn = [draw(index, clutter=CLUTTER) for index in images]
    rows: list[list[NDArray[np.uint8]]] = [[_boxed(image, objects) for image, objects in drawn]]
    for arm in shown:
        found = predict(folder.own(f"students/{arm}.safetensors"), images)
        rows.append([_boxed(image, objects, best) for (image, objects), best in zip(drawn, found, strict=True)])
    for name in arms:
        folder.own(f"students/{name}.safetensors")
    titles = ["ground truth", *(ARMS[arm][0] for arm in shown)]
    image_grid(folder.own("figures/detections.png"), rows, row_titles=titles, cell=1.7)


def predict(weights: Path, images: list[int]) -> list[list[tuple[int, list[float], float]]]:
    """The best detections (class, x1 y1 x2 y2, score) of a student's file on drawn images, as many as there are objects."""
    import head_kd.ops_fallback  # noqa: F401, I001
    import torch
    import torchvision
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
    drawn = [draw(i, clutter=CLUTTER) for i in images]
    inputs = [torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) for image, _ in drawn]
    with torch.no_grad():
        found = model.test_step(
            {"inputs": inputs, "data_samples": [DetDataSample(metainfo=dict(meta)) for _ in images]}
        )
    out = []
    for sample, (_, objects) in zip(found, drawn, strict=True):
        p = sample.pred_instances
        keep = torchvision.ops.nms(p.bboxes, p.scores, 0.5)[: len(objects)]
        rows = zip(p.labels[keep].tolist(), p.bboxes[keep].tolist(), p.scores[keep].tolist(), strict=True)
        out.append(list(rows))
    return out


_GREEN, _ORANGE, _RED, _WHITE = (0, 200, 100), (255, 170, 0), (230, 30, 30), (255, 255, 255)


def _iou(a: list[float], b: list[float]) -> float:
    """Of two boxes x1, y1, x2, y2."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def _boxed(
    image: NDArray[np.uint8],
    truth: list[tuple[int, list[float]]],
    detections: list[tuple[int, list[float], float]] | None = None,
) -> NDArray[np.uint8]:
    """An image, three times as large, with white boxes of the ground truth, or boxes of detections, colored by success."""
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(image).resize((384, 384), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    corners = [(label, [x, y, x + w, y + h]) for label, (x, y, w, h) in truth]
    shown = [(box, CLASSES[label], _WHITE) for label, box in corners]
    if detections is not None:
        shown = []
        for label, box, score in detections:
            there = [other for other, theirs in corners if _iou(box, theirs) >= 0.5]
            color = _GREEN if label in there else _ORANGE if there else _RED
            shown.append((box, f"{CLASSES[label]} {score:.1f}", color))
    for box, text, color in shown:
        pen.rectangle([3 * v for v in box], outline=color, width=5)
        where = (max(2, min(3 * box[0] + 6, 384 - 12 * len(text))), 3 * box[1] + 4)
        pen.text(where, text, font=font(22), fill=_WHITE, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)
