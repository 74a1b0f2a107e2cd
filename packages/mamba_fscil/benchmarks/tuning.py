"""How the demonstration's rates and steps were chosen: every trained arm tries the same settings, on seeds 100 and 101.

``python tuning.py --out FOLDER``: letters alone, at the default level. A finished measurement is not made again.
"""

import argparse
import functools
import sys
from pathlib import Path

from mamba_fscil.commands import _protocol, demo
from mamba_fscil.config import METHODS, TRAINING_FREE, Method

from tenfold.claims import Measured, Study
from tenfold.runs import Run
from tenfold.terminal import table

SETTINGS = ((0.03, 60), (0.1, 60), (0.3, 60), (0.1, 120), (0.3, 120))
"""Rate and steps."""
SEEDS = (100, 101)
LEVEL = "default"


def measure(path: Path, arm: Method, tuned: tuple[float, int], seed: int) -> Measured:
    """One arm with one setting on one seed."""
    own, data = demo.settings_of("glyphs", LEVEL, seed), demo.data_of("glyphs", LEVEL, seed)
    file = path / "bases" / f"glyphs-seed-{seed}.safetensors"
    return _protocol.measure(file, data, own, arm, demo.session_of(arm, LEVEL, tuned), beside=True)


def main() -> int:
    """Measure all settings and print their harmonic means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    out = Path(parser.parse_args().out)
    there = out.exists()
    with Run.open(out, package="mamba-fscil", verb="tuning", settings={"settings": SETTINGS}, resume=there) as run:
        study = Study(run, data="glyphs", seeds=SEEDS)
        for seed in SEEDS:
            own, data = demo.settings_of("glyphs", LEVEL, seed), demo.data_of("glyphs", LEVEL, seed)
            _protocol.shared_base(run, f"glyphs-seed-{seed}", data, own, METHODS, quiet=True)
        trained = [arm for arm in METHODS if arm not in TRAINING_FREE]
        arms = {
            f"{arm} {lr} {steps}": functools.partial(measure, out, arm, (lr, steps))
            for arm in trained
            for lr, steps in SETTINGS
        }
        arms |= {arm: functools.partial(measure, out, arm, SETTINGS[0]) for arm in TRAINING_FREE}
        study.over_arms(arms)
        rows = []
        for arm in trained:
            cells = [[study.arms[f"{arm} {lr} {n}"][m] for m in ("harmonic", "base", "novel")] for lr, n in SETTINGS]
            rows.append([arm, *("; ".join("/".join(f"{x:.1f}" for x in pair) for pair in cell) for cell in cells)])
        rows += [
            [arm, *(["/".join(f"{x:.1f}" for x in study.arms[arm]["harmonic"])] * len(SETTINGS))]
            for arm in TRAINING_FREE
        ]
        print("harmonic; base; novel of seeds 100/101")
        print(table(["arm", *(f"lr {lr}, {steps} steps" for lr, steps in SETTINGS)], rows))
        study.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
