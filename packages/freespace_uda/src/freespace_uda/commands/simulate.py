"""`freespace-uda simulate`: rendered road scenes as files, in the manifest layout."""

import csv
import io
import sys

import numpy as np
from PIL import Image

from freespace_uda.config import SceneReading, SimulateSettings
from freespace_uda.data import COLUMNS, rendered
from tenfold.cli import Invocation


def run(settings: SimulateSettings, invocation: Invocation) -> None:
    """Write ``rgb``, ``depth`` (32-bit TIFF in meters), ``label`` and ``manifest.csv``."""
    folder = invocation.folder
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for part, count in (("train", settings.scenes), ("test", settings.test)):
        if not count:
            continue
        scenes = rendered(
            settings.domain, SceneReading(scenes=count, size=settings.size, world_seed=settings.seed), part
        )
        for i in range(count):
            item, stem = scenes.item(i), f"{part}_{i:05d}"
            files = {"rgb": f"rgb/{stem}.png", "depth": f"depth/{stem}.tiff", "label": f"label/{stem}.png"}
            assert item.rgb is not None
            assert item.depth is not None
            for name, array, kind in (
                (files["rgb"], item.rgb, "PNG"),
                (files["depth"], item.depth, "TIFF"),
                (files["label"], scenes.label(i), "PNG"),
            ):
                with folder.replacing(name) as path:
                    Image.fromarray(np.ascontiguousarray(array)).save(path, kind)
            k = item.intrinsics
            camera = {"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2], "cy": k[1, 2]}
            writer.writerow(
                {"name": f"{settings.domain}/{part}/{i:05d}", **files, "split": part, "depth_unit": "m", "palette": "binary",
                 **{name: repr(float(value)) for name, value in camera.items()}}
            )  # fmt: skip
    folder.write_text("manifest.csv", text.getvalue())
    sys.stdout.write(
        f"{settings.scenes + settings.test} rendered scenes of {settings.domain} in {folder.path};"
        f" --data manifest:{folder.path / 'manifest.csv'} takes them\n"
    )
