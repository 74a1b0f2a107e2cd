"""COCO's average precision from what each image contributes, so that it can be taken over a resample of the images."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Contributions = Mapping[str, NDArray[Any]]
"""What ``contributions`` returns."""
_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)


def contributions(annotations: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Which detections hit an object, and how many objects each image has, as pycocotools matches them.

    Args:
        annotations: content of a COCO file without crowds.
        detections: entries of COCO's results format (``image_id``, ``category_id``, ``bbox``, ``score``).

    Returns:
        ``image`` (D,), ``label`` (D,) and ``score`` (D,) of the detections by descending score, ``hit`` (D, 10) whether
        they match an object at IoU 0.5 to 0.95, and ``objects`` (images, categories), their numbers.

    Raises:
        ValueError: an object is a crowd, which counts for no image in particular.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if any(entry.get("iscrowd") for entry in annotations["annotations"]):
        raise ValueError("an object is a crowd")
    with contextlib.redirect_stdout(io.StringIO()):
        return _matched(COCO(), COCOeval, annotations, detections)


def _matched(truth: Any, evaluation: Any, annotations: Mapping[str, Any], detections: Sequence[Any]) -> dict[str, Any]:
    """The same, with what pycocotools prints."""
    truth.dataset = dict(annotations)
    truth.createIndex()
    images = {number: i for i, number in enumerate(sorted(truth.imgs))}
    labels = {number: i for i, number in enumerate(sorted(truth.cats))}
    objects = np.zeros((len(images), len(labels)), np.int64)
    for entry in annotations["annotations"]:
        objects[images[entry["image_id"]], labels[entry["category_id"]]] += 1
    found: list[tuple[NDArray[Any], ...]] = []
    if detections:
        matching = evaluation(truth, truth.loadRes([dict(entry) for entry in detections]), "bbox")
        matching.params.areaRng, matching.params.areaRngLbl = [matching.params.areaRng[0]], ["all"]
        matching.evaluate()
        for entry in filter(None, matching.evalImgs):
            scores = np.asarray(entry["dtScores"], np.float64)
            image = np.full(len(scores), images[entry["image_id"]])
            label = np.full(len(scores), labels[entry["category_id"]])
            found.append((image, label, scores, np.asarray(entry["dtMatches"]).T > 0))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros((0, len(_THRESHOLDS)), bool))
    image, label, score, hit = (np.concatenate(parts) for parts in zip(empty, *found, strict=True))
    order = np.argsort(-score, kind="stable")
    return {"image": image[order], "label": label[order], "score": score[order], "hit": hit[order], "objects": objects}


def average_precision(found: Contributions, counts: NDArray[Any] | None = None) -> float:
    """AP at IoU 0.5 to 0.95, in [0, 1], over the classes that have objects; with ``counts``, each image that many times.

    Precision at recall r is the largest at any recall >= r, averaged over r = 0, 0.01, ..., 1.

    Args:
        found: what ``contributions`` returned.
        counts: how often each image is in the sample, (images,); default: once.
    """
    objects = found["objects"]
    weights = np.ones(len(objects)) if counts is None else np.asarray(counts, np.float64)
    totals = weights @ objects
    per_class = []
    for label in np.flatnonzero(totals > 0):
        mine = found["label"] == label
        weight = weights[found["image"][mine]]
        hits = np.cumsum(found["hit"][mine] * weight[:, None], axis=0)
        precision = hits / np.maximum(np.cumsum(weight), np.finfo(np.float64).tiny)[:, None]
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = hits / totals[label]
        for threshold in range(len(_THRESHOLDS)):
            at = np.searchsorted(recall[:, threshold], _RECALLS, side="left")
            reached = at[at < len(recall)]
            per_class.append(precision[reached, threshold].sum() / len(_RECALLS))
    return float(np.mean(per_class)) if per_class else 0.0


def difference_over_images(
    better: Sequence[Contributions], worse: Sequence[Contributions], *, draws: int = 200, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean difference of AP of pairs of detectors on the same images, and its 95 % interval over resamples of the images.

    Every detector sees the same resample. What another training would give is not in the interval.

    Args:
        better: one detector of each pair.
        worse: the other ones.
        draws: number of resamples.
        seed: of the resamples.
    """

    def mean(counts: NDArray[Any] | None) -> float:
        pairs = zip(better, worse, strict=True)
        return float(np.mean([average_precision(a, counts) - average_precision(b, counts) for a, b in pairs]))

    rng = np.random.default_rng(seed)
    images = len(better[0]["objects"])
    drawn = [mean(rng.multinomial(images, np.full(images, 1 / images))) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return mean(None), (float(low), float(high))
