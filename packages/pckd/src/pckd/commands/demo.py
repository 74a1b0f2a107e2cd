"""`pckd demo`: look-alike letters in faces that nobody trained on; what does a small student gain, from which term?

For each seed a teacher learns noisy letters of nine typefaces from their labels. Then students of the same feature width and
a fraction of its size are trained by each method: the same images, views, order, steps and first weights. The test images
are other letters of three other faces.
"""

import dataclasses
import sys
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pckd import analysis
from pckd.commands import _pictures
from pckd.config import CompareSettings, DemoSettings, KDConfig, Losses, Method, Optimizer, PCKDConfig, Views
from pckd.data import from_images
from pckd.teacher import as_teacher
from pckd.training import answers, predict, train_student
from tenfold import datasets
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation
from tenfold.figures import image_grid
from tenfold.images import ImageData
from tenfold.readers import Images
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims

DATA = "rendered: look-alike letters and digits in the DejaVu faces that matplotlib ships; three faces are for testing only"
LETTERS = "OQDGCUVYS58BZ2hnrbEFPRgq91lijt"
"""In groups that look alike: round ones, strokes, open bowls, hooks, stems."""
SIZE = 16
COPIES = {"train": 18, "test": 40}
"""Renderings of a letter in a face: 4860 training and 3600 test images."""
NOISE = 20.0
"""Standard deviation of the pixels' noise, of 255."""
BLENDED = 0.3
"""Share of the images that have another letter mixed in, at 20 to 45 %."""
TEACHER, STUDENT = "cifar:plain16", "cifar:plain4"
TEACHER_EPOCHS = {"quick": 1, "default": 16, "full": 20}
EPOCHS = {"quick": 1, "default": 6, "full": 6}
_PCKD = PCKDConfig(align_hidden="4x")
KD_FA = dataclasses.replace(_PCKD, alpha=0.0, beta=0.0)
ARMS: dict[str, tuple[Method, Losses]] = {
    "ce": ("ce", Losses()),
    "kd": ("kd", Losses(kd=KDConfig(ce=1.0, kd=1.0))),
    "dkd": ("dkd", Losses()),
    "kd+fa": ("ckd", Losses(pckd=KD_FA)),
    "ckd": ("ckd", Losses(pckd=_PCKD)),
    "pckd": ("pckd", Losses(pckd=_PCKD)),
}
"""Arm -> method and settings. kd weighs its two terms as ckd does; kd+fa adds the alignment of features alone to it."""
RATES = {"ce": 0.4, "kd": 0.2, "dkd": 0.1, "kd+fa": 0.4, "ckd": 0.4, "pckd": 0.4}
"""Learning rates: of 0.05, 0.1, 0.2, 0.4 and 0.8 the best mean over seeds 100 and 101, for ce, kd, dkd and ckd; those of kd+fa
and pckd are ckd's."""
SHOWN = {"quick": ("ce", "kd", "ckd", "pckd"), "default": ("ce", "kd", "ckd", "pckd"), "full": tuple(ARMS)}
"""Arms of each level."""


@lru_cache(maxsize=2)
def letters(seed: int) -> ImageData:
    """Training and test images of a seed: noisy, some blended with another letter."""
    characters = datasets.glyph_characters()[:62]
    kept = np.asarray([characters.index(c) for c in LETTERS])
    parts = []
    for test in (False, True):
        copies = COPIES["test" if test else "train"]
        drawn = datasets.glyphs(SIZE, classes=62, per_face=copies, seed=seed)[int(test)]
        here = np.isin(drawn.labels, kept)
        labels = np.searchsorted(np.sort(kept), drawn.labels[here])
        rng = np.random.default_rng((seed, test))
        images = degrade(drawn.images[here], rng)
        names = tuple(characters[i] for i in np.sort(kept))
        parts.append(Images(images, labels.astype(np.int64), names, DATA))
    return from_images(parts[0], parts[1])


