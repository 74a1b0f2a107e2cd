"""The small models of the demonstration: trained once per seed and world, and kept in the run's folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from tenfold import checkpoints
from tenfold.terminal import track
from visctrl.toy import PatchCodec, ToyDenoiser, Training, train_toy

METHOD = "visctrl.toy"


def model_of(
    work: str, name: str, images: Callable[[], Tensor], training: Training, seed: int, quiet: bool
) -> tuple[ToyDenoiser, PatchCodec]:
    """The model ``name`` of a run, trained where it is not there yet.

    Args:
        work: the run's folder.
        name: name of the model's file below it, without its ending.
        images: makes the pictures to train on.
        training: length and rates.
        seed: seed of the training.
        quiet: whether to show no progress.
    """
    file = Path(work) / f"{name}.safetensors"
    model, codec = ToyDenoiser(), PatchCodec()
    if file.is_file():
        found = checkpoints.load(file, method=METHOD).tensors
        for prefix, part in (("model", model), ("codec", codec)):
            own = {k.removeprefix(f"{prefix}."): x for k, x in found.items() if k.startswith(f"{prefix}.")}
            part.load_state_dict(own)
        return model.eval(), codec
    show = partial(track, description=f"training of seed {seed}", quiet=quiet)
    model, codec = train_toy(images(), training, seed, show)
    tensors = {f"{n}.{k}": x for n, part in (("model", model), ("codec", codec)) for k, x in part.state_dict().items()}
    checkpoints.save(file, tensors, method=METHOD, config={"seed": seed, "steps": training.steps})
    return model, codec
