"""One arm on one seed, trained and measured on labeled target scenes that nothing else saw; importable by other processes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from freespace_uda.alignment import SelectiveAlignment, mask_quality
from freespace_uda.config import ALIGNED, Arm, RunSettings, of_arm
from freespace_uda.evaluation import evaluate
from freespace_uda.items import to_network
from freespace_uda.network import FreespaceNet
from freespace_uda.predictor import Predictor
from freespace_uda.scenes import Scenes, Unlabeled
from freespace_uda.training import Trained, train
from tenfold.claims import Measured

HEALTH = (
    "mask rgb",
    "mask normal",
    "accuracy rgb",
    "accuracy normal",
    "agreement",
    "precision on source rgb",
    "gradient ratio",
)
"""What is kept of the health line at every candidate."""


def measure(
    settings: RunSettings, arm: Arm, seed: int, source: Scenes, target: Scenes, test: Scenes, *, course: bool = False
) -> Measured:
    """Train an arm without labels of the target (but for the oracle), and count on the test scenes.

    Args:
        settings: settings that all arms share.
        arm: the arm.
        seed: seed of weights, order and augmentation.
        source: labeled source.
        target: target; its labels are read by the oracle alone.
        test: labeled test scenes of the target.
        course: also count at every candidate for the choice, for a report on the choice.
    """
    method, own = of_arm(settings, arm)
    steps: list[float] = []
    seen: list[float] = []
    health: list[list[float]] = []

    def watch(net: FreespaceNet, step: int, found: Mapping[str, float]) -> None:
        steps.append(step)
        seen.append(100 * evaluate(Predictor(net, own), test, batch_size=10).perspective.compute().f1)
        health.append([found.get(name, float("nan")) for name in HEALTH])

    given: Any = target if method == "oracle" else Unlabeled(target)
    trained = train(source, given, own, method, seed, watch=watch if course else None, quiet=True)
    meter = evaluate(Predictor(trained.net, own), test, batch_size=10).perspective
    r = meter.compute()
    values = {
        "F1": 100 * r.f1,
        "MaxF": 100 * r.max_f,
        "AP": 100 * r.ap,
        "precision": 100 * r.precision,
        "recall": 100 * r.recall,
        "agreement": trained.signals.agreement,
        "entropy": trained.signals.entropy,
        "chosen step": float(trained.step),
        "plausible": float(trained.plausible),
    }
    arrays: dict[str, Any] = {"scenes": meter.scenes, "counts": meter.counts}
    if course:
        arrays |= {"steps": np.asarray(steps), "course": np.asarray(seen), "health": np.asarray(health)}
        values["F1 of the best candidate"] = max(seen)
    if method in ALIGNED:
        quality, arrays["aligned"] = masks(trained, own, test)
        values |= quality
    arrays["masks"] = drawn_masks(trained, own, test)
    return Measured(values, arrays)


def masks(trained: Trained, settings: RunSettings, test: Scenes) -> tuple[dict[str, float], np.ndarray]:
    """Precision and recall of the alignment masks on labeled target scenes, in percent; and those that pictures show.

    Returns:
        The shares; masks of the RGB stream, (SHOWN, h, w).
    """
    a = settings.align
    rule = SelectiveAlignment(trained.net.feature_channels, a.mask_mode, a.tau, a.min_pixels)
    parts = [to_network(test.item(i), settings) for i in range(len(test))]
    rgb, normals, valid = (torch.stack(c) for c in zip(*parts, strict=True))
    labels = torch.stack([torch.from_numpy(test.label(i)) for i in range(len(test))])
    with torch.no_grad():
        out = trained.net(rgb, normals, valid)
    assert out.rgb is not None
    assert out.normal is not None
    size = next(iter(out.features.values())).shape[-2:]
    of_source = rule.source_mask(labels, (size[0], size[1])) if a.mask_mode == "intersection" else None
    logits = {"fused": out.fused, "rgb": out.rgb, "normal": out.normal}
    found = rule.target_masks(logits, (size[0], size[1]), of_source)
    values = {}
    for name, mask in found.items():
        precision, recall = mask_quality(mask, labels)
        values[f"mask precision {name}"] = 100 * float(torch.nan_to_num(precision))
        values[f"mask recall {name}"] = 100 * float(torch.nan_to_num(recall))
    return values, found["rgb"][shown_rows(test), 0].numpy() > 0


SHOWN = 4
"""Test scenes that pictures show."""


def shown_rows(test: Scenes) -> list[int]:
    """Numbers of the scenes that pictures show."""
    return [round(i * (len(test) - 1) / max(1, SHOWN - 1)) for i in range(SHOWN)]


def drawn_masks(trained: Trained, settings: RunSettings, test: Scenes) -> np.ndarray:
    """Road masks of the scenes that pictures show, (SHOWN, H, W)."""
    found = Predictor(trained.net, settings).items([test.item(i) for i in shown_rows(test)])
    return np.stack([p.mask() for p in found])
