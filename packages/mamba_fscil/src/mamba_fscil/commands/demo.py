"""`mamba-fscil demo`: letters of unseen typefaces and handwritten digits; what each method keeps, and what it learns.

For each seed and world a small backbone is trained once, with the selective projector, and the static one beside it; all
arms go on from there, in processes of one thread. Of the letters, whole typefaces are held out for testing.
"""

import sys
from collections.abc import Mapping
from concurrent.futures import as_completed
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mamba_fscil.commands import _pictures, _protocol
from mamba_fscil.config import (
    METHODS,
    BaseConfig,
    DataSettings,
    DemoSettings,
    Method,
    ProjectorConfig,
    ProtocolConfig,
    SessionConfig,
    TrainSettings,
)
from mamba_fscil.data import SessionData, load
from mamba_fscil.training.base import train_base
from mamba_fscil.training.protocol import save_base
from tenfold import executors
from tenfold.claims import Measured, Study, arm_rows, interval, mean_ci95
from tenfold.cli import Invocation
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track

DATA = (
    "glyphs are rendered: letters and digits in the DejaVu faces that matplotlib ships, three faces for testing only;"
    " digits are real: handwritten, shipped by scikit-learn"
)
GLYPHS = {"quick": (12, 3, 2), "default": (40, 5, 4), "full": (60, 5, 8)}
"""Base classes, new classes per session, and sessions, by level."""
EPOCHS = {
    "quick": {"glyphs": 1, "digits": 1},
    "default": {"glyphs": 8, "digits": 8},
    "full": {"glyphs": 8, "digits": 8},
}
STEPS: Mapping[str, int] = {"quick": 10}
"""Steps of a session where a level has fewer."""
TUNED: dict[Method, tuple[float, int]] = {
    "mlp": (0.1, 120),
    "frozen-mlp": (0.3, 60),
    "ssm": (0.3, 120),
    "dual": (0.3, 120),
    "mamba-fscil": (0.3, 120),
}
"""Rate and steps of each trained arm, of five the best in harmonic mean on seeds 100 and 101: ``benchmarks/tuning.py``."""
WORLDS = ("glyphs", "digits")


def settings_of(world: str, level: str, seed: int) -> TrainSettings:
    """The base session of one world and seed."""
    glyphs = world == "glyphs"
    base, way, sessions = GLYPHS[level] if glyphs else (6, 2, 2)
    return TrainSettings(
        data=world,
        learner="",
        backbone="fscil:conv",
        capacity=base + way * sessions,
        epochs=EPOCHS[level][world],
        seed=seed,
        log_every=50,
        device="cpu",
        protocol=ProtocolConfig(base=base, way=way, shot=5, sessions=sessions),
        projector=ProjectorConfig(width=112 if level == "full" and glyphs else 64, states=8, rank=8),
        base=BaseConfig(lr=0.1, mirror=False, padding=2 if glyphs else 1),
        reading=DataSettings(size=16) if glyphs else DataSettings(),
    )


def session_of(arm: Method, level: str, tuned: tuple[float, int] | None = None) -> SessionConfig:
    """The sessions of one arm."""
    lr, steps = tuned or TUNED.get(arm, (0.1, 100))
    return SessionConfig(lr=lr, steps=min(steps, STEPS.get(level, steps)), batch_size=32)


@lru_cache(maxsize=4)
def data_of(world: str, level: str, seed: int) -> SessionData:
    """The data of one world and seed."""
    own = settings_of(world, level, seed)
    return load(own.data, own.protocol, own.reading, seed=seed)


def learn_base(where: str, world: str, level: str, seed: int) -> None:
    """Train the base session of one world and seed, which all arms share, and write its file whole."""
    base = train_base(data_of(world, level, seed), settings_of(world, level, seed), beside=True, quiet=True)
    save_base(base, Path(where) / "bases" / f"{world}-seed-{seed}.safetensors")


