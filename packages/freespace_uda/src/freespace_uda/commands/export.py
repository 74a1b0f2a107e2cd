"""`freespace-uda export`: the model as a file for elsewhere, or the files of KITTI's benchmark."""

import sys

import torch
from PIL import Image

from freespace_uda.commands._files import predictor_of, read
from freespace_uda.config import ExportSettings
from freespace_uda.evaluation import predictions
from freespace_uda.metrics import scores_of
from freespace_uda.predictor import Exported
from freespace_uda.world import RoadWorld
from tenfold import UserError, export
from tenfold.cli import Invocation


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write ``model.*`` and its card, or a PNG of probabilities per picture."""
    predictor, own, card = predictor_of(settings.run, settings.device)
    folder = invocation.folder
    if settings.format == "kitti":
        assert settings.data is not None
        scenes = read(settings.data, settings.reading, usual="test")
        for i, _, found in predictions(predictor, scenes, settings.batch_size):
            category, _, number = scenes.name(i).rpartition("/")[2].partition("_")
            if not number:
                raise UserError(f"--data {settings.data}: {scenes.name(i)}: expected names as KITTI's um_000000")
            with folder.replacing(f"{category}_road_{number}.png") as path:
                Image.fromarray(scores_of(found.probability)).save(path, "PNG")
        sys.stdout.write(f"{len(scenes)} files of probabilities in {folder.path}, in the camera's view\n")
        return
    width, height = own.size
    scenes_of = RoadWorld("roads-real", own.size, seed=0, length=2)
    made = [scenes_of[i] for i in range(2)]
    rgb = torch.stack([torch.from_numpy(s.rgb).permute(2, 0, 1).float() / 255 for s in made])
    depth = torch.stack([torch.from_numpy(s.depth)[None] for s in made])
    k = torch.stack([torch.from_numpy(s.camera.intrinsics).float() for s in made])
    module = predictor.net.cpu() if settings.format == "safetensors" else Exported(predictor.net.cpu(), own)
    done = export.save(
        module,
        (rgb, depth, k),
        folder,
        "model",
        settings.format,
        inputs=("rgb", "depth", "intrinsics"),
        outputs=("probability",),
    )
    folder.write_json("config.json", card)
    sys.stdout.write(
        f"{done.path}: rgb (N, 3, {height}, {width}) in [0, 1], depth (N, 1, {height}, {width}) in meters, intrinsics (N, 3, 3)"
        f" -> probability; largest difference {done.difference:.1e}\n"
    )
