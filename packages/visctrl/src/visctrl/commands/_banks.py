"""A recorded reference as files, and back."""

from pathlib import Path
from typing import Any

from tenfold import UserError, checkpoints, runs
from tenfold.runs import Run
from visctrl.banks import FeatureBank
from visctrl.commands._work import Prepared, one_round
from visctrl.config import BankSettings
from visctrl.data import read_picture, write_picture
from visctrl.engine import Features, Reference, VisCtrl
from visctrl.errors import BankMismatchError
from visctrl.inversion import Trajectory
from visctrl.masks import Picture

BANK, REFERENCE, LATENTS = "bank.safetensors", "reference.safetensors", "latents.safetensors"


def write(run: Run, reference: Reference, features: Features, shown: Prepared) -> None:
    """Write trajectory, features, latents with their mask, and the picture as the model saw it."""
    assert features.bank is not None
    features.trajectory.save(run.own(REFERENCE))
    features.bank.save(run.own(BANK))
    tensors = {"latents": reference.latents}
    if reference.mask is not None:
        tensors["mask"] = reference.mask
    config = {"size": list(reference.size), "prompt": reference.conditions.prompt}
    checkpoints.save(run.own(LATENTS), tensors, method="visctrl.reference", config=config)
    with run.replacing("reference.png") as temporary:
        write_picture(temporary, shown.shown, "reference of a visctrl bank")


def read(engine: VisCtrl, folder: str) -> tuple[Reference, Picture]:
    """The reference of a finished `visctrl bank`, for an engine with the same settings.

    Raises:
        UserError: no such run.
        BankMismatchError: of another model, schedule, size or settings.
    """
    found: Any = runs.read(folder, BankSettings, package="visctrl", verb="bank")
    then, now = one_round(found.settings.control), one_round(engine.config)
    for name in ("steps", "start", "layers", "refine", "guidance_rows", "inversion_guidance"):
        if getattr(then, name) != getattr(now, name):
            raise BankMismatchError(
                f"--run {folder} was recorded with --control.{name} {getattr(then, name)}, not {getattr(now, name)}"
            )
    if (engine.guidance(then) > 1) != (engine.guidance(now) > 1):
        raise BankMismatchError(f"--run {folder} was recorded with --control.guidance {engine.guidance(then):g}")
    if any(x is not None for x in (engine.config.later_steps, engine.config.later_start)):
        raise UserError("a bank is of one schedule: leave out --control.later_steps and --control.later_start")
    path = Path(found.path)
    saved = checkpoints.load(path / LATENTS, method="visctrl.reference")
    h, w = saved.config["size"]
    reference = Reference(
        saved.tensors["latents"].to(engine.adapter.device),
        engine.conditions(saved.config["prompt"]),
        saved.tensors.get("mask"),
        (int(h), int(w)),
    )
    engine.adopt(reference, Features(Trajectory.load(path / REFERENCE), FeatureBank.load(path / BANK)))
    return reference, read_picture(path / "reference.png")


def summary(features: Features) -> dict[str, Any]:
    """What a bank holds, in numbers."""
    assert features.bank is not None
    residual = features.trajectory.residual
    return {
        "timesteps": [t / 10_000 for t in features.bank.times],
        "layers": features.bank.layers,
        "bytes": features.bank.nbytes,
        "residual": float(residual.max()),
        "fallen_back": int(features.trajectory.fallen_back.sum()),
    }
