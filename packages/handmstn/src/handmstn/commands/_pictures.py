"""Pictures of models, searches and evaluations."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from handmstn.evidence import crops_of, overlay
from handmstn.metrics import Identification, Verification, bootstrap
from handmstn.models import given
from handmstn.parts import PartSpec
from handmstn.recognizer import HandMSTN
from handmstn.records import Hands
from tenfold.figures import Curve, Panel, image_grid, line_chart
from tenfold.modules import evaluating
from tenfold.runs import Run, read_metrics

_NO_LOSSES = frozenset({"epoch", "lr", "loss", "outside", "palm weight"})
_SAID = {"point0": "points of level 0", "point": "points of level 1"}


def draw_course(folder: Run) -> bool:
    """The losses of every stage by step; False where nothing was trained."""
    panels = []
    titles = {"align": "stage A: aligner", "identity": "stage B: identities", "joint": "joint"}
    for stage, title in titles.items():
        path = folder.path / f"metrics.{stage}.csv"
        rows = read_metrics(path) if path.exists() else []
        names = [n for n in dict.fromkeys(n for _, r in rows for n in r) if n not in _NO_LOSSES]
        curves = {}
        for name in names:
            points = [(step, row[name]) for step, row in rows if name in row and row[name] > 0]
            if points:
                curves[_SAID.get(name, name)] = Curve([p[0] for p in points], [p[1] for p in points])
        if curves:
            panels.append(Panel(title, "step", "loss", curves, yscale="log"))
    if panels:
        line_chart(folder.figure("course"), panels)
    return bool(panels)


def pasted(crops: Sequence[NDArray[np.uint8]], height: int = 96) -> NDArray[np.uint8]:
    """Crops side by side, each of the same height."""
    from PIL import Image

    made = []
    for crop in crops:
        width = max(1, round(crop.shape[1] * height / crop.shape[0]))
        made += [np.asarray(Image.fromarray(crop).resize((width, height))), np.full((height, 4, 3), 255, np.uint8)]
    return np.concatenate(made[:-1], 1)


def draw_points(folder: Run, model: HandMSTN, hands: Hands, name: str, count: int = 6) -> None:
    """Pictures with the points that a model finds, and the crops."""
    chosen = hands.part(np.unique(np.linspace(0, len(hands) - 1, min(count, len(hands))).astype(np.int64)))
    assert chosen.images is not None
    with evaluating(model):
        points = given(model, chosen)
        images = chosen.images.float() / 255
        points = points if points is not None else model.locate(images, None, None).points
    rows = overlays(chosen.images.numpy(), points.numpy(), model.parts)
    image_grid(folder.figure(name), rows, column_titles=["picture", "points", "aligned crops"], cell=1.6)


def overlays(
    images: NDArray[np.uint8], points: NDArray[np.float32], parts: Sequence[PartSpec]
) -> list[list[NDArray[np.uint8]]]:
    """A row per picture: it, it with its points, its crops."""
    rows = []
    for image, spots in zip(images, points, strict=True):
        plain = np.ascontiguousarray(image.transpose(1, 2, 0))
        rows.append([plain, np.asarray(overlay(image, spots, parts, 256)), pasted(crops_of(image, spots, parts))])
    return rows


def draw_cmc(folder: Run, measured: Mapping[str, Identification], ranks: int = 20, name: str = "cmc") -> None:
    """CMC with a band of the bootstrap over persons."""
    curves = {}
    for label, one in measured.items():
        rank, _, persons = one.per_probe()
        longest = min(ranks, max(2, one.ranked), max(2, int(np.max(rank)) + 1, 10))
        ks = list(range(1, longest + 1))
        found = [bootstrap(rank <= k, persons, draws=300) for k in ks]
        mean, bands = [100 * f[0] for f in found], [f[1] for f in found]
        curves[label] = Curve(ks, mean, [100 * b[0] for b in bands], [100 * b[1] for b in bands])
    line_chart(folder.figure(name), [Panel("closed set", "rank", "probes found (%)", curves)])


def draw_det(folder: Run, measured: Mapping[str, Verification], name: str = "det") -> None:
    """False rejects against false accepts, both in logarithms; no pair at all is drawn as half a pair."""
    curves = {}
    for label, one in measured.items():
        _, far, frr = one.rates()
        count = one.counts.sum(1)
        far = np.maximum(far, 0.5 / count[0])
        frr = np.maximum(frr, 0.5 / count[1])
        bends = np.flatnonzero((np.diff(far) != 0) | (np.diff(frr) != 0))
        index = np.unique(np.concatenate([bends, bends + 1, [0, len(far) - 1]]))
        pick = index[np.unique(np.linspace(0, len(index) - 1, min(400, len(index))).astype(int))]
        curves[label] = Curve((100 * far[pick]).tolist(), (100 * frr[pick]).tolist())
    panel = Panel("detection error trade-off", "false accepts (%)", "false rejects (%)", curves, "log", "log")
    line_chart(folder.figure(name), [panel])


def percent(value: float) -> str:
    """``62.5 %``."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def as_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels in [0, 1]."""
    return torch.from_numpy(images).float() / 255
