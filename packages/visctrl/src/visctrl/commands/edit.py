"""`visctrl edit`: a reference's subject into one picture or many."""

import json
import sys

from tenfold.cli import Invocation
from tenfold.distributed import rank, split, world_size
from tenfold.figures import image_grid
from tenfold.report import write_report
from tenfold.terminal import table, track
from visctrl.commands import _banks, _pairs, _work
from visctrl.config import EditSettings
from visctrl.data import Pair, color_profile, load_model, read_picture
from visctrl.engine import Reference, VisCtrl
from visctrl.masks import Picture
from visctrl.ranks import joined, wait_for_all


def run(settings: EditSettings, invocation: Invocation) -> None:
    """Edit each target, write its pictures, and print what happened."""
    with joined():
        _run(settings, invocation)


def _run(settings: EditSettings, invocation: Invocation) -> None:
    pairs = _pairs.listed(settings)
    _pairs.check(pairs)
    folder, config = invocation.folder, settings.chosen
    engine = VisCtrl(load_model(settings), config)
    references: dict[tuple[str, str | None, str, bytes | None], tuple[Reference, Picture]] = {}
    places = {pair.name: "" if len(pairs) == 1 else f"{pair.name}/" for pair in pairs}
    if world_size() > 1:
        rounds = [f"history/round_{number + 1}.png" for number in range(config.rounds)]
        names = ["edited.png", "provenance.png", "grid.png", "edit.json", *rounds]
        folder.share(f"{place}{name}" for place in places.values() for name in names)
        wait_for_all()
    mine = split(pairs, rank(), world_size())
    for pair in track(mine, "pictures", quiet=invocation.quiet or len(mine) <= 1):
        if not (folder.resumed and (folder.path / f"{places[pair.name]}edit.json").is_file()):
            _one(engine, settings, pair, places[pair.name], invocation, references)
    wait_for_all()
    if rank():
        return
    rows, grid = [], []
    for pair in pairs:
        about = json.loads((folder.path / f"{places[pair.name]}edit.json").read_text(encoding="utf-8"))
        verdict = about["verdict"] or "all rounds"
        if about["unsafe"]:
            verdict = "blanked by the model's safety checker"
        rows.append([pair.name, about["round"], about["rows"], f"{about['seconds']:.1f}", verdict])
        grid.append([read_picture(pair.target), read_picture(folder.path / f"{places[pair.name]}edited.png")])
    if len(pairs) > 1:
        image_grid(folder.own("grid.png"), grid, column_titles=["target", "edited"], row_titles=[p.name for p in pairs])
    image_grid(folder.figure("edited"), grid, column_titles=["target", "edited"])
    write_report(folder, "visctrl edit", {"edited": "Targets, and what became of them."})
    sys.stdout.write(table(["picture", "round", "rows of the network", "seconds", "ended by"], rows) + "\n")
    sys.stdout.write(f"{folder.path / 'grid.png'}\n")


def _one(
    engine: VisCtrl,
    settings: EditSettings,
    pair: Pair,
    place: str,
    invocation: Invocation,
    references: dict[tuple[str, str | None, str, bytes | None], tuple[Reference, Picture]],
) -> None:
    target = _work.prepare(engine, pair.target, pair.target_mask, settings.size, settings.crop, "--target_mask")
    key = (str(pair.reference or settings.run), pair.reference_mask, pair.reference_prompt, color_profile(pair.target))
    if key not in references:
        if pair.reference is None:
            assert settings.run is not None
            references[key] = _banks.read(engine, settings.run)
        else:
            found = _work.prepare(
                engine,
                pair.reference,
                pair.reference_mask,
                settings.size,
                settings.crop,
                "--reference_mask",
                beside=pair.target,
            )
            references[key] = (_work.reference_of(engine, found, pair.reference_prompt), found.shown)
    reference, shown = references[key]
    with _work.named(str(pair.target)):
        out = engine.edit(
            target.image,
            reference,
            mask=target.image_mask,
            prompt=pair.target_prompt,
            negative_prompt=settings.negative_prompt,
            history=True,
            provenance=True,
        )
    _work.write_edit(invocation.folder, place, pair, target, shown, out, settings, engine.config)
