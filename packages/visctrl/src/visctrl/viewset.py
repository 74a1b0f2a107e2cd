"""Pictures of one scene with what belongs to them, read so that they can be written back in their place.

A picture is edited upright, by the camera's tag, and written as it was stored: turned, in the same format and under the same
name, with its tag, its transparency and its color profile, so that the cameras of the scene still fit and every loader takes
the new picture as it took the old one.
"""

import os
import re
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from typing_extensions import override

from tenfold import UserError
from tenfold.readers import IMAGE_SUFFIXES, read_image
from visctrl.masks import Mask, Picture

Missing = Literal["refuse", "leave_out"]
ORIENTATION = 274
HEIC = {".heic", ".heif"}
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""From upright to stored, by the camera's tag."""
_UPRIGHT = _TURN | {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG", "WEBP": "WEBP", "TIFF": "TIFF", "BMP": "BMP", "PPM": "PPM"}


@dataclass(frozen=True)
class View:
    """One picture of a scene.

    Attributes:
        name: where it lies below the scene's folder, with slashes.
        path: the file.
        camera: what tells its camera from others.
        size: width and height that the scene's camera has, where it says so.
        mask: the scene's own mask of it, where there is one.
    """

    name: str
    path: Path
    camera: str = ""
    size: tuple[int, int] | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class ViewSet(ABC):
    """A scene.

    Attributes:
        root: its folder.
        views: its pictures, in the order of the scene.
        left_out: pictures that it names and that are not there, and why each is left out.
        remarks: what else its user should know.
    """

    root: Path
    views: Sequence[View]
    left_out: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    kind: ClassVar[str]

    @property
    def cameras(self) -> int:
        """How many cameras took the pictures."""
        return len({view.camera for view in self.views})

    @abstractmethod
    def write_rest(self, folder: Path) -> None:
        """Write all but the pictures: cameras, masks, points; as they were, without the pictures that were left out."""

    def write(self, folder: str | os.PathLike[str], pictures: Mapping[str, Picture], note: str) -> None:
        """Write the scene with other pictures, by the views' names.

        Raises:
            UserError: a view without a picture.
        """
        for view in self.views:
            if view.name not in pictures:
                raise UserError(f"{view.name}: no picture was given for this view")
            path = Path(folder) / view.name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_view(path, view, pictures[view.name], note)
        self.write_rest(Path(folder))


class FolderScene(ViewSet):
    """Pictures in a folder, at any depth."""

    kind = "folder"

    @override
    def write_rest(self, folder: Path) -> None:
        """A folder holds nothing but its pictures."""


def read_folder(root: Path, missing: Missing = "refuse", without: Path | None = None) -> FolderScene:
    """The pictures in a folder, in the order of their names with numbers as numbers.

    Args:
        root: the folder.
        missing: what to do about pictures that cannot be read for their format.
        without: a folder below it that holds something else, such as masks.

    Raises:
        UserError: no folder, or no picture in it.
    """
    if not root.is_dir():
        raise UserError(f"--data folder:{root}: no such folder")
    views, broken, other = [], {}, 0
    for path in sorted(_files(root), key=lambda p: natural(p.relative_to(root).as_posix())):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or (without is not None and path.resolve().is_relative_to(without.resolve())):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            views.append(View(name, path))
        elif path.suffix.lower() in HEIC:
            broken[name] = "HEIC pictures are not read here: convert it to JPEG or PNG"
        else:
            other += 1
    settle(str(root), broken, len(views), missing)
    remarks = [f"{other} further files in {root} are no pictures and are not written"] if other else []
    return FolderScene(root, views, broken, remarks)


def _files(root: Path) -> Iterator[Path]:
    """The files in a folder, at any depth, also through links to folders; a folder is gone through once."""
    seen = set()
    for base, folders, files in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(base))
        folders[:] = [x for x in folders if os.path.realpath(os.path.join(base, x)) not in seen]
        yield from (Path(base) / x for x in files)