def measure(where: str, world: str, level: str, arm: Method, seed: int) -> Measured:
    """One arm in one world on one seed."""
    path = Path(where) / "bases" / f"{world}-seed-{seed}.safetensors"
    look = 10 if arm in {"dual", "mamba-fscil"} else 0
    return _protocol.measure(
        path, data_of(world, level, seed), settings_of(world, level, seed), arm, session_of(arm, level),
        beside=True, look_every=look,
    )  # fmt: skip


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, measure, decide; write results, figures and ``report.html``."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, level = invocation.folder, settings.level
    seeds = settings.seeds_of({"quick": 1, "default": 2, "full": 5})
    study = Study(folder, level=level, data=DATA, seeds=seeds)
    where = str(folder.path.resolve())
    worlds = [(world, seed) for seed in seeds for world in WORLDS]
    paths = [folder.own(f"bases/{world}-seed-{seed}.safetensors") for world, seed in worlds]
    alone = settings.processes == 1 or level == "quick"  # a further process takes longer to start than all that work
    with executors.make(None if alone else f"processes:{settings.processes}") as pool:
        show: Any = partial(track, quiet=invocation.quiet)
        todo = [
            partial(learn_base, where, world, level, seed)
            for (world, seed), path in zip(worlds, paths, strict=True)
            if not path.exists()
        ]
        if pool is None:
            for task in show(todo, description="base sessions"):
                task()
        else:
            ends = as_completed([pool.submit(task) for task in todo])
            for end in show(ends, description="base sessions", total=len(todo)):
                end.result()
        arms = {f"{world} {arm}": partial(measure, where, world, level, arm) for world in WORLDS for arm in METHODS}
        study.over_arms(arms, pool, partial(show, description="arms"))
    _decide(study)
    _note(study)
    for world in WORLDS:
        named = {arm: _protocol.scores_of(study, f"{world} {arm}") for arm in METHODS}
        _pictures.draw_sessions(folder, named, f"sessions_{world}")
        _pictures.draw_shots(folder, data_of(world, level, seeds[0]), f"shots_{world}")
    traces = _protocol.traces_of(study, ["glyphs dual", "glyphs mamba-fscil"])
    _pictures.draw_mechanism(folder, {name.removeprefix("glyphs "): t for name, t in traces.items()})
    captions = {
        "sessions_glyphs": "Letters: accuracy on faces that were held out, over the sessions, mean over the seeds.",
        "mechanism": "Letters, last session, first seed: with the class-sensitive losses (mamba-fscil) the parameters of the"
        " scan differ between base and novel rows, and the gate is almost closed, more so on base rows than on novel ones;"
        " without them (dual) neither is so.",
        "sessions_digits": "Handwritten digits, likewise.",
        "shots_glyphs": "The pictures that the sessions learn from: letters.",
        "shots_digits": "The pictures that the sessions learn from: digits.",
    }
    summary = study.finish()
    write_report(folder, "mamba-fscil: new classes from five pictures", captions)
    for world in WORLDS:
        names = {f"{world} {arm}": arm for arm in METHODS}
        sys.stdout.write(f"\n{world}\n{table(*arm_rows(study, names, _protocol.METRICS, names))}\n")
    sys.stdout.write("\n")
    return show_claims(summary, strict=invocation.strict)


def _decide(study: Study) -> None:
    full, dual = "glyphs mamba-fscil", "glyphs dual"
    text = "|cos| of delta, B and C between base and novel rows, with the class-sensitive losses / without"
    study.ratio("cosine", text, (full, "cosine"), (dual, "cosine"), required="<= 1/3", main=True)
    text = "root mean square of the gate on base rows, with / without"
    study.ratio("gate_base", text, (full, "gate base"), (dual, "gate base"), required="<= 0.6")
    lifted = [
        dict(zip(("with", "without"), pair, strict=True))
        for pair in zip(
            (study.values((full, "gate novel")) / study.values((full, "gate base"))).tolist(),
            (study.values((dual, "gate novel")) / study.values((dual, "gate base"))).tolist(),
            strict=True,
        )
    ]
    for seed, pair in zip(study.seeds, lifted, strict=True):
        for name, value in pair.items():
            study.record(f"novel over base gate, {name}", {"ratio": value}, seed)
    text = "novel over base gate, with / without"
    study.ratio(
        "gate_novel", text, ("novel over base gate, with", "ratio"), ("novel over base gate, without", "ratio"),
        required=">= 1.2",
    )  # fmt: skip
    for arm in ("mlp", "ssm", "dual"):
        text = f"base accuracy at the last session, mamba-fscil - {arm} (percentage points)"
        study.difference(f"base_over_{arm}", text, (full, "base"), (f"glyphs {arm}", "base"), required=">= 0")
    text = "harmonic mean, mamba-fscil - mlp (percentage points)"
    study.difference("harmonic_over_mlp", text, (full, "harmonic"), ("glyphs mlp", "harmonic"), required=">= 0")


def _note(study: Study) -> None:
    for world in WORLDS:
        for arm in ("ncm", "teen"):
            told = []
            for metric in ("harmonic", "base", "average"):
                gap = study.values((f"{world} mamba-fscil", metric)) - study.values((f"{world} {arm}", metric))
                told.append(f"{metric} {interval(*mean_ci95(gap.tolist()))}")
            study.note(f"{world}, mamba-fscil - {arm}, which trains nothing (percentage points): {', '.join(told)}.")
        best = max(METHODS, key=lambda arm: float(study.values((f"{world} {arm}", "harmonic")).mean()))
        value = interval(*mean_ci95(study.values((f"{world} {best}", "harmonic")).tolist()))
        study.note(f"{world}: the best harmonic mean is that of {best}, {value}.")
