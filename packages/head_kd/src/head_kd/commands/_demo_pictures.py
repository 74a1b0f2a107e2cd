"""The demonstration's pictures: AP of each arm, and the best detections of a few students."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from mmdet.structures import DetDataSample
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from head_kd.checkpoints import read_weights
from head_kd.rendered import CLASSES, draw, font
from head_kd.small import retinanet
from head_kd.stack import build, start
from tenfold.figures import arm_chart, image_grid
from tenfold.runs import Run


def draw_pictures(run: Run, values: dict[str, list[float]], students: dict[str, Path], images: list[int]) -> None:
    """``figures/arms.png`` and ``figures/detections.png``.

    Args:
        run: the demonstration's folder.
        values: AP of each seed, by the arm's label.
        students: files of trained students by label, one row of pictures each.
        images: indices of the drawn images that are shown.
    """
    arm_chart(run.own("figures/arms.png"), values, xlabel="AP on held-out drawn images, percent")
    drawn = [draw(index, clutter=False) for index in images]
    rows: list[list[NDArray[np.uint8]]] = [[_boxed(image, objects) for image, objects in drawn]]
    for file in students.values():
        found = predict(file, drawn)
        rows.append([_boxed(image, objects, best) for (image, objects), best in zip(drawn, found, strict=True)])
    image_grid(run.own("figures/detections.png"), rows, row_titles=["ground truth", *students], cell=1.7)


Drawn = tuple[NDArray[np.uint8], list[tuple[int, list[float]]]]
"""An image and its objects, as ``rendered.draw`` gives them."""


def predict(weights: Path, drawn: list[Drawn]) -> list[list[tuple[int, list[float], float]]]:
    """The best detections (class, x1 y1 x2 y2, score) of a student's file on drawn images, as many as there are objects."""
    start()
    model = build(retinanet()).eval()
    model.load_state_dict(read_weights(weights).state_dict)
    meta = {"img_shape": (128, 128), "ori_shape": (128, 128), "scale_factor": (1.0, 1.0)}
    inputs = [torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) for image, _ in drawn]
    with torch.no_grad():
        found = model.test_step({"inputs": inputs, "data_samples": [DetDataSample(metainfo=dict(meta)) for _ in drawn]})
    out = []
    for sample, (_, objects) in zip(found, drawn, strict=True):
        p = sample.pred_instances
        keep = torchvision.ops.nms(p.bboxes, p.scores, 0.5)[: len(objects)]
        rows = zip(p.labels[keep].tolist(), p.bboxes[keep].tolist(), p.scores[keep].tolist(), strict=True)
        out.append(list(rows))
    return out


_GREEN, _ORANGE, _RED, _WHITE = (0, 200, 100), (255, 170, 0), (230, 30, 30), (255, 255, 255)


def _iou(a: list[float], b: list[float]) -> float:
    """Of two boxes x1, y1, x2, y2."""
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def _boxed(
    image: NDArray[np.uint8],
    truth: list[tuple[int, list[float]]],
    detections: list[tuple[int, list[float], float]] | None = None,
) -> NDArray[np.uint8]:
    """An image, three times as large, with white boxes of the ground truth, or boxes of detections, colored by success."""
    canvas = Image.fromarray(image).resize((384, 384), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    corners = [(label, [x, y, x + w, y + h]) for label, (x, y, w, h) in truth]
    shown = [(box, CLASSES[label], _WHITE) for label, box in corners]
    if detections is not None:
        shown = []
        for label, box, score in detections:
            there = [other for other, theirs in corners if _iou(box, theirs) >= 0.5]
            color = _GREEN if label in there else _ORANGE if there else _RED
            shown.append((box, f"{CLASSES[label]} {score:.1f}", color))
    for box, text, color in shown:
        pen.rectangle([3 * v for v in box], outline=color, width=5)
        where = (max(2, min(3 * box[0] + 6, 384 - 12 * len(text))), 3 * box[1] + 4)
        pen.text(where, text, font=font(22), fill=_WHITE, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)
