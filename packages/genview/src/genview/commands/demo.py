"""`genview demo`: digits on rendered backgrounds; what do generated views and their weights add to plain augmentation?

An encoder and a generator learn from external scenes with captions. Views of the target scenes, which have no captions and
other handwriting, are planned, generated in two shards and scored by the commands of a full-scale run. Students then learn
from scratch, without labels, by SimCLR: on plain augmentation, on external scenes added to the data, on views of constant,
random and adaptive level, weighted or not, and with 30 percent of the views exchanged between pictures.
"""

import functools
import importlib
import json
import sys
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from genview import scenes, tiny
from genview.commands import _measures, _world
from genview.commands._world import Lengths
from genview.config import DemoSettings, Heads, Optimizer, ProbeSettings, QualitySettings, TrainSettings, ViewSettings
from genview.data import GeneratedViews, PictureData, json_lines, load, read_manifest
from genview.encoders import build_encoder
from genview.foreground import ForegroundModel
from genview.generators import UnCLIPGenerator
from genview.networks import build_backbone
from genview.plans import Plan
from genview.probes import linear_sweep
from genview.quality import pair_quality
from genview.training import FOREGROUND, extract, prepare, pretrain, semi_supervised
from genview.weights import pair_weights
from tenfold import UserError, executors
from tenfold.claims import Measured, Study, arm_rows
from tenfold.cli import Invocation
from tenfold.figures import arm_chart, image_grid
from tenfold.models import IMAGENET
from tenfold.readers import read_image
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims, table, track

DATA = "real digits of scikit-learn on rendered backgrounds, 16 x 16 pixels"
LENGTHS = {
    "quick": Lengths(1, 8, 8, 8, 1, 1, 40, 6, 20),
    "default": Lengths(12, 350, 2500, 300, 3, 6, 449, 1200),
    "full": Lengths(12, 350, 2500, 300, 3, 6, 449, 1200),
}
ARMS = {
    "quick": ("plain", "adaptive-qd"),
    "default": ("plain", "adaptive-qd"),
    "full": ("plain", "naive", "constant", "random", "adaptive", "adaptive-qd", "swapped", "swapped-qd"),
}
BACKBONE = "conv:16"
"""What the students are: small, so that five seeds of eight arms fit into a quarter of an hour."""
SWAPPED = 0.3
"""Share of the views that the swapped arms exchange between pictures."""
GAMMA = 2.0
PROBE = ProbeSettings(epochs=40, rates=12, batch_size=256)
SEMI = ProbeSettings(epochs=60, batch_size=64, lr=0.4, backbone_lr=0.2, flip=0.0)
SHARE = 0.4
"""Share of tokens that count as background. A token sees 9 pixels, so that those beside a glyph are told from the ground as
well as those on it: 60 percent of all are such tokens, while ink covers 22 percent of the pixels. With a share of 0.8, which
goes by the ink, the ratio follows the true one at 0.13 instead of 0.52 (seed 100)."""


def student_settings(work: str, seed: int, lengths: Lengths, *, weighted: bool) -> TrainSettings:
    """The training of a student; the same for all arms but for its views."""
    return TrainSettings(
        data=f"npz:{work}/target.npz",
        views="of the demonstration" if weighted else None,
        backbone=BACKBONE,
        method="simclr",
        size=scenes.SIZE,
        batch_size=lengths.batch,
        epochs=10_000,
        steps=lengths.student,
        view=ViewSettings(
            least_area=0.5, flip=0.0, jitter=[0.8, 0.8, 0.8, 0.5], jitter_share=1.0, gray=0.5, blur=0.0, generated=0.5
        ),
        heads=Heads(hidden=128, out=64),
        optimizer=Optimizer(name="adamw", lr=3e-3, weight_decay=1e-4),
        qd=QualitySettings(mode="static" if weighted else "none", gamma=GAMMA),
        device="cpu",
        log_every=1000,
        seed=seed,
    )


@functools.cache
def world_of(work: str) -> PictureData:
    """The target scenes, once per process."""
    return load(f"npz:{work}/target.npz")


def views_of(work: str, arm: str) -> GeneratedViews | None:
    """The views of an arm."""
    if arm in {"plain", "naive"}:
        return None
    if arm.startswith("swapped"):
        known = json.loads((Path(work) / "swapped.json").read_text(encoding="utf-8"))
        return GeneratedViews({k: (Path(v),) for k, v in known["files"].items()}, known["quality"], Path(work))
    return read_manifest(Path(work) / f"{arm.removesuffix('-qd')}-merged")


