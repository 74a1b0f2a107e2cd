"""The demonstration's scene: six views of balls, three references of nearly one material; do the edited views agree?"""

import colorsys
import dataclasses

import numpy as np
import torch
from torch import Tensor

from tenfold.claims import Study
from tenfold.figures import image_grid
from visctrl import metrics
from visctrl.blobs import APART, Blobs, material, paint, structures
from visctrl.config import SamplingConfig, VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.masks import to_pictures
from visctrl.points import PointScene, make_scene
from visctrl.views import edit_views

SCENES = {"quick": 1, "default": 0, "full": 6}
VIEWS, REFERENCES, JITTER, ROUNDS = 6, 3, 0.05, 2
ARMS: dict[str, SamplingConfig] = {
    "scene, independent references": SamplingConfig(kind="single"),
    "scene, gradual sampling": SamplingConfig(),
    "scene, gradual sampling of latents": SamplingConfig(kind="latent"),
    "scene, gradual sampling with a pool of 2": SamplingConfig(pool=2),
    "scene, one reference": SamplingConfig(kind="single"),
}
ONE = "scene, one reference"
"""What is left over where nothing but the method itself lets views differ."""
RESIDUAL = "refit residual"


@dataclasses.dataclass(frozen=True)
class SceneTask:
    """A scene of one material, and references of others that are nearly one.

    Attributes:
        scene: the scene.
        views: its pictures.
        references: pictures whose hues lie within ``JITTER`` of each other's middle.
        ideal: the views in the references' mean color.
    """

    scene: PointScene
    views: Tensor
    references: Blobs
    ideal: Tensor


def make_task(seed: int, number: int) -> SceneTask:
    """One scene with its references."""
    rng = np.random.default_rng((seed, 4, number))
    scene, hue = make_scene(int(rng.integers(2**31)), VIEWS), rng.random()
    value = rng.uniform(0.35, 0.95)
    hues = hue + APART + JITTER * np.linspace(-1, 1, REFERENCES)
    colors = np.stack([2 * np.array(colorsys.hsv_to_rgb(h % 1, 0.85, value)) - 1 for h in hues])
    own = torch.from_numpy(material(hue, rng)).float().expand(len(scene.points), -1)
    mean = torch.from_numpy(colors.mean(axis=0)).float().expand(len(scene.points), -1)
    references = paint(structures(REFERENCES, rng), colors)
    return SceneTask(scene, scene.render(own), references, scene.render(mean))


def edited(engine: VisCtrl, task: SceneTask, arm: str, seed: int) -> Tensor:
    """The views after an arm. Shapes: -> (V, 3, S, S)."""
    numbers = [REFERENCES // 2] if arm == ONE else range(REFERENCES)
    sources = [engine.reference(task.references.images[i : i + 1], mask=task.references.masks[i]) for i in numbers]
    images = [task.views[i : i + 1] for i in range(VIEWS)]
    outs = dict(edit_views(engine, images, sources, ARMS[arm], seed=seed))
    return torch.cat([outs[view].images for view in range(VIEWS)]).float().clamp(-1, 1)


def _arms(level: str) -> list[str]:
    """The arms of a level: all, or the two of the claim."""
    return list(ARMS) if level == "full" else list(ARMS)[:2]


def measure(engine: VisCtrl, config: VisCtrlConfig, level: str, seed: int) -> dict[str, dict[str, float]]:
    """Mean residual of the refit and median transfer of each arm over the scenes of a seed."""
    engine.config = dataclasses.replace(config, rounds=ROUNDS)
    tasks = [make_task(seed, number) for number in range(SCENES[level])]
    found = {}
    for name in _arms(level) if tasks else ():
        residuals, transfers = [], []
        for number, task in enumerate(tasks):
            images = edited(engine, task, name, 1000 * seed + number)
            residuals.append(task.scene.refit(images)[1])
            transfers.append(metrics.transfer(images, task.views, task.ideal, task.scene.masks))
        found[name] = {RESIDUAL: float(np.mean(residuals)), "transfer": float(torch.cat(transfers).median())}
    return found


def decide(study: Study, level: str) -> None:
    """The claim about the scene, at the levels that have one."""
    if SCENES[level]:
        study.ratio(
            "scene",
            f"refit residual over {VIEWS} views, gradual sampling / independent random references",
            ("scene, gradual sampling", RESIDUAL),
            ("scene, independent references", RESIDUAL),
            required="<= 1",
        )
    else:
        study.note("The scene of many views is measured by --full alone.")


def draw(study: Study, engine: VisCtrl, config: VisCtrlConfig, level: str) -> dict[str, str]:
    """Draw the first scene; returns its caption by the figure's name."""
    if not SCENES[level]:
        return {}
    seed = study.seeds[0]
    engine.config = dataclasses.replace(config, rounds=ROUNDS)
    task = make_task(seed, 0)
    rows = {"references": task.references.images, "views": task.views}
    titles = ("independent", "gradual", "latents", "pool of 2", "one reference")
    for arm, name in zip(_arms(level), titles, strict=False):
        rows[name] = edited(engine, task, arm, 1000 * seed)
    colors, _ = task.scene.refit(rows["gradual"])
    rows |= {"refit of gradual": task.scene.render(colors), "ideal": task.ideal}
    pictures = [to_pictures(images, *images.shape[-2:]) for images in rows.values()]
    image_grid(study.run.figure("scene"), pictures, row_titles=list(rows), cell=0.9)
    return {
        "scene": "References of nearly one material, six views of a scene, the views with one random reference each, with"
        " gradual sampling of three kinds and with one reference for all; what a refit to gradual sampling shows; the ideal."
    }
