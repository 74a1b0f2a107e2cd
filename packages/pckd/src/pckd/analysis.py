"""What a training did to features, centers and samples: numbers out of arrays, and their pictures in a run folder."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pckd.config import PCKDConfig, Preview
from tenfold.claims import Study, mean_ci95
from tenfold.cli import table
from tenfold.figures import Curve, Panel, arm_chart, image_grid, line_chart
from tenfold.runs import Run

SHOWN = 24
"""Images in the picture of the most previewed ones."""


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows, in percent, whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def fisher_ratio(features: Tensor, labels: Tensor) -> float:
    """Scatter between the class means over the scatter within the classes (traces); higher is better separated.

    Features are brought to unit length first, so that their scale does not count. (N, D), (N,).
    """
    x = F.normalize(features.double(), dim=1)
    between = within = 0.0
    for label in torch.unique(labels):
        members = x[labels == label]
        center = members.mean(dim=0)
        between += len(members) * float((center - x.mean(dim=0)).square().sum())
        within += float((members - center).square().sum())
    return between / max(within, 1e-12)


def center_correlation(student: Tensor, teacher: Tensor) -> float:
    """Pearson correlation of the cosines between category centers, student's (C, S) against teacher's (C, T)."""
    above = torch.triu_indices(len(student), len(student), 1)
    cosines = [(c @ c.T)[above[0], above[1]] for c in (F.normalize(w.double(), dim=1) for w in (student, teacher))]
    return float(torch.corrcoef(torch.stack(cosines))[0, 1]) if len(cosines[0]) > 1 else 1.0


def most_previewed(
    preview: Sequence[Mapping[str, NDArray[Any]]],
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Images from the most to the least held back, with their mean weight and mean difficulty over epochs and trainings.

    Ties in weight go by difficulty, so the order also says something for methods without weights.
    """
    weight = np.nanmean(np.concatenate([p["weights"] for p in preview]).astype(np.float64), axis=0)
    gamma = np.nanmean(np.concatenate([p["gamma"] for p in preview]).astype(np.float64), axis=0)
    return np.lexsort((-gamma, weight)), weight, gamma


def write_previewed(
    run: Run,
    preview: Sequence[Mapping[str, NDArray[Any]]],
    names: Sequence[str],
    labels: Tensor,
    classes: Sequence[str],
    pixels: Any,
) -> None:
    """``previewed.csv`` with every training image, the most held back first, and a picture of the first ones.

    Images that stay hard to the end are often mislabeled.
    """
    order, weight, gamma = most_previewed(preview)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "image", "label", "mean_weight", "mean_difficulty"])
    for rank, i in enumerate(order.tolist(), 1):
        writer.writerow([rank, names[i], classes[int(labels[i])], f"{weight[i]:.4f}", f"{gamma[i]:.3f}"])
    run.write_text("previewed.csv", text.getvalue())
    first = order[:SHOWN].tolist()
    images = pixels(torch.tensor(first)).permute(0, 2, 3, 1).numpy()
    columns = min(8, len(first))
    with run.replacing("figures/previewed.png") as path:
        image_grid(
            path,
            [images[i : i + columns] for i in range(0, len(first), columns)],
            row_titles=[
                "\n".join(
                    textline(classes[int(labels[j])] for j in first[i : i + columns][k : k + 4])
                    for k in range(0, len(first[i : i + columns]), 4)
                )
                for i in range(0, len(first), columns)
            ],
        )


def textline(words: Any) -> str:
    """Names in one line."""
    return ", ".join(words)


def draw_difficulty(run: Run, preview: Mapping[str, NDArray[Any]], config: Preview, *, weighted: bool) -> None:
    """Difficulty of the samples by epoch, with the threshold, and the share that is held back, with the mean weight."""
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
    line_chart(run.own("figures/difficulty.png"), panels)


def draw_accuracy(run: Run, histories: Mapping[str, Sequence[Sequence[float]]], title: str = "accuracy") -> None:
    """Test accuracy by epoch, mean over seeds with its interval."""
    curves = {}
    for arm, rows in histories.items():
        points = [mean_ci95(values) for values in zip(*rows, strict=True)]
        low, high = ([(ci or (mean, mean))[i] for mean, ci in points] for i in (0, 1))
        curves[arm] = Curve(list(range(1, len(points) + 1)), [mean for mean, _ in points], low, high)
    line_chart(run.own("figures/accuracy.png"), [Panel(title, "epoch", "top-1 on test images (%)", curves)])


def decide_comparison(study: Study, methods: Sequence[str]) -> None:
    """Differences to the first method and to kd, paired by seed; ``holds`` says whether the whole interval is above 0."""
    for reference in dict.fromkeys([methods[0], *(m for m in methods if m == "kd")]):
        for method in methods:
            if method != reference and not (reference == "kd" and method == methods[0]):
                text = f"top-1 of {method} - top-1 of {reference} (percentage points)"
                id = f"{method}_over_{reference}".replace("-", "_")
                study.difference(id, text, (method, "top1"), (reference, "top1"), required=">= 0", main=True)


def draw_arms(run: Run, study: Study, methods: Sequence[str]) -> None:
    """Accuracy of each method with its interval."""
    values = {method: study.values((method, "top1")).tolist() for method in methods}
    arm_chart(run.own("figures/methods.png"), values, xlabel="top-1 on test images (%)")


def arms_table(study: Study, methods: Sequence[str], metrics: Sequence[str]) -> str:
    """Means with intervals of the methods."""
    from tenfold.claims import interval

    rows = [[m, *(interval(*mean_ci95(study.values((m, metric)).tolist())) for metric in metrics)] for m in methods]
    return table(["method", *metrics], rows)


def floor(config: PCKDConfig, labels: Tensor, views: int) -> float:
    """Least value of the category contrast for these labels: 2 (tau / tau0) mean log |P(i)|, which is not zero."""
    counts = torch.bincount(labels)[labels].double() * views * 2 - 1
    return float(2 * config.tau / config.tau0 * counts.log().mean())
