"""`visctrl compare`: a grid of settings, or published methods, on the same pairs of pictures, with paired intervals."""

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tenfold import UserError, executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.figures import arm_chart, image_grid
from tenfold.files import replacing
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims, table, track
from visctrl import metrics
from visctrl.commands import _pairs, _work
from visctrl.commands._encoder import NO_ENCODER, Features, encoder_of, subject
from visctrl.config import CompareSettings, VisCtrlConfig
from visctrl.data import Pair, color_profile, load_model, read_picture, write_picture
from visctrl.engine import VisCtrl
from visctrl.masks import Picture, to_images
from visctrl.outcome import EditOutput

SHOWN = 12
"""Pairs on a contact sheet."""


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Edit every pair under all arms, decide, draw, report."""
    pairs, arms, folder = _pairs.listed(settings), settings.configs, invocation.folder
    _pairs.check(pairs)
    choose_device(settings.device)
    encoder_of(settings.encoder, settings.encoder_weights, settings.device)
    for name, config in arms.items():
        if config.mode == "subject" and any(p.target_mask is None and p.reference_mask is None for p in pairs):
            raise UserError(f"arm {name}: mode subject needs a mask of each target, of its reference, or of both")
    study = Study(folder, data=f"{len(pairs)} pairs of pictures, the user's own", seeds=range(len(pairs)), unit="pair")
    study.note(
        f"The numbers under seeds are those of the pairs: {', '.join(f'{i} {p.name}' for i, p in enumerate(pairs))}."
    )
    for pair in pairs:
        for arm in arms:
            folder.own(place(settings, pair, arm), result=False)  # they are written where pairs are measured
    with executors.make(settings.executor) as pool:
        show = partial(track, description="pairs", quiet=invocation.quiet)
        study.over_seeds(partial(measure, settings, str(folder.path)), pool, show)
    first = next(iter(study.arms.values()))
    main = "fidelity" if "fidelity" in first else "color"
    _decide(study, list(arms), main, grid=bool(settings.grid.given))
    _draw(folder, settings, pairs, list(arms))
    captions = {"contact": "Targets, references, and what each arm made of them."}
    if len(arms) > 1:
        arm_chart(folder.figure("arms"), {arm: study.values((arm, main)).tolist() for arm in arms}, xlabel=main)
        captions["arms"] = f"{main} of each arm: mean over the pairs with its 95 % interval, a faint dot for each pair."
    summary = study.finish()
    write_report(folder, "visctrl compare", captions)
    sys.stdout.write(table(*arm_rows(study, list(arms), list(first))) + "\n\n")
    if main == "color":
        sys.stdout.write(NO_ENCODER)
    return show_claims(summary, strict=invocation.strict)


_LOADED: dict[str, tuple[VisCtrl, Features | None]] = {}


def _loaded(settings: CompareSettings) -> tuple[VisCtrl, Features | None]:
    """Model and encoder, once per process."""
    key = repr(settings)
    if key not in _LOADED:
        _LOADED.clear()
        encoder = encoder_of(settings.encoder, settings.encoder_weights, settings.device)
        _LOADED[key] = VisCtrl(load_model(settings), settings.control), encoder
    return _LOADED[key]


def measure(settings: CompareSettings, work: str, number: int) -> dict[str, dict[str, float]]:
    """Edit one pair under all arms, write the pictures, and measure them."""
    pairs = _pairs.listed(settings)
    pair = pairs[number]
    assert pair.reference is not None
    engine, encoder = _loaded(settings)
    target = _work.prepare(engine, pair.target, pair.target_mask, settings.size, False, "--target_mask")
    source = _work.prepare(
        engine, pair.reference, pair.reference_mask, settings.size, False, "--reference_mask", beside=pair.target
    )
    masked = all(p.target_mask is not None for p in pairs)
    found, pictures = {}, {}
    with _work.named(str(pair.target)):
        for arm, out in _edits(engine, settings, pair, target, source):
            locked = settings.configs[arm].lock
            picture = _work.finished_picture(out.images, target, settings.feather, locked)
            values = _values(picture, target, source, encoder, masked)
            found[arm] = values | {"round": float((out.rounds or [0])[0]), "rows": float(out.rows)}
            pictures[arm] = picture
    for arm, picture in pictures.items():  # once all arms are done, so that a command that is refused leaves none
        with replacing(Path(work) / place(settings, pair, arm)) as temporary:
            note = f"edited with visctrl from {pair.reference.name}"
            write_picture(temporary, picture, note, color_profile(pair.target))
    return found


def _edits(
    engine: VisCtrl, settings: CompareSettings, pair: Pair, target: _work.Prepared, source: _work.Prepared
) -> Iterator[tuple[str, EditOutput]]:
    """Results of all arms; in a grid, what they share is computed once."""
    reference = _work.reference_of(engine, source, pair.reference_prompt)
    told = engine.conditions(pair.target_prompt, settings.negative_prompt)
    arms: dict[str, VisCtrlConfig] = settings.configs
    if settings.grid.given:
        engine.config = settings.control
        results = engine.sweep(target.image, reference, settings.grid.given, mask=target.image_mask, conditions=told)
        for arm, (config, out) in zip(arms, results, strict=True):
            assert config == arms[arm]
            yield arm, out
        return
    for arm, config in arms.items():
        engine.config = config
        try:
            out = engine.edit(target.image, reference, mask=target.image_mask, conditions=told)
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from error
        yield arm, out


def _values(
    edited: Picture, target: _work.Prepared, source: _work.Prepared, encoder: Features | None, masked: bool
) -> dict[str, float]:
    """Measures of one result; the same ones for every pair."""
    own, reference = target.mask, source.mask
    x, before, other = (to_images([p]) for p in (edited, target.photo, source.photo))
    m, n = (
        torch.ones(1, *images.shape[-2:]) if mask is None else torch.from_numpy(mask).float()[None]
        for mask, images in ((own, before), (reference, other))
    )
    values = {
        "color": float(metrics.toward(x, before, m, metrics.mean_color(other, n))),
        "layout": float(metrics.structure(x, before)),
    }
    if encoder is not None:
        values = {
            "fidelity": encoder.fidelity(subject(edited, own), subject(source.photo, reference)),
            "structure": encoder.structure(target.photo, edited),
            **values,
        }
    if masked:
        assert own is not None
        values["background PSNR"] = min(100.0, float(metrics.psnr(x, before, (m == 0).float())))
    return values


def _decide(study: Study, arms: list[str], main: str, *, grid: bool) -> None:
    """Claim differences to the first arm, paired over the pairs; a grid is for looking at, and claims nothing."""
    if not grid:
        study.against(arms[0], arms, main)


def place(settings: CompareSettings, pair: Pair, arm: str) -> str:
    """File of a result, below the run's folder."""
    number, name = list(settings.configs).index(arm), re.sub(r"[^A-Za-z0-9.-]+", "-", arm).strip("-")
    return f"pictures/{pair.name}/{number:02}-{name}.png"


