"""What a backbone is worth on labeled pictures, by each protocol."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genview.config import ProbeSettings, Protocol
from genview.data import PictureData, pixels_of
from genview.neighbors import knn_accuracy
from genview.probes import linear_sweep
from genview.training import Statistics, extract, labeled, semi_supervised, top1, train_classifier


@dataclass(frozen=True)
class Labeled:
    """Labeled pictures in memory.

    Attributes:
        train: uint8 images and their classes.
        test: likewise.
        classes: number of classes.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def read(data: PictureData, size: int) -> Labeled:
    """Labeled training and test pictures as squares."""
    train, test = labeled(data)
    assert train.labels is not None
    assert test.labels is not None
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return Labeled((pixels_of(train, size), train.labels), (pixels_of(test, size), test.labels), classes)


def measure(
    backbone: nn.Module,
    found: Labeled,
    protocol: Protocol,
    probe: ProbeSettings,
    statistics: Statistics,
    *,
    size: int,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Metrics in percent by name, and the subsets of labels that were used."""
    backbone.to(device)
    if protocol == "linear":
        model = train_classifier(
            copy.deepcopy(backbone), *found.train, found.classes, probe, statistics, size=size, seed=seed, device=device
        )
        return {"linear top1": top1(model, *found.test, statistics)}, {}
    if protocol == "semi":
        values, subsets = {}, {}
        for share in probe.share:
            name = f"top1 with {share:.0%} of the labels"
            values[name], subsets[name] = semi_supervised(
                backbone,
                found.train,
                found.test,
                found.classes,
                share,
                probe,
                statistics,
                size=size,
                seed=seed,
                device=device,
            )
        return values, subsets
    train, test = (extract(backbone, images, statistics, batch_size) for images, _ in (found.train, found.test))
    if protocol == "knn":
        k = min(k, len(train))
        top = knn_accuracy(test, found.test[1], train, found.train[1], k=k, temperature=temperature, top=(1, 5))
        return {"knn top1": top[1], "knn top5": top[5]}, {}
    result = linear_sweep(
        train,
        found.train[1],
        test,
        found.test[1],
        rates=probe.rates,
        epochs=probe.epochs,
        batch_size=probe.batch_size,
        seed=seed,
    )
    return {"linear top1": result.top1, "rate": result.rate}, {}


def quick(
    backbone: nn.Module, found: Labeled, probe: ProbeSettings, statistics: Statistics, seed: int
) -> dict[str, float]:
    """Nearest neighbors and the sweep, on features that are computed once."""
    train, test = (extract(backbone, images, statistics) for images, _ in (found.train, found.test))
    k = min(20, len(train))
    near = knn_accuracy(test, found.test[1], train, found.train[1], k=k, top=(1,))[1]
    sweep = linear_sweep(
        train,
        found.train[1],
        test,
        found.test[1],
        rates=probe.rates,
        epochs=probe.epochs,
        batch_size=probe.batch_size,
        seed=seed,
    )
    return {"linear top1": sweep.top1, "knn top1": near, "spread": float(torch.cat([train, test]).std(dim=0).mean())}
