"""`head-kd demo`: a RetinaNet learns to detect drawn shapes, alone and with an R-CNN's knowledge.

A Faster R-CNN is trained first, as the teacher. Then the same small RetinaNet is trained from the same start on the same
images for the same steps in several ways: alone; with an R-CNN head as assistant that sees labels only; with the assistant
imitating the teacher's head (AKD); with its own class tower imitating it too (CKD); without a teacher (TF-HEAD); by
imitating the teacher's neck (PKD, FitNet); and by imitating the teacher's head directly, without an assistant.
All are measured by COCO's AP on images that none has seen.
"""

import concurrent.futures
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from head_kd.commands._demo_arms import (
    ARMS,
    LEVEL_ARMS,
    REPORTED,
    REPORTED_SEEDS,
    SEEDS,
    SIZES,
    VALIDATION_FIRST,
    Size,
    drawn_splits,
    ready,
    train_arm,
    train_teacher,
)
from head_kd.commands._demo_pictures import draw_pictures
from head_kd.config import DemoSettings
from head_kd.per_image import difference_over_images
from head_kd.rendered import SOURCE
from tenfold import executors
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation
from tenfold.config import Level
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims, track

DATA = f"{SOURCE.partition(' with ')[0]}, weak, without lines and letters"
CAPTIONS = {
    "arms": "AP (percent) on images that none has seen: mean over seeds with its 95 % interval, below a dot for each seed.",
    "detections": "Students of the first seed: of each image with n objects, the n best detections after suppression over all"
    " classes, so that no threshold favors a student. Green: right place (IoU 0.5) and class; orange: right place, wrong"
    " class; red: no object there. White: ground truth.",
}


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, measure, decide the claims, draw."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, level = invocation.folder, settings.level
    size, seeds, arms = SIZES[level], settings.seeds_of(SEEDS), LEVEL_ARMS[level]
    study = Study(folder, data=DATA, seeds=seeds, level=level)
    more = REPORTED if level == "full" else ()
    some = Study(folder, data=DATA, seeds=seeds[:REPORTED_SEEDS], level=level)
    fresh = not (folder.path / "results").exists()
    begun = time.perf_counter()
    processes = settings.processes or (1 if level == "quick" else 2)
    with (
        tempfile.TemporaryDirectory(prefix="head-kd-demo-") as scratch,
        executors.make(None if processes == 1 else f"processes:{processes}") as pool,
    ):
        if pool is not None:  # they import while the images are drawn here
            for _ in range(processes):
                pool.submit(ready)
        drawn_splits(scratch, size)
        students = {arm: folder.own(f"students/{arm}.safetensors") for arm in (*arms, *more)}
        train = partial(train_arm, str(folder.path), scratch, size, seeds[0])
        teacher = _teacher(folder, scratch, size, pool)
        for taught in (False, True):  # those that need no teacher while it is trained
            if taught:
                ap = teacher()
            show = partial(track, description=f"students, {'taught' if taught else 'alone'}", quiet=invocation.quiet)
            study.over_arms({arm: partial(train, arm) for arm in _those(arms, taught)}, pool, show)
            some.over_arms({arm: partial(train, arm) for arm in _those(more, taught)}, pool, show)
    _claim(study, level)
    study.note(
        f"one teacher for all, a Faster R-CNN trained here for {size.teacher_steps} steps, has AP {ap:.1f} on the same images"
    )
    _report(study, some)
    results = [json.loads(file.read_text(encoding="utf-8")) for file in (folder.path / "results").glob("*.json")]
    study.note(f"trainings and their evaluation: {sum(r['seconds'] for r in results):.0f} s, one thread each")
    measured = {**study.arms, **some.arms}
    values = {arm: list(measured[arm]["AP"]) for arm in (*arms, *more)}
    draw_pictures(
        folder,
        {ARMS[arm].label: found for arm, found in values.items()},
        {ARMS[arm].label: students[arm] for arm in ("plain", "assist", "akd") if arm in students},
        [VALIDATION_FIRST + i for i in range(5)],
    )
    summary = study.finish(time.perf_counter() - begun if fresh else None)
    write_report(folder, "head-kd: a RetinaNet taught by a Faster R-CNN", CAPTIONS)
    return show_claims(summary, strict=invocation.strict)


def _those(arms: Iterable[str], taught: bool) -> list[str]:
    return [arm for arm in arms if ARMS[arm].taught == taught]


def _teacher(folder: Run, scratch: str, size: Size, pool: concurrent.futures.Executor | None) -> Callable[[], float]:
    """Begin to train the teacher where that is still to be done; what is returned waits for it and gives its AP."""
    result = folder.path / "results/teacher.json"
    folder.own("teacher.safetensors")
    work = partial(train_teacher, str(folder.path), scratch, size)
    future = None if pool is None or result.exists() else pool.submit(work)

    def ap() -> float:
        if not result.exists():
            folder.write_json("results/teacher.json", work() if future is None else future.result())
        return float(json.loads(result.read_text(encoding="utf-8"))["AP"])

    return ap


def _claim(study: Study, level: Level) -> None:
    def difference(id: str, better: str, worse: str, required: str = ">= 0", main: bool = False) -> None:
        text = f"{ARMS[better].label}: AP minus that of {ARMS[worse].label}"
        study.difference(id, text, (better, "AP"), (worse, "AP"), required=required, main=main)

    if level == "default":
        _claim_over_images(study)
    else:
        difference("akd_beats_plain", "akd", "plain", ">= 2", main=True)
        difference("assistant_helps", "assist", "plain")
        difference("akd_adds", "akd", "assist")
    if level == "full":
        difference("akd_beats_pkd", "akd", "pkd")
        difference("akd_beats_fitnet", "akd", "fitnet")


def _claim_over_images(study: Study) -> None:
    """Two seeds give no interval: what this level decides is said of the students that it has trained."""
    pairs = [[study.arrays(arm, seed) for seed in study.seeds] for arm in ("akd", "plain")]
    estimate, (low, high) = difference_over_images(*pairs)
    images = len(pairs[0][0]["objects"])
    study.claim(
        "akd_beats_plain_here",
        f"{ARMS['akd'].label}: AP minus that of {ARMS['plain'].label}, mean of the students trained here",
        "difference",
        100 * estimate,
        (100 * low, 100 * high),
        method=f"bootstrap over {images} measured images, {len(study.seeds)} pairs of students",
        required=">= 0",
        main=True,
    )


def _report(study: Study, some: Study) -> None:
    """What is not claimed, with its sign."""
    for arm, other, text in (
        ("akd_ckd", "akd", "CKD on top of AKD"),
        ("tf_head", "plain", "TF-HEAD against the student alone"),
        ("direct", "plain", "direct imitation without an assistant against the student alone"),
    ):
        if arm in some.arms:
            found = np.asarray(some.arms[arm]["AP"])
            difference = found - study.values((other, "AP"))[: len(found)]
            estimate = interval(*mean_ci95(difference.tolist()))
            study.note(f"{text}: {estimate} AP ({len(found)} seeds, weight not tuned); reported, not required")
