"""`freespace-uda predict`: mask, overlay, confidence and normals of one picture, or of a data set."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from freespace_uda.calibration import of_numbers, read_calibration
from freespace_uda.commands import _pictures
from freespace_uda.commands._files import look, predictor_of, read
from freespace_uda.config import PredictSettings
from freespace_uda.depth import DepthCode
from freespace_uda.evaluation import predictions
from freespace_uda.metrics import scores_of
from freespace_uda.scenes import Record, Scenes
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import track


def run(settings: PredictSettings, invocation: Invocation) -> None:
    """Write ``mask/``, ``overlay/``, ``probability/``, ``confidence/`` and ``normals/``, a PNG per scene each."""
    predictor, own, _ = predictor_of(settings.run, settings.device)
    scenes = _one(settings) if settings.data is None else read(settings.data, settings.reading, usual="all")
    look(scenes, "--data" if settings.data is not None else "--rgb and --depth", labels=False)
    folder = invocation.folder
    said = set()
    count = 0
    found_all = predictions(predictor, scenes, settings.batch_size)
    for i, item, found in track(found_all, "predict", len(scenes), quiet=invocation.quiet):
        name = Path(scenes.name(i)).with_suffix("").as_posix().replace("/", "_")
        mask = found.mask(settings.threshold)
        pictures = {
            "mask": (255 * mask).astype(np.uint8),
            "overlay": _pictures.overlay(_pictures.shown_rgb(item), mask),
            "probability": scores_of(found.probability),
            "confidence": scores_of(found.confidence),
        }
        if found.normals is not None:
            pictures["normals"] = _pictures.shown_normals(found.normals, item.size)
        for kind, image in pictures.items():
            with folder.replacing(f"{kind}/{name}.png") as path:
                Image.fromarray(image).save(path, "PNG")
        if own.streams == "both" and item.depth is None:
            said.add("without depth the RGB head answers, which sees less")
        if own.streams == "both" and item.rgb is None:
            said.add("without a picture the head of the normals answers, which sees less")
        count += 1
        share = float(mask.mean())
    sys.stdout.write(f"{count} scenes in {folder.path}; {100 * share:.1f} % of the last are road\n")
    for text in sorted(said):
        sys.stdout.write(f"note: {text}\n")


def _one(settings: PredictSettings) -> Scenes:
    """The one scene of --rgb, --depth and --calibration."""
    files = {}
    for option in ("rgb", "depth"):
        value = getattr(settings, option)
        path = None if value is None else Path(value).expanduser()
        if path is not None and not path.is_file():
            raise UserError(f"--{option} {value}: no such file")
        files[option] = path
    reading, k, calibration = settings.reading, None, None
    if files["depth"] is not None:
        if reading.depth_unit is None and reading.depth_scale is None:
            raise UserError("--depth needs --reading.depth_unit: m, cm, mm, m/256, carla or disparity")
        if reading.intrinsics is not None:
            k = of_numbers(reading.intrinsics, "--reading.intrinsics")
        elif settings.calibration is not None:
            calibration = Path(settings.calibration).expanduser()
            read_calibration(calibration)
        else:
            raise UserError("--depth needs the camera: --calibration FILE, or --reading.intrinsics fx,fy,cx,cy")
    code = DepthCode(
        reading.depth_unit or "m", bool(reading.ray), reading.far, reading.baseline, reading.offset, reading.depth_scale
    )
    stem = (files["rgb"] or files["depth"] or Path("scene")).stem
    record = Record(stem, files["rgb"], files["depth"], None, calibration, k, code)
    return Scenes("the user's picture", (record,), None, files["rgb"] or files["depth"])