def measure(work: str, arm: str, lengths: Lengths, semi: bool, seed: int) -> Measured:
    """Train the student of an arm and a seed, and measure it on the test scenes."""
    data = world_of(work)
    if arm == "naive":
        data = PictureData(load(f"npz:{work}/more.npz").train, data.test, data.classes, data.source)
    settings = student_settings(work, seed, lengths, weighted=arm.endswith("-qd"))
    backbone = pretrain(settings, prepare(settings, data, views_of(work, arm)), quiet=True)
    found = _measures.read(world_of(work), scenes.SIZE)
    values = _measures.quick(backbone, found, PROBE, IMAGENET, seed)
    values.pop("spread")
    if semi:
        values["semi top1"] = semi_supervised(
            backbone, found.train, found.test, 10, 0.1, SEMI, IMAGENET, size=scenes.SIZE, seed=seed
        )[0]
    return Measured(values)


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Build the world, train, measure, decide, draw."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, level = invocation.folder, settings.level
    lengths, arms = LENGTHS[level], ARMS[level]
    seeds = settings.seeds_of({"quick": 1, "default": 1, "full": 5})
    work = folder.path / "world"
    spec = None if level == "quick" else f"processes:{settings.processes}"
    with executors.make(spec) as pool:
        if pool is not None:  # the workers start while the encoder learns
            for _ in range(settings.processes):
                pool.submit(importlib.import_module, "genview.commands.generate")
        target = build_world(folder, work, level, lengths, arms, pool, quiet=invocation.quiet)
        study = Study(folder, level=level, data=DATA, seeds=seeds)
        todo = {arm: partial(measure, str(work), arm, lengths, level != "quick") for arm in arms}
        show = partial(track, description="students", quiet=invocation.quiet)
        study.over_arms(todo, pool, show)
    folder.adopt("world")
    _decide(study, level, arms)
    judge = _judge(work, lengths)
    _over_images(study, judge, target, work, level)
    _note(study, judge, target, work)
    draw(study, work, arms)
    summary = study.finish()
    captions = {
        "arms": "Linear probe on test scenes: mean over seeds with its 95 % interval, a faint dot for each seed.",
        "sheet": "Target scenes and their adaptive views: the best pairs by quality above, the worst below.",
    }
    write_report(folder, "genview: what generated views add", captions)
    metrics = ["linear top1", "knn top1", *(["semi top1"] if level != "quick" else [])]
    sys.stdout.write(table(*arm_rows(study, arms, metrics)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def build_world(
    folder: Run, work: Path, level: str, lengths: Lengths, arms: tuple[str, ...], pool: Executor | None, *, quiet: bool
) -> scenes.Scenes:
    """Scenes, generator, foreground, views; what a killed run has left is not made again.

    Raises:
        UserError: the generator is too poor for anything to be learned from its views.
    """
    external = scenes.render("external", lengths.scenes, 0)
    train, test = (scenes.render(name, each, 0) for name, each in (("train", lengths.train), ("test", lengths.test)))
    keep = lengths.glyphs * lengths.train
    train = scenes.Scenes(train.images[:keep], train.labels[:keep], train.ratio[:keep], train.attributes[:keep])
    if level == "quick":
        test = scenes.Scenes(test.images[:100], test.labels[:100], test.ratio[:100], test.attributes[:100])
    _save(folder, "world/target.npz", train, test)
    if "naive" in arms:
        each = len(external.images) // len(train.images)  # spread over all external glyphs
        chosen = slice(0, each * len(train.images), each)
        more = np.concatenate([train.images, external.images[chosen]])
        labels = np.concatenate([train.labels, external.labels[chosen]])
        both = scenes.Scenes(more, labels, train.ratio, train.attributes)
        _save(folder, "world/more.npz", both, test)
    if not (work / "generator/model_index.json").exists():
        pipe = _world.build_generator(external, lengths, quiet=quiet)
        gates = _world.gates(_world.Judge.of(pipe, external), train)
        sys.stderr.write("" if quiet else f"generator: {', '.join(f'{k} {v:.2f}' for k, v in gates.items())}\n")
        if level != "quick":
            _world.check_gates(gates)
        with folder.replacing_folder("world/generator") as temporary:
            tiny.save(pipe, temporary)
        folder.write_json("gates.json", gates)
    data = f"npz:{work / 'target.npz'}"
    encoder = f"generator:{work / 'generator'}"
    fit = ["fit-foreground", "--data", data, "--encoder", encoder, "--quantile", str(SHARE)]
    _world.command([*fit, "--out", str(work / "foreground"), "--resume"])
    make = partial(_shards, pool)
    _world.make_views(work, "adaptive", ["--policy", "adaptive", *BINS], make)
    levels = [row.level for row in Plan.read(work / "adaptive-plan").rows]
    if "constant" in arms:
        mean = str(round(sum(levels) / len(levels)))
        _world.make_views(work, "constant", ["--policy", "constant", "--levels", mean], make)
    if "random" in arms:
        drawn = ",".join(map(str, sorted(levels)[:: max(1, len(levels) // 40)]))
        _world.make_views(work, "random", ["--policy", "random", "--levels", drawn], make)
    if "swapped" in arms:
        _swap(folder, work)
    return train


BINS = ("--edges", "0.5,0.6,0.7,0.8", "--levels", "0,100,200,300,400")
"""Bins of the foreground ratio, which is 0.4 to 0.8 for nine of ten scenes, not 0 to 1."""


def _save(folder: Run, name: str, train: scenes.Scenes, test: scenes.Scenes) -> None:
    if not (folder.path / name).exists():
        with folder.replacing(name) as temporary:
            np.savez(
                temporary,
                train_images=train.images,
                train_labels=train.labels,
                test_images=test.images,
                test_labels=test.labels,
            )


def _shards(pool: Executor | None, shards: list[list[str]]) -> None:
    """Run the commands of the workers, side by side where there is a pool."""
    if pool is None:
        for words in shards:
            _world.command(words)
    else:
        for future in [pool.submit(_world.command, words) for words in shards]:
            future.result()


def _scores(work: Path, sources: NDArray[np.uint8], views: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Quality of pairs of pictures."""
    encoder = build_encoder(f"generator:{work / 'generator'}")
    model = ForegroundModel.load(work / "foreground" / FOREGROUND, encoder=encoder.name)
    a, b = (encoder(_world.as_images(x).float() / 255).tokens for x in (sources, views))
    return pair_quality(a, b, model.direction, mean=model.mean).q.double().numpy()


def _swap(folder: Run, work: Path) -> None:
    """Exchange a share of the adaptive views between pictures in a ring, and score the pairs as they then are."""
    views = read_manifest(work / "adaptive-merged")
    keys = sorted(views.files)
    chosen = np.random.default_rng(0).permutation(len(keys))[: int(SWAPPED * len(keys))]
    files = {key: views.files[key][0] for key in keys}
    moved = {keys[i]: files[keys[j]] for i, j in zip(chosen, np.roll(chosen, 1), strict=True)}
    files |= moved
    pictures = load(f"npz:{work / 'target.npz'}").train
    number = {key: i for i, key in enumerate(pictures.keys)}
    sources = np.stack([pictures.read(number[key]) for key in keys])
    q = _scores(work, sources, np.stack([read_image(files[key]) for key in keys]))
    found = {
        "files": {key: str(path) for key, path in files.items()},
        "quality": dict(zip(keys, q.tolist(), strict=True)),
        "swapped": sorted(moved),
    }
    folder.write_json("world/swapped.json", found)


def _judge(work: Path, lengths: Lengths) -> _world.Judge:
    pipe = UnCLIPGenerator.from_pretrained(work / "generator").pipe
    return _world.Judge.of(pipe, scenes.render("external", lengths.scenes, 0))


def _decide(study: Study, level: str, arms: tuple[str, ...]) -> None:
    metrics = {
        "linear top1": "linear top-1",
        "knn top1": "top-1 of nearest neighbors",
        "semi top1": "top-1, 10 % of labels",
    }
    for metric, words in metrics.items():
        if level != "quick" or metric != "semi top1":
            id = f"adaptive_qd_over_plain_{metric.partition(' ')[0]}"
            text = f"{words}, adaptive-qd - plain (percentage points)"
            study.difference(
                id, text, ("adaptive-qd", metric), ("plain", metric), required=">= 0", main=metric != "semi top1"
            )
    if "naive" not in arms:
        return
    for better, worse, bound in (
        ("adaptive-qd", "naive", ">= 0"),
        ("adaptive", "random", ">= 0"),
        ("adaptive", "constant", ">= 0"),
        ("adaptive-qd", "adaptive", ">= -1"),
        ("swapped-qd", "swapped", ">= 0"),
    ):
        id = f"{better}_over_{worse}".replace("-", "_")
        text = f"linear top-1, {better} - {worse} (percentage points)"
        study.difference(id, text, (better, "linear top1"), (worse, "linear top1"), required=bound)


def _bootstrap(
    first: NDArray[np.float64], second: NDArray[np.float64], statistic: str, draws: int = 1000
) -> tuple[float, tuple[float, float] | None]:
    """Correlation of two columns, or the area under the curve of the first for the second, with its interval over items."""

    def value(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        if statistic == "auc":
            ranks, n = rankdata(a), int(b.sum())
            return float((ranks[b > 0].sum() - n * (n + 1) / 2) / (n * (len(b) - n)))
        if statistic == "spearman":
            return float(spearmanr(a, b).statistic)
        return float(np.corrcoef(a, b)[0, 1])

    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        index = rng.integers(len(first), size=len(first))
        if np.ptp(first[index]) > 0 and np.ptp(second[index]) > 0:
            found.append(value(first[index], second[index]))
    low, high = np.percentile(found, [2.5, 97.5])
    return value(first, second), (float(low), float(high))


def _over_images(study: Study, judge: _world.Judge, target: scenes.Scenes, work: Path, level: str) -> None:
    """Claims about single images, with intervals over them."""
    if level == "quick":
        return
    ratios = np.asarray([row.ratio for row in Plan.read(work / "adaptive-plan").rows])
    estimate, ci95 = _bootstrap(ratios, target.ratio[: len(ratios)], "spearman", 300)
    method = "rank correlation over images, bootstrap"
    text = "rank correlation of the foreground ratio with the true one"
    study.claim("foreground", text, "difference", estimate, ci95, method=method, required=">= 0.5")
    shown, agreed = _world.level_study(judge, target, (0, 200, 400, 600, 800), 100 if level == "default" else 300)
    if np.ptp(agreed) > 0:
        estimate, ci95 = _bootstrap(shown, agreed, "pearson")
        text = "correlation of the noise level (0 to 800) with agreement of the view's digit"
        study.claim("levels", text, "difference", estimate, ci95, method="over images, bootstrap", required="<= -0.2")
    if (work / "swapped.json").exists():
        known = json.loads((work / "swapped.json").read_text(encoding="utf-8"))
        keys = list(known["quality"])
        w = pair_weights(torch.tensor([known["quality"][key] for key in keys], dtype=torch.float64), GAMMA).numpy()
        clean = 1.0 - np.isin(keys, known["swapped"]).astype(float)
        estimate, ci95 = _bootstrap(w, clean, "auc")
        assert ci95 is not None
        text = "area under the curve of the weight, clean against swapped views, - 0.5"
        shifted = (ci95[0] - 0.5, ci95[1] - 0.5)
        study.claim(
            "detects", text, "difference", estimate - 0.5, shifted, method="over pairs, bootstrap", required=">= 0.25"
        )


def _note(study: Study, judge: _world.Judge, target: scenes.Scenes, work: Path) -> None:
    data = _measures.read(world_of(str(work)), scenes.SIZE)
    own = [tiny.embed_all(judge.pipe, images) for images, _ in (data.train, data.test)]
    external = linear_sweep(own[0], data.train[1], own[1], data.test[1], rates=8, epochs=20).top1
    torch.manual_seed(0)
    fresh = build_backbone(BACKBONE)
    features = [extract(fresh, images, IMAGENET) for images, _ in (data.train, data.test)]
    random = linear_sweep(features[0], data.train[1], features[1], data.test[1], rates=8, epochs=20).top1
    study.note(
        f"The external encoder, which has seen captions with digits, reaches {external:.1f} % by its own linear probe; a"
        f" network with random weights {random:.1f} %."
    )
    rows = [row for row in json_lines(work / "adaptive-merged/manifest.jsonl") if row.get("status") == "ok"]
    mean = sum(row["level"] for row in rows) / max(1, len(rows))
    study.note(f"{len(rows)} adaptive views of {len(target.images)} pictures, mean noise level {mean:.0f} of 999.")
    if (study.run.path / "gates.json").exists():
        gates = json.loads((study.run.path / "gates.json").read_text(encoding="utf-8"))
        study.note("The generator: " + ", ".join(f"{name} {value:.2f}" for name, value in gates.items()) + ".")


def draw(study: Study, work: Path, arms: tuple[str, ...]) -> None:
    """Draw the arms, and the best and worst pairs."""
    values = {arm: study.values((arm, "linear top1")).tolist() for arm in arms}
    arm_chart(study.run.figure("arms"), values, xlabel="linear top-1 on test scenes (%)")
    views = read_manifest(work / "adaptive-merged")
    pictures = world_of(str(work)).train
    number = {key: i for i, key in enumerate(pictures.keys)}
    order = sorted(views.quality, key=lambda key: -views.quality[key])
    if not order:
        raise UserError("no view was scored")
    rows, titles = [], []
    for name, keys in (("best", order[:12]), ("worst", order[-12:])):
        rows += [[pictures.read(number[key]) for key in keys], [read_image(views.files[key][0]) for key in keys]]
        titles += [f"{name}: picture", "its view"]
    image_grid(study.run.figure("sheet"), rows, row_titles=titles, cell=0.7)
