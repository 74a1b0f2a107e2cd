"""The demonstration: a RetinaNet learns to detect drawn shapes, alone and with an R-CNN's knowledge.

A Faster R-CNN is trained first, as the teacher. Then the same small RetinaNet is trained from the same start on the same
images for the same steps in several ways: alone; with an R-CNN head as assistant that sees labels only; with the assistant
imitating the teacher's head (AKD); with its own class tower imitating it too (CKD); without a teacher (TF-HEAD); by
imitating the teacher's neck (PKD, FitNet); and by imitating the teacher's head directly, without an assistant.
All are measured by COCO's AP on images that none has seen.
"""

import concurrent.futures
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import head_kd
from head_kd.commands._demo_arms import (
    ARMS,
    LEVEL_ARMS,
    REPORTED,
    REPORTED_SEEDS,
    SIZES,
    TEACHER_SEED,
    VALIDATION_FIRST,
    WITH_TEACHER,
    Size,
    drawn_splits,
    train_arm,
    train_teacher,
)
from head_kd.commands._demo_pictures import draw_pictures
from head_kd.config import DemoSettings
from head_kd.rendered import SOURCE
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation, show_claims, track
from tenfold.report import write_report
from tenfold.runs import Run

DATA = f"{SOURCE.partition(' with ')[0]}, weak, without lines and letters"


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, measure, decide the claims, draw."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, quiet = invocation.folder, invocation.quiet
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
        drawn_splits(scratch, size)
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
    values = {arm: study.values((arm, "AP")).tolist() for arm in arms} | extra
    files = {arm: folder.own(f"students/{arm}.safetensors") for arm in values}
    draw_pictures(
        folder,
        {ARMS[arm][0]: found for arm, found in values.items()},
        {ARMS[arm][0]: files[arm] for arm in ("plain", "assist", "akd") if arm in files},
        [VALIDATION_FIRST + i for i in range(5)],
    )
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
    return show_claims(summary, strict=invocation.strict)


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
