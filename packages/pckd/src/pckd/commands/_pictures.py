"""Pictures of trainings in a run folder, and the list of the images that were hardest to learn."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pckd.analysis import most_previewed
from pckd.config import Preview
from tenfold.claims import Study, mean_ci95
from tenfold.figures import Curve, Panel, arm_chart, image_grid, line_chart
from tenfold.images import ImageData
from tenfold.runs import Run

SHOWN = 24
"""Images in the picture of the most previewed ones."""
PREVIEWED = (
    "The training images that were hardest to learn, hardest first, with the given label and what the student (and the"
    " teacher) say. Mislabeled images gather here. previewed.csv has them all."
)
"""Caption of that picture."""


def write_previewed(run: Run, preview: Sequence[Mapping[str, NDArray[Any]]], data: ImageData) -> None:
    """Write ``previewed.csv`` with every training image, the most held back first, and a picture of the first ones.

    Images that stay hard to the end are often mislabeled. An image is named by its file, or by its number in the user's
    array. Beside the given label stand the student's answer (of several trainings, the commonest) and the teacher's.
    """
    train, classes = data.train, data.classes
    order, weight, gamma = most_previewed(preview)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    said = {
        who: _commonest([np.asarray(p[who]) for p in preview]) for who in ("student", "teacher") if who in preview[0]
    }
    writer.writerow(["rank", "image", "label", *said, "mean_weight", "mean_difficulty"])
    for rank, i in enumerate(order.tolist(), 1):
        answers = [classes[int(train.labels[i])], *(classes[int(answer[i])] for answer in said.values())]
        writer.writerow([rank, train.name(i), *answers, f"{weight[i]:.4f}", f"{gamma[i]:.3f}"])
    run.write_text("previewed.csv", text.getvalue())
    first = order[:SHOWN].tolist()
    images = train.pixels(torch.tensor(first)).permute(0, 2, 3, 1).numpy()
    images = images[..., 0] if images.shape[-1] == 1 else images[..., :3]
    columns = min(8, len(first))
    rows = [range(i, min(i + columns, len(first))) for i in range(0, len(first), columns)]
    named = {"given": np.asarray(train.labels), **said}
    titles = ["\n".join(f"{who} {_short(classes[int(a[i])])}" for who, a in named.items()) for i in first]
    image_grid(
        run.figure("previewed"),
        [list(images[row.start : row.stop]) for row in rows],
        titles=[titles[row.start : row.stop] for row in rows],
    )


def _short(name: str, most: int = 10) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _commonest(answers: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The answer that most trainings give to each image; of equally many, the lowest."""
    stacked = np.stack(answers)
    return np.asarray([np.bincount(column).argmax() for column in stacked.T])


def draw_difficulty(run: Run, preview: Mapping[str, NDArray[Any]], config: Preview, *, weighted: bool) -> None:
    """Draw the difficulty of the samples by epoch with the threshold, and the share that is held back with the mean weight."""
    gamma, weights = preview["gamma"].astype(np.float64), preview["weights"].astype(np.float64)
    epochs = len(gamma)
    x = list(range(1, epochs + 1))
    levels = {f"{q} % of the samples lie below": np.nanquantile(gamma, q / 100, axis=1).tolist() for q in (50, 90, 99)}
    curves = {name: Curve(x, values) for name, values in levels.items()}
    threshold = [config.threshold(e, epochs) for e in x]
    curves["threshold"] = Curve(x, threshold)
    panels = [Panel("difficulty of the training images", "epoch", "cross-entropy / mean of the batch", curves)]
    if weighted:
        late = {
            "mean weight": Curve(x, np.nanmean(weights, axis=1).tolist()),
            "share below the threshold": Curve(x, np.nanmean(gamma <= np.asarray(threshold)[:, None], axis=1).tolist()),
        }
        panels.append(Panel("preview", "epoch", "share of the training images", late))
    line_chart(run.figure("difficulty"), panels)


def draw_accuracy(run: Run, histories: Mapping[str, Sequence[Sequence[float]]], title: str = "accuracy") -> None:
    """Draw the test accuracy by epoch, mean over seeds with its interval."""
    curves = {}
    for arm, rows in histories.items():
        points = [mean_ci95(values) for values in zip(*rows, strict=True)]
        low, high = ([(ci or (mean, mean))[i] for mean, ci in points] for i in (0, 1))
        curves[arm] = Curve(list(range(1, len(points) + 1)), [mean for mean, _ in points], low, high)
    line_chart(run.figure("accuracy"), [Panel(title, "epoch", "top-1 on test images (%)", curves)])


def draw_arms(run: Run, study: Study, methods: Sequence[str]) -> None:
    """Draw the accuracy of each method with its interval."""
    values = {method: study.values((method, "top1")).tolist() for method in methods}
    arm_chart(run.figure("methods"), values, xlabel="top-1 on test images (%)")