def _draw(folder: Run, settings: CompareSettings, pairs: list[Pair], arms: list[str]) -> None:
    """Draw the contact sheet: pairs by arms; for a grid of several settings one sheet per pair, its first setting in rows."""

    def pictures(pair: Pair, some: list[str]) -> list[Picture]:
        return [read_picture(folder.path / place(settings, pair, arm)) for arm in some]

    given = settings.grid.given
    heads = [[read_picture(p.target), read_picture(p.reference)] for p in pairs[:SHOWN] if p.reference is not None]
    if len(given) < 2:
        rows = [head + pictures(pair, arms) for head, pair in zip(heads, pairs, strict=False)]
        names = [pair.name for pair in pairs[:SHOWN]]
        for path in (folder.own("grid.png"), folder.figure("contact")):
            image_grid(path, rows, row_titles=names, column_titles=["target", "reference", *arms], cell=1.6)
        return
    name, values = next(iter(given.items()))
    across = len(arms) // len(values)
    lines = [arms[i : i + across] for i in range(0, len(arms), across)]
    columns = [arm.split(", ", 1)[1] for arm in lines[0]]
    for number, (head, pair) in enumerate(zip(heads, pairs, strict=False)):
        rows = [head, *(pictures(pair, line) for line in lines)]
        titles = [["target", "reference"], *(columns for _ in lines)]
        sides = ["", *(f"{name} {value}" for value in values)]
        paths = [folder.figure(f"contact-{pair.name}" if number else "contact")]
        for path in paths if number else [*paths, folder.own("grid.png")]:
            image_grid(path, rows, row_titles=sides, titles=titles, cell=1.6)
