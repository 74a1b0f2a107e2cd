"""Evidence sheets: the probe with its points, the aligned crops, the candidates part by part; as PNG and as one HTML page."""

import base64
import dataclasses
import html
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handmstn.calibration import in_words
from handmstn.gallery import Candidate
from handmstn.parts import PartSpec
from handmstn.warping import ControlPointGrid

NOT_PROVEN = (
    "A score says how alike two pictures are to a trained network. It is no probability that two hands are the same, and no"
    " proof of identity. Pictures of poor quality, covered parts, other cameras and people unlike those trained on make it"
    " less reliable. A likelihood ratio holds for the kind of pictures that it was calibrated on, and says nothing of prior"
    " odds. A qualified examiner has to compare the pictures themselves."
)
"""What every sheet says."""
_CELL = 96


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a sheet shows of the picture that was searched for.

    Attributes:
        name: its name.
        image: (3, S, S) uint8, as it was shown to the networks.
        points: control points, (K, 2).
        visibility: share of each part that is seen, (P,).
        notes: what was guessed of it, in words.
        reason: why it is not assessable, in words; empty where it is.
    """

    name: str
    image: NDArray[np.uint8]
    points: NDArray[np.float32]
    visibility: NDArray[np.float32]
    notes: str = ""
    reason: str = ""


def crops_of(
    image: NDArray[np.uint8], points: NDArray[np.float32], parts: Sequence[PartSpec]
) -> list[NDArray[np.uint8]]:
    """The aligned crops of a picture, (h, w, 3) each."""
    grid = ControlPointGrid(parts)
    spots = torch.from_numpy(np.asarray(points, np.float32))[None]
    crops = grid.crops(torch.from_numpy(image.copy()).float()[None] / 255, grid(spots))
    return [(255 * c[0].clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy() for c in crops]


def overlay(image: NDArray[np.uint8], points: NDArray[np.float32], parts: Sequence[PartSpec], size: int = 384) -> Any:
    """The picture with its control points and the outline of each part, one color per part, as a PIL image."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((size, size))
    draw = ImageDraw.Draw(picture)
    start = 0
    for number, part in enumerate(parts):
        color = _COLORS[number % len(_COLORS)]
        spots = [
            ((x + 1) / 2 * (size - 1), (y + 1) / 2 * (size - 1)) for x, y in points[start : start + part.count].tolist()
        ]
        start += part.count
        known = [math.isfinite(x) and math.isfinite(y) for x, y in spots]
        if all(known):
            around = outline(part)
            draw.line([spots[i] for i in (*around, around[0])], fill=color, width=2)
        for (x, y), told in zip(spots, known, strict=True):
            if told:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color, outline="white")
    return picture


def outline(part: PartSpec) -> list[int]:
    """Numbers of the control points around the edge of a part's template, in their order; all of them where it has no area."""
    template = np.asarray(part.points, np.float64)
    away = template - template.mean(0)
    if np.linalg.matrix_rank(away, 1e-6) < 2:
        return list(range(len(template)))
    from scipy.spatial import ConvexHull

    sides = ConvexHull(template).equations  # normal and offset of each side
    edge = np.flatnonzero((np.abs(template @ sides[:, :2].T + sides[:, 2]) < 1e-6).any(1))
    order: list[int] = edge[np.argsort(np.arctan2(away[edge, 1], away[edge, 0]), kind="stable")].tolist()
    return order


_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """An evidence sheet.

    Attributes:
        png: the picture, as a PIL image.
        html: one self-contained page; nothing is fetched from elsewhere.
    """

    png: Any
    html: str


def evidence_sheet(
    probe: Probe,
    candidates: Sequence[Candidate],
    parts: Sequence[PartSpec],
    *,
    threshold: float | None = None,
    llr: Sequence[float] | None = None,
    pictures: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]] | None] = (),
) -> Sheet:
    """Make a sheet.

    Args:
        probe: what was searched for.
        candidates: the answer, best first.
        parts: parts of the model.
        threshold: score from which a candidate is named; None where none was set.
        llr: natural logarithm of each candidate's likelihood ratio; None without a calibration.
        pictures: picture and control points of each candidate, where they are at hand.
    """
    shown = list(pictures) + [None] * (len(candidates) - len(pictures))
    png = _drawn(probe, candidates, parts, threshold, llr, shown)
    return Sheet(png, _page(probe, candidates, parts, threshold, llr, shown))


def verdict(probe: Probe, candidates: Sequence[Candidate], threshold: float | None) -> str:
    """The answer in one line."""
    if probe.reason:
        return f"not assessable: {probe.reason}"
    if not candidates:
        return "no candidate can be compared"
    best = candidates[0]
    if threshold is None:
        return f"best candidate: {best.person}, score {best.score:.3f}; no threshold was set"
    if best.score < threshold:
        return f"none of them: the best score {best.score:.4f} is below the threshold {threshold:.4f}"
    return f"candidate: {best.person}, score {best.score:.4f} (threshold {threshold:.4f})"


def _number(value: float) -> str:
    return "hidden" if math.isnan(value) else f"{value:.2f}"


def _ratio(llr: float) -> str:
    power = round(llr / math.log(10), 1) + 0.0  # no -0.0
    return f"10^{power:.1f} ({in_words(llr)})"


