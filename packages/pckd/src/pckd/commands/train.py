"""`pckd train`: one model, from a teacher or from the labels alone."""

import sys
import time

import numpy as np

from pckd.cache import TeacherCache
from pckd.commands import _pictures
from pckd.commands._files import save_student
from pckd.config import TrainSettings
from pckd.data import load
from pckd.teacher import load_teacher
from pckd.training import answers, cache_card, train_student
from tenfold import UserError
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.report import write_report


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, and write the student, its numbers and pictures."""
    start = time.perf_counter()
    folder, method = invocation.folder, settings.chosen_method
    choose_device(settings.device)
    cache = None if settings.cache is None else TeacherCache(settings.cache)
    data = load(settings.data, settings.reading)
    teacher = None
    if settings.teacher is not None:
        teacher = load_teacher(settings, data)
    if cache is not None:
        if teacher is None or data.train.images is None:
            raise UserError("--cache needs images that are kept in memory: raise --reading.resident_gb")
        cache.check(cache_card(data, settings.views, settings.seed, teacher))
    trained = train_student(data, settings, run=folder, teacher=teacher, cache=cache, quiet=invocation.quiet)
    if not folder.writes:
        return  # of several processes, one is enough for what follows
    save_student(folder, trained, settings.student, data, args=settings.student_args)
    with folder.replacing("weights.npz") as path:
        np.savez_compressed(path, **trained.preview)
    preview = settings.losses.pckd.preview
    _pictures.draw_accuracy(folder, {method: [trained.history]}, f"{settings.student}, {method}")
    _pictures.draw_difficulty(folder, trained.preview, preview, weighted=method in {"pckd", "pckd-nokd"})
    given = answers(trained, data.train, None if method == "ce" else teacher)
    _pictures.write_previewed(folder, [{**trained.preview, **given}], data)
    study = Study(folder, data=data.source, seeds=[settings.seed])
    study.record(method, {"top1": trained.top1, "last": trained.last, "best on test": trained.best})
    if data.val is None:
        study.note(
            f"Reported is the last epoch. The best epoch on the test images, {trained.best:.2f} %, flatters: it was chosen"
            " on them. --reading.val_fraction 0.1 chooses on held-out training images."
        )
    study.finish(time.perf_counter() - start)
    captions = {
        "accuracy": "Accuracy on the test images by epoch.",
        "difficulty": "Left: difficulty that half, 90 % and 99 % of the samples stay below. Right: what preview does.",
        "previewed": _pictures.PREVIEWED,
    }
    write_report(folder, f"pckd train: {settings.student} by {method}", captions)
    sys.stdout.write(
        f"{method}: {trained.top1:.2f} % of the test images right at epoch {trained.epoch} (last epoch {trained.last:.2f} %,"
        f" best on the test images {trained.best:.2f} %); student in {folder.path}, hardest images in previewed.csv\n"
    )
