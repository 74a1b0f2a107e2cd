"""`genview merge`: one manifest of all workers' rows, with the quality of each pair."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch

from genview.commands import _files
from genview.config import MergeSettings, PlanSettings
from genview.data import Pictures, load
from genview.encoders import Encoder
from genview.foreground import ForegroundModel
from genview.plans import Plan, line_of
from genview.quality import pair_quality
from genview.store import ViewStore
from tenfold import UserError, readers, runs
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.runs import Run
from tenfold.terminal import track


def run(settings: MergeSettings, invocation: Invocation) -> None:
    """Join, score, drop, write."""
    folder, device = invocation.folder, choose_device(settings.device)
    planned = runs.read(settings.plan, PlanSettings, package="genview", verb="plan").settings
    plan = Plan.read(settings.plan)
    store = ViewStore.open(settings.views)
    if store.head["plan"] != plan.id:
        raise UserError(f"--views {settings.views} was made by another plan ({store.head['plan']}, this is {plan.id})")
    there = {name: row for name, row in store.rows().items() if row.status != "ok" or store.is_there(row)}
    rows: list[dict[str, Any]] = []
    for row in plan.rows:
        found = there.get(row.name)
        known = {"key": row.key, "variation": row.variation, "ratio": row.ratio, "level": row.level}
        known |= {"guidance": row.guidance, "prompt": row.prompt, "seed": row.seed, "picture": row.picture}
        made = vars(found) if found is not None else {"status": "missing", "path": "", "error": row.error}
        rows.append({**made, **known})
    if not any(row["status"] == "ok" for row in rows):
        raise UserError(f"--views {settings.views}: no view of this plan is there yet")
    scored = 0
    if settings.quality_encoder is not None:
        assert settings.quality_foreground is not None
        model, encoder = _files.foreground_of(
            settings.quality_foreground,
            settings.quality_encoder,
            settings.quality_weights,
            device,
            option="--quality_encoder",
        )
        scored = score(
            rows, load(planned.data).train, store.path, model, encoder, settings.batch_size, invocation.quiet
        )
    dropped = drop(rows, settings.drop_worst)
    head = {"views": os.path.relpath(store.path.resolve(), folder.path.resolve()), **store.head}
    with folder.replacing("manifest.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        file.writelines(line_of(row) for row in rows)
    if settings.tars:
        write_tars(folder, rows, store.path, settings.tars)
    counts = {s: sum(row["status"] == s for row in rows) for s in ("ok", "error", "missing", "dropped")}
    folder.write_json("merged.json", {"counts": counts, "scored": scored, "head": head})
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    sys.stdout.write(
        f"{len(rows)} rows: {told}; {scored} scored; {dropped} dropped; {folder.path / 'manifest.jsonl'}\n"
    )


def score(
    rows: list[dict[str, Any]],
    pictures: Pictures,
    root: Path,
    model: ForegroundModel,
    encoder: Encoder,
    batch_size: int,
    quiet: bool,
) -> int:
    """Give each row that is there q, s_fg and s_bg of its picture and its view; returns how many.

    A view that cannot be read becomes a row with status error.
    """
    good = [row for row in rows if row["status"] == "ok"]
    scored = 0
    for part in track(list(_files.in_batches(len(good), batch_size)), "quality", quiet=quiet):
        chosen, sources, views = [], [], []
        for i in part:
            row = good[i]
            try:
                view = _files.as_tensor(readers.read_image(root / row["path"]))[None]
                source = _files.as_tensor(pictures.read(row["picture"]))[None]
            except UserError as error:
                row["status"], row["error"] = "error", str(error)
                continue
            chosen.append(row)
            sources.append(_files.square_of(source, encoder.size))
            views.append(_files.square_of(view, encoder.size))
        if chosen:
            a, b = (encoder(torch.cat(images)).tokens for images in (sources, views))
            found = pair_quality(a, b, model.direction, mean=model.mean)
            for row, *values in zip(chosen, found.q.tolist(), found.s_fg.tolist(), found.s_bg.tolist(), strict=True):
                row.update(dict(zip(("q", "s_fg", "s_bg"), values, strict=True)))
            scored += len(chosen)
    return scored


def drop(rows: list[dict[str, Any]], share: float) -> int:
    """Mark the worst share of the scored rows as dropped; returns how many."""
    known = sorted((row for row in rows if "q" in row), key=lambda row: row["q"])
    worst = known[: int(share * len(known))]
    for row in worst:
        row["status"] = "dropped"
    return len(worst)


def write_tars(run: Run, rows: list[dict[str, Any]], root: Path, each: int) -> None:
    """Write the pictures and their rows as WebDataset tars, numbered from 0."""
    good = [row for row in rows if row["status"] == "ok"]
    for number, start in enumerate(range(0, len(good), each)):
        with run.replacing(f"views-{number:05d}.tar") as temporary, tarfile.open(temporary, "w") as archive:
            for place, row in enumerate(good[start : start + each], start):
                path = root / row["path"]
                about = json.dumps(row).encode()
                for name, content in ((f"{place:09d}{path.suffix}", path.read_bytes()), (f"{place:09d}.json", about)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
