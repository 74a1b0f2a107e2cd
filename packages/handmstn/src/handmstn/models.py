"""A trained model as files and back, and pictures -> vectors with what was guessed on the way."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handmstn.aligner import MultiSpatialTransformer
from handmstn.config import ModelSettings
from handmstn.familiar import Familiar, even
from handmstn.gallery import Enrolled
from handmstn.parts import PALMAR, PartSpec, preset
from handmstn.recognizer import HandMSTN, assessable
from handmstn.records import Hands
from tenfold import UserError, checkpoints, runs
from tenfold.modules import evaluating
from tenfold.randomness import keyed

METHOD = "handmstn.model"
WEIGHTS = "model.safetensors"
SURE = 0.9
"""Probability from which a guessed side is taken as told."""


def parts_of(settings: ModelSettings) -> tuple[PartSpec, ...]:
    """The parts that the settings ask for."""
    return preset(settings.preset, settings.recognizer.palm_size, settings.recognizer.finger_size)


def build_aligner(settings: ModelSettings, seed: int) -> MultiSpatialTransformer | None:
    """A fresh aligner; None where points are given or there is nothing to align."""
    if settings.given_points or settings.preset not in PALMAR:
        return None
    a = settings.aligner
    parts = parts_of(settings)
    with keyed(seed, 11):
        return MultiSpatialTransformer(
            parts, a.backbone, a.levels, a.loc_size, passes=a.passes, votes=a.votes, head=a.head
        )


def build_model(settings: ModelSettings, seed: int, aligner: MultiSpatialTransformer | None) -> HandMSTN:
    """A fresh model around an aligner; its weights depend on the seed alone."""
    r = settings.recognizer
    with keyed(seed, 12):
        return HandMSTN(parts_of(settings), r.palm, r.finger, r.dim, aligner, r.pretrained, r.places)


def save_model(path: Path, model: HandMSTN, card: dict[str, Any]) -> None:
    """Write weights and card as one safetensors file."""
    checkpoints.save(path, model.state_dict(), method=METHOD, config=card)


def load_model(path: str | Path) -> tuple[HandMSTN, dict[str, Any]]:
    """The model that ``save_model`` wrote, in evaluation mode, with its card.

    Raises:
        UserError: no such file, or not one of ours.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    found = checkpoints.load(path, method=METHOD)
    try:
        settings = runs.from_plain(ModelSettings, found.config["settings"])
        size = int(found.config["size"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its card is of another version of handmstn ({error})") from error
    plain = dataclasses.replace(settings, recognizer=dataclasses.replace(settings.recognizer, pretrained=False))
    aligner = build_aligner(plain, 0) if found.config.get("aligner", True) else None
    model = build_model(plain, 0, aligner)
    if "familiar.mean" in found.tensors:  # models of versions before it have none, nor those of few pictures
        model.familiar = Familiar(len(found.tensors["familiar.mean"]))
    checkpoints.check_shapes(path, {k: v.shape for k, v in model.state_dict().items()}, found.tensors)
    model.load_state_dict(found.tensors)
    return model.eval(), {**found.config, "size": size}


def head_of(model: HandMSTN, card: dict[str, Any]) -> dict[str, Any]:
    """What a gallery of this model says of it."""
    return {
        "model": checkpoints.digest(model.state_dict())[:16],
        "version": card.get("version", ""),
        "preset": card["settings"]["preset"],
        "parts": [part.name for part in model.parts],
        "dim": model.dim,
        "weights": [round(w, 6) for w in model.weights.detach().cpu().tolist()],
    }


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What a model makes of pictures, (N,) each.

    Attributes:
        enrolled: vectors and names.
        points: control points in the picture as it was shown to the networks (left hands mirrored), (N, K, 2).
        right: probability that the picture as shown looks like a right hand; NaN without an aligner.
        unlike: how unlike the training's pictures each one is, above 1 is no hand that is known; NaN where that is not known.
        reasons: why the picture is not assessable, in words; empty where it is.
        hands: the pictures, mirrored where the side was guessed as left.
    """

    enrolled: Enrolled
    points: NDArray[np.float32]
    right: NDArray[np.float32]
    unlike: NDArray[np.float32]
    reasons: NDArray[np.str_]
    hands: Hands

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Whether each picture is assessable."""
        return self.reasons == ""

    def part(self, chosen: NDArray[Any]) -> "Embedded":
        """Some of them."""
        index = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
        arrays = self.points[index], self.right[index], self.unlike[index], self.reasons[index]
        return Embedded(self.enrolled.part(index), *arrays, self.hands.part(index))


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def given(model: HandMSTN, hands: Hands) -> Tensor | None:
    """The points that a model without an aligner needs, from the data.

    Raises:
        UserError: the data has none, or not in every picture.
    """
    if model.aligner is not None:
        return None
    if [p.name for p in model.parts] == ["hand"] and hands.points.shape[1] != 4:
        return torch.tensor(model.parts[0].points).expand(len(hands), -1, -1)
    if hands.points.shape[1] != sum(p.count for p in model.parts) or not np.isfinite(hands.points).all():
        bad = np.flatnonzero(~np.isfinite(hands.points).all((1, 2))) if hands.points.shape[1] else [0]
        name = hands.names[int(bad[0])] if len(bad) else hands.names[0]
        raise UserError(f"{hands.source}: this model takes given points, {name} has none for its parts")
    return torch.from_numpy(hands.points)


def embed(
    model: HandMSTN,
    hands: Hands,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    guess_side: bool = False,
    refuse: bool = True,
) -> Embedded:
    """Vectors of pictures, and which of them are not assessable.

    Args:
        model: the model.
        hands: decoded pictures, left hands mirrored.
        batch_size: pictures at once.
        device: where to compute.
        guess_side: mirror pictures of unknown side that look more like a right hand then; they are marked as guessed.
        refuse: whether a picture that is unlike the training's is not assessable.
    """
    assert hands.images is not None, "decoded"
    points = given(model, hands)
    visible: Tensor | None = None
    if points is not None and hands.visibility.shape[1] == len(model.parts) and np.isfinite(hands.visibility).all():
        visible = torch.from_numpy(hands.visibility)
    model = model.to(device)
    if guess_side and model.aligner is not None:
        hands = _guessed(model.aligner, hands, batch_size, device)
    assert hands.images is not None
    found: dict[str, list[NDArray[np.float32]]] = {"parts": [], "visibility": [], "points": [], "right": []}
    found |= {"unlike": [], "mirrored": [], "even": []}
    with evaluating(model):
        for rows in _batches(len(hands), batch_size):
            images = hands.images[rows].to(device).float() / 255
            own = None if points is None else points[rows].to(device)
            seen = None if visible is None else visible[rows].to(device)
            out = model(images, own, seen)
            found["parts"].append(out.parts.cpu().numpy())
            found["visibility"].append(out.visibility.cpu().numpy())
            found["points"].append(out.points.cpu().numpy())
            right = (
                torch.full((len(images),), float("nan")) if out.aligned is None else out.aligned.side_logits.sigmoid()
            )
            found["right"].append(right.cpu().numpy())
            unlike = model.unlike(out)
            mirrored, odd = torch.full_like(unlike, float("inf")), unlike > 1
            if odd.any():  # does it look like a hand in the mirror? then the side is wrong
                mirrored[odd] = model.unlike(model.locate(images[odd].flip(-1), None, None))
            found["unlike"].append(unlike.cpu().numpy())
            found["mirrored"].append(mirrored.cpu().numpy())
            found["even"].append(even(images).float().cpu().numpy())
    arrays = {name: np.concatenate(value).astype(np.float32) for name, value in found.items()}
    weights = model.weights.detach().cpu().numpy()
    digests = np.asarray([hands.digest(i) for i in range(len(hands))], dtype=np.str_)
    enrolled = Enrolled(
        arrays["parts"], arrays["visibility"], hands.persons, hands.sides, hands.names, digests, hands.guessed
    )
    reasons = np.full(len(hands), "", dtype="<U160")
    if refuse:
        for row in np.flatnonzero(arrays["unlike"] > 1):
            reasons[row] = _unlike(arrays["unlike"][row], arrays["mirrored"][row])
    reasons[~assessable(arrays["visibility"], weights)] = "too little of a hand is seen"
    reasons[arrays["even"] > 0] = "the picture is one even color"
    return Embedded(enrolled, arrays["points"], arrays["right"], arrays["unlike"], reasons, hands)


def _unlike(distance: float, mirrored: float) -> str:
    """Why a picture that is unlike the training's is not assessable."""
    if mirrored <= 1:
        return "it looks like the other hand of what it was taken for: give its side, or --reading.side auto"
    return f"it is unlike the hands that the model was trained on, {distance:.1f} times as far from them as the bound"


def _guessed(aligner: nn.Module, hands: Hands, batch_size: int, device: str) -> Hands:
    """With the side of each picture of unknown side guessed: the way round that looks more like a right hand."""
    assert hands.images is not None
    open_ones = np.flatnonzero(hands.sides == "unknown")
    if not len(open_ones):
        return hands
    images, sides, guessed = hands.images.clone(), hands.sides.copy(), hands.guessed.astype("<U60")
    with evaluating(aligner):
        for rows in _batches(len(open_ones), batch_size):
            index = open_ones[rows]
            batch = hands.images[torch.from_numpy(index)].to(device).float() / 255
            logits = aligner(batch).side_logits - aligner(batch.flip(-1)).side_logits
            for row, logit in zip(index.tolist(), logits.cpu().tolist(), strict=True):
                sides[row] = "right" if logit >= 0 else "left"
                sure = 1 / (1 + np.exp(-abs(logit) / 2))
                guessed[row] = f"side guessed: {sides[row]}" + ("" if sure >= SURE else ", unsure")
                if logit < 0:
                    images[row] = images[row].flip(-1)
    return dataclasses.replace(hands, images=images, sides=sides, guessed=guessed)
