"""`handmstn predict`: embeddings, points and aligned crops of pictures."""

import sys

import numpy as np
from PIL import Image

from handmstn.commands import _pictures
from handmstn.commands._files import embedded, first_of, left_out, read, trained
from handmstn.config import PredictSettings
from tenfold.cli import Invocation
from tenfold.figures import image_grid


def run(settings: PredictSettings, invocation: Invocation) -> None:
    """Write ``embeddings.npz``, ``crops/`` and the picture ``figures/points.png``."""
    model, card, _ = trained(settings.run)
    hands = read(settings, card, model)
    found = embedded(settings, model, hands)
    folder, e = invocation.folder, found.enrolled
    weights = model.weights.detach().cpu().numpy()
    share = np.sqrt(weights[None] * e.visibility)
    fused = (share[..., None] * e.parts).reshape(len(e), -1)
    fused /= np.maximum(np.linalg.norm(fused, axis=1, keepdims=True), 1e-12)
    with folder.replacing("embeddings.npz") as path, path.open("wb") as file:
        np.savez_compressed(
            file, fused=fused.astype(np.float32), parts=e.parts, visibility=e.visibility, points=found.points,
            weights=weights, ids=e.persons, sides=e.sides, paths=e.names, guessed=e.guessed, assessable=found.shown,
            reasons=found.reasons, unlike=found.unlike,
        )  # fmt: skip
    assert found.hands.images is not None
    count = min(settings.pictures, len(e))
    if count:
        images, points = found.hands.images[:count].numpy(), found.points[:count]
        rows = _pictures.overlays(images, points, model.parts)
        image_grid(folder.figure("points"), rows, column_titles=["picture", "points", "aligned crops"], cell=1.6)
        for number, row in enumerate(rows):
            with folder.replacing(f"crops/{number + 1:04d}.png") as path:
                Image.fromarray(row[2]).save(path, "PNG")
    hidden = left_out(found)
    sys.stdout.write(f"{len(e)} embeddings of {fused.shape[1]} numbers in {folder.path / 'embeddings.npz'}")
    if hidden:
        sys.stdout.write(f"; not assessable: {first_of(hidden)}")
    sys.stdout.write("\n")
