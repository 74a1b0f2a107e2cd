"""`pckd compare`: methods x seeds on the same images, with paired intervals."""

import dataclasses
import sys
from functools import partial

import numpy as np

from pckd import analysis
from pckd.commands import _pictures
from pckd.commands._files import save_student
from pckd.config import CompareSettings, Method
from pckd.data import load
from pckd.teacher import Teacher, load_teacher
from pckd.training import answers, predict, train_student
from tenfold import executors
from tenfold.claims import Measured, Study, arm_rows
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.images import ImageData
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims, table, track

METRICS = ("top1", "best on test", "agreement", "fisher ratio", "center correlation")
_CAPTIONS = {
    "methods": "Accuracy of the last epoch (or of the best on held-out images): mean over seeds with its 95 % interval,"
    " a faint dot for each seed.",
    "accuracy": "Accuracy by epoch, mean over seeds with its interval.",
    "difficulty": "Difficulty of the training images for {hardest}, seed {seed}.",
    "previewed": _pictures.PREVIEWED,
}


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Train the teacher where it has no weights, then every arm on every seed; decide, draw, report."""
    folder = invocation.folder
    choose_device(settings.device)
    assert settings.teacher is not None
    data = load(settings.data, settings.reading)
    weights = settings.teacher_weights
    if weights is None and not settings.brings_weights:
        weights = str(folder.path / "teacher")
        if not (folder.path / "teacher/config.json").exists():
            trained = train_student(data, settings.of_teacher(), run=folder, stage="teacher", quiet=invocation.quiet)
            save_student(folder, trained, settings.teacher, data, "teacher/", args=settings.teacher_args)
    data, teacher = prepared(settings, weights)
    taught = predict(teacher, data.test)
    study = Study(folder, data=data.source, seeds=settings.seeds)
    accuracy = analysis.top_k(taught.logits, data.test.labels)
    study.note(f"The teacher, {settings.teacher}, has {accuracy:.2f} % of the test images right.")
    with executors.make(settings.executor) as pool:
        here = folder if pool is None else None  # a run goes to no other process; its arms are then not resumed within
        arms = {arm: partial(measure, settings, arm, weights, here, invocation.quiet) for arm in settings.arms}
        show = partial(
            track, description="arms x seeds", quiet=invocation.quiet or pool is None
        )  # each shows its own here
        study.over_arms(arms, pool, show)
    decide(study, settings.arms)
    draw(study, settings, data)
    summary = study.finish()
    shown = {"hardest": hardest(settings.arms), "seed": settings.seeds[0]}
    captions = {name: text.format(**shown) for name, text in _CAPTIONS.items()}
    write_report(folder, f"pckd compare: {settings.student} from {settings.teacher}", captions)
    sys.stdout.write(table(*arm_rows(study, settings.arms, METRICS)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


_PREPARED: dict[str, tuple[ImageData, Teacher]] = {}


def prepared(settings: CompareSettings, weights: str | None) -> tuple[ImageData, Teacher]:
    """Data and teacher of all arms, once per process."""
    settings = dataclasses.replace(settings, teacher_weights=weights)
    key = repr(settings)
    if key not in _PREPARED:
        data = load(settings.data, settings.reading)
        _PREPARED.clear()
        _PREPARED[key] = data, load_teacher(settings, data)
    return _PREPARED[key]


def measure(
    settings: CompareSettings, arm: Method, weights: str | None, run: Run | None, quiet: bool, seed: int
) -> Measured:
    """Train one arm on one seed, and measure it on the test images."""
    assert settings.teacher is not None
    data, teacher = prepared(settings, weights)
    taught = predict(teacher, data.test)
    training = settings.of_arm(arm, seed, weights)
    stage = f"{arm}-seed-{seed}"
    done = train_student(data, training, run=run, stage=stage, teacher=teacher, quiet=quiet or run is None)
    out = predict(done.model, data.test, done.statistics, tap=done.tap)
    values = {
        "top1": done.top1,
        "best on test": done.best,
        "agreement": analysis.top_k(out.logits, taught.logits.argmax(dim=1)),
        "fisher ratio": analysis.fisher_ratio(out.feature, data.test.labels),
        "center correlation": analysis.center_correlation(out.weight, taught.weight),
    }
    given = answers(done, data.train, teacher)
    return Measured(values, {**done.preview, **given, "history": np.asarray(done.history)})


def decide(study: Study, arms: list[Method]) -> None:
    """Claim paired differences to the first arm and to kd; one holds where its whole interval is above 0."""
    text = "top-1 of {arm} - top-1 of {reference} (percentage points)"
    study.against(arms[0], arms, "top1", text=text)
    if "kd" in arms[1:]:
        study.against("kd", arms[1:], "top1", text=text)


def hardest(arms: list[Method]) -> Method:
    """The arm whose difficult images are shown: one with preview weights, if there is one."""
    return next((arm for arm in ("pckd", "pckd-nokd") if arm in arms), arms[-1])


def draw(study: Study, settings: CompareSettings, data: ImageData) -> None:
    """Draw accuracies, difficulties and the hardest images."""
    run, shown = study.run, hardest(settings.arms)
    kept = {arm: [study.arrays(arm, seed) for seed in settings.seeds] for arm in settings.arms}
    _pictures.draw_arms(run, study, settings.arms)
    _pictures.draw_accuracy(run, {arm: [k["history"].tolist() for k in rows] for arm, rows in kept.items()})
    weighted = shown.startswith("pckd")
    _pictures.draw_difficulty(run, kept[shown][0], settings.losses.pckd.preview, weighted=weighted)
    _pictures.write_previewed(run, kept[shown], data)
