"""Scenes of COLMAP, read and written by its own library: pictures that a sparse model has placed, and the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from tenfold import UserError
from tenfold.errors import needs
from tenfold.readers import IMAGE_SUFFIXES
from visctrl.viewset import Missing, View, ViewSet, below, copy_below, settle

if TYPE_CHECKING:
    import pycolmap

MODELS = ("sparse/0", "sparse", "colmap/sparse/0", ".")
"""Where a model is looked for, in this order."""
PARTS = ("cameras", "images", "points3D", "frames", "rigs")


@dataclass(frozen=True)
class ColmapScene(ViewSet):
    """Pictures with a model.

    Attributes:
        model: folder of the model below the scene.
        carried: masks.
    """

    model: str = "sparse/0"
    carried: tuple[str, ...] = ()
    kind = "colmap"

    @override
    def write_rest(self, folder: Path) -> None:
        copy_below(self.root, self.carried, folder)
        source = self.root / self.model
        named = [f"{part}{end}" for part in PARTS for end in (".bin", ".txt")]
        there = [x for x in (*named, "points3D.ply", "project.ini") if (source / x).is_file()]
        if not self.left_out:
            copy_below(self.root, [f"{self.model}/{x}" for x in there], folder)
            return
        found = _load(source)
        names = set(self.left_out)
        frames = {image.frame_id for image in found.images.values() if image.name in names}
        for frame in frames:
            found.deregister_frame(frame)
        target = folder / self.model
        target.mkdir(parents=True, exist_ok=True)
        (found.write_text if (source / "images.txt").is_file() else found.write_binary)(str(target))


def read_colmap(
    root: Path, missing: Missing = "refuse", reconstruction: str | None = None, pictures: str | None = None
) -> ColmapScene:
    """The scene of a folder with a sparse model and pictures.

    Args:
        root: the folder.
        missing: what to do about placed pictures that are not there.
        reconstruction: folder of the model below it; default: the first of ``MODELS`` that holds one.
        pictures: folder of the pictures below it; default: images.

    Raises:
        UserError: no pycolmap, no model, one without placed pictures, no folder of pictures, or missing pictures.
    """
    needs("pycolmap", "scenes", "visctrl", why="reading COLMAP scenes")
    name, pictures = _model(root, reconstruction), pictures or "images"
    found = _load(root / name)
    if not (root / pictures).is_dir():
        raise UserError(f"--data colmap:{root}: no folder {pictures} with its pictures: name it by --pictures")
    placed = {i: found.images[i] for i in sorted(found.reg_image_ids())}
    if not placed:
        raise UserError(f"{root / name}: the model has placed no pictures")
    broken = _broken(root, pictures, found, placed)
    views = [
        _view(root, pictures, image, found.cameras[image.camera_id])
        for image in placed.values()
        if image.name not in broken
    ]
    settle(str(root / name), broken, len(views), missing)
    remarks = [*_others(root, name, len(placed)), *_not_placed(root, pictures, {x.name for x in placed.values()})]
    masks = tuple(v.mask.relative_to(root).as_posix() for v in views if v.mask is not None)
    return ColmapScene(root, views, broken, remarks, name, masks)


def _model(root: Path, reconstruction: str | None) -> str:
    asked = MODELS if reconstruction is None else (below(root, reconstruction),)
    for name in asked:
        if any((root / name / f"images{end}").is_file() for end in (".bin", ".txt")):
            return Path(name).as_posix()
    looked = ", ".join(str(root / name) for name in asked)
    raise UserError(f"--data colmap:{root}: no COLMAP model (images.bin or images.txt) in {looked}")


def _load(folder: Path) -> "pycolmap.Reconstruction":
    import pycolmap

    try:
        return pycolmap.Reconstruction(str(folder))
    except (ValueError, IndexError, KeyError, RuntimeError, OSError, MemoryError) as error:
        raise UserError(f"{folder}: COLMAP cannot read this model ({' '.join(str(error).split())})") from error


def _broken(root: Path, pictures: str, found: "pycolmap.Reconstruction", placed: dict[int, Any]) -> dict[str, str]:
    """Placed pictures that are not there, with those that hang on the same frame of a rig."""
    gone = {}
    for image in placed.values():
        try:
            place = below(root / pictures, image.name)
        except UserError as error:
            raise UserError(f"the model in {root}: {error}") from error
        if not (root / pictures / place).is_file():
            gone[image.name] = f"no such file in {pictures}"
    frames = {image.frame_id: image.name for image in placed.values() if image.name in gone}
    beside = {
        image.name: f"its frame of the rig goes with {frames[image.frame_id]}"
        for image in placed.values()
        if image.frame_id in frames and image.name not in gone
    }
    return gone | beside


def _view(root: Path, pictures: str, image: Any, camera: Any) -> View:
    name = below(root / pictures, image.name)
    masks = (root / "masks" / f"{name}.png", root / "masks" / name, root / "masks" / Path(name).with_suffix(".png"))
    mask = next((path for path in masks if path.is_file()), None)
    about = f"{image.camera_id} {camera.model.name}"
    where = Path(below(root, f"{pictures}/{name}"))
    return View(where.as_posix(), root / where, about, (camera.width, camera.height), mask)


def _others(root: Path, name: str, placed: int) -> list[str]:
    """Further models, which loaders leave unseen too."""
    parent = (root / name).parent
    found = []
    for folder in sorted(parent.iterdir()) if parent.name == "sparse" else []:
        if folder != root / name and any((folder / f"images{end}").is_file() for end in (".bin", ".txt")):
            found.append(f"{folder.name} ({len(_load(folder).reg_image_ids())} pictures)")
    if not found:
        return []
    return [
        f"{parent} holds further models, {', '.join(found)}: {Path(name).name} ({placed} pictures) was taken;"
        " --reconstruction names another"
    ]


def _not_placed(root: Path, pictures: str, placed: set[str]) -> Sequence[str]:
    inside = root / pictures
    names = [p.relative_to(inside).as_posix() for p in inside.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
    left = len(set(names) - placed)
    return [f"{left} pictures in {inside} have no pose in the model and are not written"] if left else []
