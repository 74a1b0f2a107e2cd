"""The pairs of pictures that a command is asked for."""

from pathlib import Path

from tenfold import UserError
from visctrl.config import CompareSettings, EditSettings
from visctrl.data import Pair, read_mask, read_pairs, read_picture


def listed(settings: EditSettings | CompareSettings) -> list[Pair]:
    """The rows of the table, or the targets with the one reference.

    Raises:
        UserError: see ``read_pairs``; one mask for several targets.
    """
    if settings.pairs is not None:
        return read_pairs(settings.pairs)
    found = []
    for number, target in enumerate(settings.target or []):
        name = f"{number:04}-{Path(target).stem}"
        reference = None if settings.reference is None else Path(settings.reference)
        masks = (settings.target_mask, settings.reference_mask)
        found.append(Pair(name, Path(target), reference, *masks, settings.target_prompt, settings.reference_prompt))
    if len(found) > 1 and settings.target_mask not in {None, "alpha", "white"}:
        raise UserError("--target_mask is one file for several targets: give --pairs, or the masks alpha or white")
    return found


def check(pairs: list[Pair]) -> None:
    """Read everything that can be read before a model is loaded.

    Raises:
        UserError: see ``read_picture`` and ``read_mask``.
    """
    for pair in pairs:
        for path, mask, option in (
            (pair.target, pair.target_mask, "--target_mask"),
            (pair.reference, pair.reference_mask, "--reference_mask"),
        ):
            if path is not None:
                picture = read_picture(path)
                if mask is not None:
                    read_mask(mask, path, picture, option)
