"""A network on labeled scenes: counts at the labels' own size, by distance, and from above."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from freespace_uda.birdseye import BirdsEye, to_birdseye
from freespace_uda.metrics import IGNORED, FreespaceMeter, scores_of
from freespace_uda.predictor import Prediction, Predictor
from freespace_uda.scenes import Item, Scenes
from tenfold import UserError

Missing = Literal["depth", "rgb"]


def predictions(
    predictor: Predictor, scenes: Scenes, batch_size: int = 4, missing: Missing | None = None
) -> Iterator[tuple[int, Item, Prediction]]:
    """Number, item and prediction of every scene; scenes of one size are computed together.

    Args:
        predictor: the network.
        scenes: the scenes.
        batch_size: pictures at once.
        missing: modality that is taken away.
    """
    for start in range(0, len(scenes), batch_size):
        rows = list(range(start, min(start + batch_size, len(scenes))))
        items = [scenes.item(i) for i in rows]
        shown = [_without(item, missing) for item in items]
        yield from zip(rows, items, predictor.items(shown), strict=True)


def _without(item: Item, missing: Missing | None) -> Item:
    if missing == "depth":
        return dataclasses.replace(item, depth=None)
    return dataclasses.replace(item, rgb=None) if missing == "rgb" else item


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Counts of a data set.

    Attributes:
        perspective: in the camera's view.
        above: in the bird's-eye view; None where it was not asked for.
        categories: in the camera's view, by category of the scenes; empty where there is one alone.
    """

    perspective: FreespaceMeter
    above: FreespaceMeter | None
    categories: dict[str, FreespaceMeter]


def evaluate(
    predictor: Predictor, scenes: Scenes, *, batch_size: int = 4, missing: Missing | None = None, above: bool = False
) -> Evaluated:
    """Count on labeled scenes.

    Raises:
        UserError: a scene has no label, or no road transform where the bird's-eye view is asked for.
    """
    meter, view = FreespaceMeter(), BirdsEye()
    over = FreespaceMeter() if above else None
    groups: dict[str, FreespaceMeter] = {}
    for index, item, found in predictions(predictor, scenes, batch_size, missing):
        label = scenes.label(index)
        if label.shape != found.probability.shape:
            raise UserError(
                f"{scenes.name(index)}: label of {label.shape[1]} x {label.shape[0]} pixels, picture of"
                f" {found.probability.shape[1]} x {found.probability.shape[0]}"
            )
        meter.update(found.probability, label, item.depth)
        category = scenes.records[index].category
        groups.setdefault(category, FreespaceMeter()).update(found.probability, label, item.depth)
        if over is not None:
            road = scenes.road(index)
            if road is None:
                raise UserError(f"--bev: {scenes.name(index)} has no road transform (Tr_cam_to_road of KITTI's calib)")
            scores = to_birdseye(scores_of(found.probability), road, view)
            over.update(scores, to_birdseye(label.astype(np.uint8), road, view, outside=IGNORED))
    return Evaluated(meter, over, groups if len(groups) > 1 else {})
