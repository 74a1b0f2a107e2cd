"""What a trained model makes of pictures as people take them: night, motion blur, gloves, rings, a second hand, a mirror.

``python field.py --run MODEL --out FILE`` renders people whom the model has not seen (seed 7), enrolls two pictures of each as
they are, and searches for the others after each change. MODEL is the folder of a ``handmstn train`` with the preset hand6.
It prints one row per change: share of the pictures that are assessable, mean visibility of the palm, rank 1, median error of
the points in halves of the palm's width.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from handmstn import SyntheticHands
from handmstn.evaluation import Scorer
from handmstn.models import Embedded, embed, load_model
from handmstn.records import Hands, hands_of
from handmstn.rendering import Rendered
from torch import Tensor

from tenfold.terminal import table

SEED, PEOPLE, VIEWS = 7, 40, 5
Change = Callable[[Tensor, Rendered, torch.Generator], Tensor]


def plain(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """As rendered."""
    return images


def night(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """A quarter of the light, and the noise of a sensor at its limit."""
    return 0.25 * images + 0.05 * torch.randn(images.shape, generator=generator)


def motion(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """A streak of nine pixels, sideways."""
    kernel = torch.zeros(3, 1, 9, 9)
    kernel[:, 0, 4] = 1 / 9
    return F.conv2d(images, kernel, padding=4, groups=3)


def glove(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """Every pixel of the hand in one color, with the light that it had."""
    color = torch.rand(len(images), 3, 1, 1, generator=generator)
    light = images.mean(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(light, (4, 4, 4, 4), mode="replicate"), 9, 1)
    return torch.where(torch.from_numpy(made.masks)[:, None], color * smooth / 0.6, images)


def ring(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """A bright band over the lower part of the ring finger."""
    size = images.shape[-1]
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.from_numpy(made.points)[:, 9 + 6 * 3 : 9 + 6 * 4]
    middle, tip = points[:, 0:2].mean(1), points[:, 4:6].mean(1)
    along = F.normalize(tip - middle, dim=1)
    at = middle + 0.25 * (tip - middle)
    offset = torch.stack([x, y], -1)[None] - at[:, None, None]
    share = (offset * along[:, None, None]).sum(-1).abs() < 0.02
    across = (offset[..., 0] * along[:, 1, None, None] - offset[..., 1] * along[:, 0, None, None]).abs() < 0.1
    band = share & across & torch.from_numpy(made.masks)
    return torch.where(band[:, None], torch.tensor([0.9, 0.8, 0.4])[None, :, None, None], images)


def second(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """The next person's picture at half its size in a corner: two hands in one photograph."""
    size = images.shape[-1] // 2
    small = F.interpolate(images.roll(VIEWS, 0), (size, size), mode="bilinear", antialias=True, align_corners=False)
    out = images.clone()
    out[:, :, :size, :size] = small
    return out


def mirrored(images: Tensor, made: Rendered, generator: torch.Generator) -> Tensor:
    """The mirror image of a front camera, taken as it is."""
    return images.flip(-1)


CHANGES: dict[str, Change] = {
    "as rendered": plain,
    "night": night,
    "motion blur, 9 pixels": motion,
    "glove": glove,
    "ring": ring,
    "a second hand in a corner": second,
    "front camera, mirrored, not said": mirrored,
}


def hands(images: Tensor, made: SyntheticHands) -> Hands:
    """The pictures as a set of hands; nothing of the truth goes in."""
    number = np.arange(len(made)) % VIEWS
    return hands_of(
        [f"{label}/{view}" for label, view in zip(made.labels, number, strict=True)],
        [f"{label:04d}" for label in made.labels],
        "rendered",
        sides=["right"] * len(made),
        splits=["gallery" if view < 2 else "probe" for view in number],
        images=(images.clamp(0, 1) * 255).round().to(torch.uint8),
    )


def measured(
    model: object, weights: np.ndarray, enrolled: Embedded, probes: Embedded, truth: np.ndarray
) -> list[float]:
    """Share assessable, visibility of the palm, share of those asked for that look right, rank 1, error."""
    scores = Scorer(enrolled.enrolled, enrolled.hands.classes, weights).scores(probes.enrolled)
    best = enrolled.hands.classes[scores.argmax(1)]
    unit = np.linalg.norm(truth[:, 5] - truth[:, 3], axis=-1) / 2
    error = np.linalg.norm(probes.points - truth, axis=-1).mean(1) / unit
    return [
        100 * float(probes.shown.mean()),
        float(probes.enrolled.visibility[:, 0].mean()),
        100 * float((probes.right > 0.5).mean()),
        100 * float((best == probes.hands.classes).mean()),
        float(np.median(error)),
    ]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--out")
    words = parser.parse_args()
    model, card = load_model(words.run)
    made = SyntheticHands(PEOPLE, VIEWS, card["size"], SEED)
    images = torch.from_numpy(made.rendered.images).float() / 255
    split = np.arange(len(made)) % VIEWS < 2
    weights = model.weights.detach().numpy()
    enrolled = embed(model, hands(images, made).part(np.flatnonzero(split)))
    probed = np.flatnonzero(~split)
    truth = made.rendered.points[probed]
    found: dict[str, list[float]] = {}
    for name, change in CHANGES.items():
        changed = change(images, made.rendered, torch.Generator().manual_seed(SEED))
        seen = embed(model, hands(changed, made).part(probed))
        flipped = truth * np.asarray([-1, 1], np.float32) if change is mirrored else truth
        found[name] = measured(model, weights, enrolled, seen, flipped)
    columns = ["assessable (%)", "palm seen", "looks right-handed (%)", "rank 1 (%)", "error of points"]
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in found.items()]
    sys.stdout.write(table(["probes", *columns], rows) + "\n")
    if words.out:
        card = {
            "people": PEOPLE,
            "seed": SEED,
            "rows": {n: dict(zip(columns, v, strict=True)) for n, v in found.items()},
        }
        Path(words.out).write_text(json.dumps(card, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