def natural(name: str) -> list[Any]:
    """Key of a name in which numbers count as numbers: 2 comes before 10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def settle(where: str, broken: Mapping[str, str], there: int, missing: Missing) -> None:
    """Refuse a scene for what is missing, or say in one line each what is left out.

    Raises:
        UserError: something is missing, or nothing is left.
    """
    if broken and missing == "refuse":
        first = "; ".join(f"{name}: {why}" for name, why in list(broken.items())[:3])
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise UserError(
            f"{where}: {len(broken)} of {there + len(broken)} views cannot be edited, --missing leave_out goes on without"
            f" them: {first}{more}"
        )
    if not there:
        raise UserError(f"{where}: no picture is there to be edited")
    for name, why in broken.items():
        warnings.warn(f"{where}: {name} is left out: {why}", stacklevel=3)


def below(root: Path, given: str) -> str:
    """Where a path that a file names lies below a folder, with slashes; Windows' separators and absolute paths are understood.

    Raises:
        UserError: it leads out of the folder.
    """
    text = given if (root / given).exists() or "\\" not in given else PureWindowsPath(given).as_posix()
    base = os.path.abspath(root)
    relative = os.path.relpath(os.path.normpath(os.path.join(base, text)), base)
    if relative.startswith("..") or os.path.isabs(relative) or re.match(r"[A-Za-z]:", text):
        raise UserError(f"{given} leads out of the scene's folder {root}")
    return Path(relative).as_posix()


def read_view(view: View) -> Picture:
    """A view's picture, upright, in eight bits of color; what is transparent is white.

    Raises:
        UserError: it cannot be read, or written back in its format.
    """
    with _opened(view.path) as image:
        if image.format not in _FORMATS:
            raise UserError(
                f"{view.path}: views are written back as {', '.join(dict.fromkeys(_FORMATS.values()))}, got {image.format}"
            )
    return read_image(view.path)


def stored_size(view: View) -> tuple[int, int]:
    """Width and height of a view's picture as it is stored, which its camera's have to be."""
    with _opened(view.path) as image:
        return image.size


def upright_mask(mask: Mask, view: View) -> Mask:
    """A mask of the picture as it is stored, turned like the picture; one that fits the upright picture stays."""
    with _opened(view.path) as image:
        turn, (w, h) = _UPRIGHT.get(_tag(image)), image.size
    if turn is None or mask.shape[:2] != (h, w):
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.float32)).transpose(turn))


def write_view(path: Path, view: View, picture: Picture, note: str) -> None:
    """Write an upright picture in the place of a view's: stored as that was, in its format, with its tag and transparency.

    JPEG is written at quality 95 without subsampling, so that it is not the same bit for bit outside of a mask.

    Args:
        path: the new file.
        view: the view.
        picture: (H, W, 3) uint8, of the size of the view's upright picture.
        note: what its metadata say.
    """
    with _opened(view.path) as image:
        image.load()
        kind, turn = _FORMATS[str(image.format)], _TURN.get(_tag(image))
        more = {name: image.info[name] for name in ("exif", "icc_profile") if image.info.get(name)}
        alpha = np.asarray(image.convert("RGBA")) if image.has_transparency_data else None
    new = Image.fromarray(picture)
    stored = np.asarray(new if turn is None else new.transpose(turn))
    if alpha is not None and kind != "JPEG":
        stored = _under(stored, alpha)
    if kind == "PNG":
        about = PngImagePlugin.PngInfo()
        about.add_text("Software", "visctrl")
        about.add_text("Comment", note)
        more["pnginfo"] = about
    elif kind == "JPEG":
        more |= {"quality": 95, "subsampling": 0, "comment": note.encode()}
    elif kind == "WEBP":
        more |= {"lossless": True, "exact": True}
    elif kind == "TIFF":
        more = {"icc_profile": more["icc_profile"]} if "icc_profile" in more else {}
        if turn is not None:
            more["tiffinfo"] = {ORIENTATION: _tag_of(view.path)}
        more["description"] = note
    elif kind in {"BMP", "PPM"}:
        more = {}
    Image.fromarray(stored).save(path, format=kind, **more)


def _under(picture: NDArray[np.uint8], before: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What lies under a transparency so that the picture on white is the given one; fully transparent parts stay."""
    a = before[..., 3:].astype(np.float64) / 255
    color = 255 + (picture - 255.0) / np.where(a > 0, a, 1)
    found = np.where(a > 0, color.round().clip(0, 255), before[..., :3])
    return np.concatenate([found.astype(np.uint8), before[..., 3:]], axis=-1)


def is_heic(path: Path) -> bool:
    """Whether a file is a HEIC picture, by its ending or, under another one, by its first bytes."""
    if path.suffix.lower() in HEIC:
        return True
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in {
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"hevx",
        b"mif1",
        b"msf1",
    }


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if is_heic(path):
        raise UserError(f"{path}: HEIC pictures of phones are not read here: convert it to JPEG or PNG first")
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be decoded as an image ({' '.join(str(error).split())})") from error


def _tag(image: Image.Image) -> int:
    return int(image.getexif().get(ORIENTATION, 1))


def _tag_of(path: Path) -> int:
    with _opened(path) as image:
        return _tag(image)


def copy_below(root: Path, names: Sequence[str], folder: Path) -> None:
    """Copy files of a scene to the same places below another folder."""
    for name in dict.fromkeys(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, folder / name)
