"""`visctrl invert`: the noise that gives a picture back, and how well it does."""

import sys
from pathlib import Path

import torch

from tenfold.cli import Invocation
from tenfold.figures import image_grid
from tenfold.terminal import table
from visctrl import metrics
from visctrl.commands import _work
from visctrl.config import InvertSettings
from visctrl.data import load_model, read_picture, write_picture
from visctrl.engine import VisCtrl
from visctrl.masks import resized, to_pictures


def run(settings: InvertSettings, invocation: Invocation) -> None:
    """Invert, denoise again, and write trajectory, reconstruction and residuals."""
    path = Path(settings.target)
    read_picture(path)
    folder = invocation.folder
    engine = VisCtrl(load_model(settings), settings.control)
    target = _work.prepare(engine, path, None, settings.size, False, "--target")
    told = engine.conditions(settings.target_prompt)
    trajectory = engine.invert(target.image, conditions=told)
    images = engine.decode(engine.denoise(trajectory.latents[-1], told))
    with torch.inference_mode():
        through = engine.decode(engine.encode(target.image))  # what the autoencoder alone loses
    own = target.image.to(images.device)
    back = resized(to_pictures(images, *target.shown.shape[:2])[0], *target.photo.shape[:2])
    trajectory.save(folder.own("trajectory.safetensors"))
    with folder.replacing("reconstruction.png") as temporary:
        write_picture(temporary, back, "reconstructed with visctrl")
    image_grid(folder.own("grid.png"), [[target.photo, back]], column_titles=["target", "reconstruction"], cell=1.6)
    last = [float(x) for x in trajectory.residuals[:, -1, 0]]
    fell_back = trajectory.fallen_back[:, 0].tolist()
    about = {
        "timesteps": trajectory.timesteps,
        "residuals": trajectory.residuals[..., 0].tolist(),
        "fallen_back": fell_back,
        "reconstruction_rmse": _distance(images, own),
        "autoencoder_rmse": _distance(through, own),
        "rows": engine.rows,
    }
    folder.write_json("invert.json", about)
    rows = [
        [i + 1, f"{t:g}", f"{x:.2e}", "plain step" if back_ else ""]
        for i, (t, x, back_) in enumerate(zip(trajectory.timesteps, last, fell_back, strict=True))
    ]
    sys.stdout.write(table(["level", "timestep", "last change", "fell back"], rows) + "\n\n")
    sys.stdout.write(
        f"reconstruction: RMSE {about['reconstruction_rmse']:.4f} in [-1, 1], of which the autoencoder alone"
        f" {about['autoencoder_rmse']:.4f}\n"
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference of two images as they would be shown."""
    return float(metrics.rmse(a.clamp(-1, 1), b))