def _drawn(
    probe: Probe,
    candidates: Sequence[Candidate],
    parts: Sequence[PartSpec],
    threshold: float | None,
    llr: Sequence[float] | None,
    pictures: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]] | None],
) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    columns = min(len(parts), 8)
    width = 400 + (columns + 1) * (_CELL + 8) + 40
    lines = textwrap.wrap(NOT_PROVEN, (width - 32) // 6)
    height = 470 + len(candidates) * (_CELL + 44) + 16 * len(lines) + 16
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)

    def row(x: int, y: int, image: NDArray[np.uint8], points: NDArray[np.float32], below: Sequence[str]) -> None:
        for number, crop in enumerate(crops_of(image, points, parts)[:columns]):
            scale = min(_CELL / crop.shape[0], _CELL / crop.shape[1])
            size = max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale))
            left = x + number * (_CELL + 8)
            page.paste(Image.fromarray(crop).resize(size), (left, y))
            draw.text((left, y + _CELL + 2), parts[number].name[:14], "black", small)
            draw.text((left, y + _CELL + 16), below[number], _COLORS[0], small)

    draw.text((16, 10), f"probe: {probe.name}", "black", font)
    draw.text((16, 32), verdict(probe, candidates, threshold), "#D55E00", font)
    if probe.notes:
        draw.text((16, 54), f"guessed: {probe.notes}", "#555555", small)
    page.paste(overlay(probe.image, probe.points, parts, 360), (16, 80))
    seen = [f"{100 * v:.0f} % seen" for v in probe.visibility.tolist()]
    row(400, 80, probe.image, probe.points, seen)
    y = 80 + 380
    for number, candidate in enumerate(candidates):
        side = "" if candidate.side == "unknown" else f", {candidate.side} hand"
        draw.text((16, y), f"{number + 1}. {candidate.person}{side}", "black", font)
        draw.text((16, y + 20), f"score {candidate.score:.3f}", "black", small)
        draw.text((16, y + 36), f"common parts {100 * candidate.common:.0f} %", "black", small)
        if llr is not None:
            draw.text((16, y + 52), f"LR {_ratio(llr[number])}", "black", small)
        draw.text((16, y + 68), candidate.name[-46:], "#555555", small)
        if candidate.guessed:
            draw.text((16, y + 84), f"guessed: {candidate.guessed}", "#555555", small)
        found = pictures[number]
        texts = [_number(value) for value in candidate.parts]
        if found is not None:
            row(400, y, found[0], found[1], texts)
        else:
            draw.text((400, y), "picture not at hand; scores by part:", "#555555", small)
            for place, text in enumerate(texts[:columns]):
                left = 400 + place * (_CELL + 8)
                draw.text((left, y + 20), parts[place].name[:14], "black", small)
                draw.text((left, y + 36), text, _COLORS[0], small)
        y += _CELL + 44
    for line in lines:
        draw.text((16, y), line, "#555555", small)
        y += 16
    return page


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _page(
    probe: Probe,
    candidates: Sequence[Candidate],
    parts: Sequence[PartSpec],
    threshold: float | None,
    llr: Sequence[float] | None,
    pictures: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]] | None],
) -> str:
    from PIL import Image

    def crops(image: NDArray[np.uint8], points: NDArray[np.float32], texts: Sequence[str]) -> str:
        cells = zip(parts, crops_of(image, points, parts), texts, strict=True)
        made = (
            f"<td>{_png(Image.fromarray(c))}<br>{html.escape(p.name)}<br><b>{html.escape(t)}</b></td>"
            for p, c, t in cells
        )
        return "".join(made)

    seen = [f"{100 * v:.0f} % seen" for v in probe.visibility.tolist()]
    body = [
        f"<h1>{html.escape(verdict(probe, candidates, threshold))}</h1>",
        f"<p>Probe: {html.escape(probe.name)}</p>",
        f"<p>Guessed: {html.escape(probe.notes)}</p>" if probe.notes else "",
        f'<div class="probe">{_png(overlay(probe.image, probe.points, parts, 360))}</div>',
        f"<table><tr>{crops(probe.image, probe.points, seen)}</tr></table>",
        "<h2>Candidates</h2>" if candidates else "",
    ]
    for number, candidate in enumerate(candidates):
        side = "" if candidate.side == "unknown" else f", {candidate.side} hand"
        ratio = (
            f"; likelihood ratio {_ratio(llr[number])}" if llr is not None else "; no likelihood ratio: not calibrated"
        )
        guess = f"; guessed: {candidate.guessed}" if candidate.guessed else ""
        text = f"score {candidate.score:.3f}; common parts {100 * candidate.common:.0f} %{ratio}{guess}"
        body.append(f"<h3>{number + 1}. {html.escape(candidate.person + side)}</h3><p>{html.escape(text)}</p>")
        body.append(f'<p class="file">{html.escape(candidate.name)}</p>')
        found, texts = pictures[number], [_number(value) for value in candidate.parts]
        if found is not None:
            body.append(f"<table><tr>{crops(found[0], found[1], texts)}</tr></table>")
        else:
            cells = "".join(f"<td>{html.escape(p.name)}<br><b>{t}</b></td>" for p, t in zip(parts, texts, strict=True))
            body.append(f"<p>The picture is not at hand; scores by part:</p><table><tr>{cells}</tr></table>")
    body.append(f"<h2>What this does not prove</h2><p>{html.escape(NOT_PROVEN)}</p>")
    style = (
        "body{font:15px sans-serif;max-width:1100px;margin:24px auto;padding:0 16px;color:#222}h1{font-size:22px;color:#b24a00}"
        "td{padding:4px 8px;vertical-align:bottom;text-align:center;font-size:12px}td img{height:112px}.file{color:#666}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evidence: {html.escape(probe.name)}</title>'
        f"<style>{style}</style></head><body>{''.join(body)}</body></html>\n"
    )