def degrade(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blend a share of the images with others, change the gain, add noise."""
    x = images.astype(np.float64)
    count = len(x)
    share = np.where(rng.random(count) < BLENDED, rng.uniform(0.2, 0.45, count), 0.0)[:, None, None]
    x = (1 - share) * x + share * x[rng.permutation(count)]
    x = x * rng.uniform(0.6, 1.2, count)[:, None, None] + rng.normal(0, NOISE, x.shape) + 40
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def settings_of(arm: str, seed: int, level: str, epochs: int | None = None, lr: float | None = None) -> CompareSettings:
    """The settings of one arm."""
    return CompareSettings(
        data="glyphs",
        student=STUDENT,
        teacher=TEACHER,
        seeds=[seed],
        epochs=epochs or EPOCHS[level],
        teacher_epochs=TEACHER_EPOCHS[level],
        clip_norm=5.0,
        log_every=50,
        views=Views(kind="crop", number=2, padding=2, mirror=False),
        optimizer=Optimizer(lr=lr or RATES[arm], schedule="cosine"),
        losses=ARMS[arm][1],
        device="cpu",
    )


def measure(
    run: Run | None, level: str, seed: int, epochs: int | None = None, *, quiet: bool = False
) -> dict[str, Any]:
    """Train a teacher and a student of each arm; accuracy and geometry of each on the test images."""
    data = letters(seed)
    base = settings_of("ce", seed, level, epochs).of_teacher()
    teacher = as_teacher(train_student(data, base, quiet=quiet).model, data)
    taught = predict(teacher, data.test)
    labels = data.test.labels
    found: dict[str, dict[str, float]] = {
        "teacher": {
            "top1": analysis.top_k(taught.logits, labels),
            "fisher ratio": analysis.fisher_ratio(taught.feature, labels),
        }
    }
    for arm in SHOWN[level]:
        own = settings_of(arm, seed, level, epochs)
        training = own.of_arm(ARMS[arm][0], seed, "of this seed's own teacher")
        done = train_student(data, training, teacher=teacher, quiet=quiet)
        out = predict(done.model, data.test, done.statistics, tap=done.tap)
        mean_v = np.nanmean(done.preview["weights"].astype(np.float64), axis=1)
        found[arm] = {
            "top1": done.top1,
            "fisher ratio": analysis.fisher_ratio(out.feature, labels),
            "center correlation": analysis.center_correlation(out.weight, taught.weight),
            "agreement": analysis.top_k(out.logits, taught.logits.argmax(dim=1)),
            "first mean weight": float(mean_v[0]),
            "last mean weight": float(mean_v[-1]),
        }
        if arm == "pckd" and run is not None and not (run.path / "figures/difficulty.png").exists():
            _pictures.draw_difficulty(run, done.preview, own.losses.pckd.preview, weighted=True)
            _pictures.write_previewed(run, [{**done.preview, **answers(done, data.train, teacher)}], data)
    return found


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, measure, decide; write results, figures and ``report.html``.

    Seeds that the run folder holds results of are not measured again.
    """
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, level = invocation.folder, settings.level
    seeds = settings.seeds_of({"quick": 1, "default": 2, "full": 5})
    study = Study(folder, level=level, data=DATA, seeds=seeds)
    study.over_seeds(lambda seed: measure(folder, level, seed, settings.epochs, quiet=invocation.quiet))
    _decide(study)
    _note(study, level)
    draw(study, level, seeds[0])
    summary = study.finish()
    captions = {
        "methods": "Accuracy on faces that were held out, mean over seeds with its 95 % interval; a faint dot for each seed.",
        "letters": "Training images above, test images (faces that were held out) below.",
        "difficulty": "pckd, first seed. Left: difficulty that half, 90 % and 99 % of the samples stay below, and the"
        " threshold. Right: what preview does.",
        "previewed": "pckd, first seed: the training images that were held back most; beside each row, their letters in"
        " order.",
    }
    write_report(folder, "pckd: what a small student gains from a teacher", captions)
    return show_claims(summary, strict=invocation.strict)


def _decide(study: Study) -> None:
    seeds = len(study.seeds)
    most = max(1, seeds - 1)
    text = "top-1 on unseen faces, kd - ce (percentage points)"
    study.difference("kd_beats_ce", text, ("kd", "top1"), ("ce", "top1"), required=">= 4", main=True)
    text = "top-1, ckd (all terms, no preview) - kd"
    study.difference("ckd_beats_kd", text, ("ckd", "top1"), ("kd", "top1"), required=">= 1", main=True)
    wins = int((study.values(("ckd", "top1")) > study.values(("kd", "top1"))).sum())
    study.count("ckd_wins", "seeds in which ckd has more right than kd", wins, seeds, required=f">= {most}")
    closer = study.values(("ckd", "center correlation")) > study.values(("kd", "center correlation"))
    text = "seeds in which ckd's centers lie more like the teacher's than kd's (correlation of their cosines)"
    study.count("centers", text, int(closer.sum()), seeds, required=f">= {most}")
    first, last = (study.values(("pckd", f"{name} mean weight")) for name in ("first", "last"))
    text = "seeds in which pckd's mean preview weight rises and ends at 0.9 or more"
    study.count("weights_rise", text, int(((last > first) & (last >= 0.9)).sum()), seeds, required=f">= {seeds}")


def _note(study: Study, level: str) -> None:
    study.note(f"The teacher has {interval(*mean_ci95(study.values(('teacher', 'top1')).tolist()))} % right.")
    effect = study.values(("pckd", "top1")) - study.values(("ckd", "top1"))
    study.note(
        f"Preview itself changes top-1 by {interval(*mean_ci95(effect.tolist()))} points (pckd - ckd) in these short runs;"
        " reported, not required. The paper claims its gain for runs of 240 epochs."
    )
    arms = SHOWN[level]
    told = [f"{arm} {interval(*mean_ci95(study.values((arm, 'top1')).tolist()))}" for arm in arms]
    study.note(f"Top-1: {'; '.join(told)}.")
    told = [
        f"{arm} {study.values((arm, 'fisher ratio')).mean():.2f} and {study.values((arm, 'center correlation')).mean():.2f}"
        for arm in arms
    ]
    fisher = study.values(("teacher", "fisher ratio")).mean()
    study.note(
        f"Fisher ratio of test features (teacher {fisher:.2f}) and correlation of center cosines with the teacher's:"
        f" {'; '.join(told)}."
    )


def draw(study: Study, level: str, seed: int) -> None:
    """Draw the letters, and the accuracy of each arm."""
    data = letters(seed)
    rng = np.random.default_rng(0)
    rows: list[Any] = []
    for split in (data.train, data.test):
        assert split.images is not None
        chosen = rng.permutation(len(split))[:24]
        pixels = split.images[chosen].permute(0, 2, 3, 1).numpy()
        rows += [pixels[:12], pixels[12:]]
    image_grid(study.run.figure("letters"), rows, row_titles=["train", "train", "test", "test"], cell=0.7)
    _pictures.draw_arms(study.run, study, SHOWN[level])
