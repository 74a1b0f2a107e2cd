"""`handmstn search`: who in the gallery could this hand be, or is it none of them; with evidence sheets."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from handmstn.commands._files import embedded, read, trained, wanted
from handmstn.commands._pictures import percent
from handmstn.commands._ratios import calibration_of
from handmstn.config import SearchSettings
from handmstn.evidence import Probe, evidence_sheet, verdict
from handmstn.gallery import MILLION, Candidate, Gallery
from handmstn.models import head_of
from handmstn.naming import numbered
from handmstn.recognizer import HandMSTN
from handmstn.records import letterboxed
from tenfold import UserError, readers
from tenfold.cli import Invocation
from tenfold.errors import needs
from tenfold.modules import evaluating
from tenfold.terminal import table

GUESSED = "points and shares seen, by the model"
"""What a sheet says of numbers that nobody gave."""


def run(settings: SearchSettings, invocation: Invocation) -> None:
    """Search, print and write ``candidates.json`` and ``sheets/``."""
    model, card, _ = trained(settings.run)
    head = head_of(model, card)
    gallery = Gallery.open(settings.gallery, head)
    if not len(gallery):
        raise UserError(f"--gallery {settings.gallery}: nobody is enrolled")
    index = settings.index
    if index == "auto":
        index = "exact" if len(gallery) <= MILLION else "faiss-flat"
    if index != "exact":
        needs("faiss", "faiss", "handmstn", why=f"--index {index}")
    calibration = None if settings.calibration is None else calibration_of(settings.calibration, str(head["model"]))
    hands = wanted(settings.reading, read(settings, card, model), settings.split, "probe")
    threshold, tries = settings.threshold, 0
    if threshold is None:
        threshold, tries = gallery.threshold(settings.fpir)
    found = embedded(settings, model, hands)
    e = found.enrolled
    digests = None if settings.itself else e.digests
    answers = gallery.search(e.parts, e.visibility, settings.top, sides=e.sides, digests=digests, index=index)
    lines, rows = [], []
    for number, candidates in enumerate(answers):
        kept = candidates if found.shown[number] else []
        ratios = None
        if calibration is not None and kept:
            common = np.asarray([c.common for c in kept])
            ratios = calibration.llr(np.asarray([c.score for c in kept]), common).tolist()
        assert found.hands.images is not None
        notes = str(found.hands.guessed[number])
        image, points = found.hands.images[number].numpy(), found.points[number]
        told = "; ".join(note for note in (notes, GUESSED if model.aligner is not None else "") if note)
        probe = Probe(str(hands.names[number]), image, points, e.visibility[number], told, str(found.reasons[number]))
        answer = verdict(probe, kept, threshold)
        lines.append(
            {
                "picture": probe.name,
                "answer": answer,
                "not assessable": not found.shown[number],
                "unlike": None if np.isnan(found.unlike[number]) else round(float(found.unlike[number]), 3),
                "visibility": {p.name: round(float(v), 3) for p, v in zip(model.parts, probe.visibility, strict=True)},
                "guessed": notes,
                "candidates": [
                    {
                        "person": c.person,
                        "side": c.side,
                        "score": round(c.score, 5),
                        "named": c.score >= threshold,
                        "llr": None if ratios is None else round(ratios[k], 3),
                        "common": round(c.common, 3),
                        "parts": {
                            p.name: None if np.isnan(v) else round(v, 4)
                            for p, v in zip(model.parts, c.parts, strict=True)
                        },
                        "picture": c.name,
                        "guessed": c.guessed,
                    }
                    for k, c in enumerate(kept)
                ],
            }
        )
        best = kept[0] if kept else None
        rows.append([probe.name, answer, "-" if best is None else percent(best.common)])
        if number < settings.sheets:
            pictures = [_enrolled_picture(gallery, c, model, int(card["size"])) for c in kept]
            sheet = evidence_sheet(probe, kept, model.parts, threshold=threshold, llr=ratios, pictures=pictures)
            name = f"sheets/{number + 1:04d}"
            with invocation.folder.replacing(f"{name}.png") as path:
                sheet.png.save(path, "PNG")
            invocation.folder.write_text(f"{name}.html", sheet.html)
    body = {"gallery": settings.gallery, "enrolled": len(gallery), "threshold": threshold, "fpir": settings.fpir}
    more: dict[str, object] = {"guessed by the model": [] if model.aligner is None else ["points", "visibility"]}
    more |= {"threshold from": f"{tries} enrolled hands" if tries else "--threshold", "index": index}
    if index != "exact":
        more["recall"] = gallery.recall(e.parts, e.visibility, index, top=settings.top)
    invocation.folder.write_json("candidates.json", {**body, **more, "answers": lines})
    gallery.log_search(hands.names.tolist(), [str(line["answer"]) for line in lines])
    sys.stdout.write(table(["picture", "answer", "common parts"], rows[:40]) + "\n")
    if index != "exact":
        sys.stdout.write(
            f"searched by {index}: {percent(float(str(more['recall'])))} of the exact candidates are found\n"
        )
    people = len(set(gallery.enrolled.persons.tolist()))
    if tries and people < 1 / settings.fpir:
        sys.stdout.write(
            f"note: people enrolled: {people}, too few to set a threshold for --fpir {settings.fpir:g}; it is a rough one\n"
        )
    shown = min(settings.sheets, len(lines))
    where = f"; evidence sheets in {Path(invocation.folder.path) / 'sheets'}" if shown else ""
    sys.stdout.write(f"{numbered(len(lines))} against {len(gallery)} enrolled, threshold {threshold:.3f}{where}\n")


def _enrolled_picture(
    gallery: Gallery, candidate: Candidate, model: HandMSTN, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
    """The enrolled picture with its points; None where the file is gone, is another one now, or points were given."""
    path = Path(candidate.name)
    if model.aligner is None or not path.is_absolute() or not path.is_file():
        return None
    try:
        image = letterboxed(readers.read_image(path), size)
    except UserError:
        return None
    if candidate.side == "left":
        image = np.ascontiguousarray(image[:, :, ::-1])
    if hashlib.sha256(image.tobytes()).hexdigest()[:32] != gallery.enrolled.digests[candidate.row]:
        return None
    with evaluating(model):
        found = model.locate(torch.from_numpy(image)[None].float() / 255, None, None)
    return image, found.points[0].numpy()
