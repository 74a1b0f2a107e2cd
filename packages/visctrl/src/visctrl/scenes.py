"""A scene by its kind and folder."""

from pathlib import Path

from tenfold.readers import parse_source
from visctrl.colmap import read_colmap
from visctrl.nerfstudio import read_nerfstudio
from visctrl.viewset import Missing, ViewSet, read_folder

KINDS = ("nerfstudio", "colmap", "folder")


def read_scene(
    source: str,
    *,
    missing: Missing = "refuse",
    reconstruction: str | None = None,
    pictures: str | None = None,
    without: Path | None = None,
) -> ViewSet:
    """The views of a scene, with all that is needed to write it again.

    Args:
        source: ``nerfstudio:DIR``, ``colmap:DIR`` or ``folder:DIR``.
        missing: what to do about views whose picture is not there: refuse, or leave_out with a warning for each.
        reconstruction: as for ``read_colmap``.
        pictures: as for ``read_colmap``.
        without: as for ``read_folder``.

    Raises:
        UserError: an unknown kind, or what its reader says.
    """
    kind, path = parse_source(source, kinds=KINDS)
    assert path is not None
    if kind == "nerfstudio":
        return read_nerfstudio(path, missing)
    if kind == "colmap":
        return read_colmap(path, missing, reconstruction, pictures)
    return read_folder(path, missing, without)
