"""Readers of the files that people have, each of which checks what it reads; NumPy arrays, no torch.

Pictures by folders, ``.npz`` archives, CIFAR as published, and single pictures. Nothing is unpickled but files that are the
published ones, and no path leads out of the folder that the user gave.
"""

import dataclasses
import hashlib
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import NonFiniteError, UserError, did_you_mean, needs
from tenfold.reading import Reading

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})
_TRAIN = ("train", "training")
_TEST = ("val", "valid", "validation", "test")
"""Names of the part to test on, in this order of preference."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: (N, H, W) uint8, 0 is black; in color (N, H, W, 3), RGB.
        labels: (N,) int64, indices into ``classes``.
        classes: name of each label.
        source: where they come from, and whether they are real or rendered.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str


def parse_source(
    source: str, *, kinds: Sequence[str], embedded: Sequence[str] = (), option: str = "--data"
) -> tuple[str, Path | None]:
    """Split a ``--data`` value: ``("npz", Path("a.npz"))`` for ``npz:a.npz``, ``("digits", None)`` for ``digits``.

    Args:
        source: what the user gave.
        kinds: known kinds with a path.
        embedded: known names without one.
        option: option that gave the source, for messages.

    Raises:
        UserError: an unknown kind or name, with the nearest known ones, or a path that is not there.
    """
    kind, colon, name = source.partition(":")
    if source in embedded:
        return source, None
    if kind in kinds and name:
        path = Path(name).expanduser()
        if not os.path.exists(path):  # False, too, for a name that no file can have
            raise UserError(f"{option} {source}: no such file or folder: {path}")
        return kind, path
    if kind in kinds:
        raise UserError(f"{option} {source}: expected a path: {kind}:PATH")
    if kind in embedded:
        raise UserError(f"{option} {source}: '{kind}' is embedded and takes no path: {option} {kind}")
    forms = ", ".join([*(f"{kind}:PATH" for kind in kinds), *embedded])
    if not colon and os.path.exists(source):
        raise UserError(f"{option} {source}: a path needs its kind before it, one of {forms}")
    near = did_you_mean(kind, [*kinds, *embedded])
    raise UserError(f"{option} {source}: unknown {'kind' if colon else 'name'} '{kind}': {near} (forms: {forms})")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Pictures in one folder per class.

    Attributes:
        classes: sorted names of the classes.
        paths: files, sorted within each class.
        labels: (N,) int64, indices into ``classes``.
        skipped: files that were left out because they cannot be decoded.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    skipped: tuple[Path, ...] = ()


def image_folder(root: str | Path, reading: Reading | None = None) -> ImageFolder:
    """Read the layout ``root/class/name.png``, at any depth below the class; names that begin with a dot are skipped.

    Args:
        root: the folder.
        reading: whether pictures are decoded now, broken ones left out, links out of the root followed.

    Raises:
        UserError: no such folder, no class folder, folders that are parts (train, val...) and no classes, a class without
            pictures, a link that leads nowhere or out of the root, or pictures that cannot be decoded; one line names them.
    """
    root, reading = Path(root), reading or Reading()
    folders = _folders(root)
    if not folders:
        raise UserError(f"{root}: expected one folder per class, found none")
    if all(folder.name.lower() in (*_TRAIN, *_TEST) for folder in folders):
        found = ", ".join(folder.name for folder in folders)
        raise UserError(f"{root}: expected one folder per class, found only parts of a data set: {found}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        pictures = sorted(_pictures(folder, root, reading.follow_links))
        if not pictures:
            raise UserError(f"{folder}: no picture in this class ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += pictures
        labels += [label] * len(pictures)
    broken = _broken(paths) if reading.verify or reading.skip_bad else {}
    if broken and not reading.skip_bad:
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        first = "; ".join(list(broken.values())[:3])
        raise UserError(
            f"{len(broken)} of {len(paths)} pictures are broken, --reading.skip_bad true leaves them out: {first}{more}"
        )
    kept = [index for index, path in enumerate(paths) if path not in broken]
    numbers = np.asarray(labels, np.int64)[kept]
    if len(empty := sorted(set(range(len(folders))) - set(numbers.tolist()))):
        raise UserError(f"{folders[empty[0]]}: all pictures of this class are broken")
    return ImageFolder(tuple(folder.name for folder in folders), tuple(paths[i] for i in kept), numbers, tuple(broken))


def image_folders(root: str | Path, reading: Reading | None = None) -> tuple[ImageFolder, ImageFolder | None]:
    """Read ``root/train/class/name.png`` with a test part beside it, or ``root/class/name.png`` alone.

    The part to train on is ``train`` or ``training``, the part to test on the first of ``val``, ``valid``, ``validation``
    and ``test`` that is there, in lower or upper case. A folder of these names that holds pictures and no folders is a class.

    Returns:
        The part to train on and the part to test on, whose labels index the same class names; None where there is none.

    Raises:
        UserError: as for ``image_folder``; a part without the other; a class of the test part that is not in the train part.
    """
    root = Path(root)
    folders = _folders(root)
    train = _part(root, folders, _TRAIN)
    held = next((part for name in _TEST if (part := _part(root, folders, (name,)))), None)
    if train is None and held is not None and all(folder.name.lower() in _TEST for folder in folders):
        raise UserError(f"{root} has {held.name}, but no train beside it")
    if train is None:
        return image_folder(root, reading), None
    if held is None:
        raise UserError(f"{root} has {train.name}, but none of {', '.join(_TEST)} beside it")
    first, second = image_folder(train, reading), image_folder(held, reading)
    number = {name: label for label, name in enumerate(first.classes)}
    for name in second.classes:
        if name not in number:
            raise UserError(f"{held / name}: no such class in {train}: {did_you_mean(name, number)}")
    labels = np.asarray([number[name] for name in second.classes], np.int64)[second.labels]
    return first, ImageFolder(first.classes, second.paths, labels, second.skipped)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _part(root: Path, folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The folder of one of these names, in any case, that holds folders (of classes)."""
    found = [folder for folder in folders if folder.name.lower() in names and _folders(folder)]
    if len(found) > 1:
        raise UserError(f"{root} has {' and '.join(folder.name for folder in found)}: expected one of them")
    return found[0] if found else None


def _pictures(folder: Path, root: Path, follow_links: bool) -> Iterator[Path]:
    """The image files at any depth below a folder, each of which lies under the root where links may not lead out of it."""
    inside = root.resolve()
    waiting, seen = [folder], set()
    while waiting:
        current = waiting.pop()
        if (real := current.resolve()) in seen:
            continue  # a link to a folder above it
        seen.add(real)
        if not follow_links and not real.is_relative_to(inside):
            raise UserError(_leads_outside(current, root))
        for entry in os.scandir(current):
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                if not entry.is_file():
                    raise UserError(f"{path}: {'a link that leads nowhere' if entry.is_symlink() else 'not a file'}")
                if entry.is_symlink() and not follow_links and not path.resolve().is_relative_to(inside):
                    raise UserError(_leads_outside(path, root))
                yield path


def _leads_outside(path: Path, root: Path) -> str:
    return f"{path}: a link that leads outside of {root}; --reading.follow_links true follows it"


def _broken(paths: Sequence[Path]) -> dict[Path, str]:
    """What is wrong with each file that cannot be decoded."""
    faults = {}
    for path in paths:
        try:
            read_image(path)
        except UserError as error:
            faults[path] = str(error)
    return faults


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Decode one image file as (H, W, 3) uint8 RGB, upright by the camera's orientation tag.

    Of 16 bits per channel the upper eight are taken (value >> 8). Transparent parts lie on white. Of several frames (GIF,
    TIFF) the first is taken.

    Raises:
        UserError: unreadable, truncated, too large to be meant, or of more than 16 bits per channel; names the file.
    """
    needs("PIL", "demo")
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            try:
                upright = ImageOps.exif_transpose(image)
            except _UNDECODABLE:  # the tag alone is broken
                upright = image
            return np.asarray(_eight_bits(upright, image.format, path))
    except UserError:
        raise
    except (*_UNDECODABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded as an image ({' '.join(str(error).split())})") from error


BROKEN_ARRAYS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises of a damaged .npy or .npz file."""
_UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    zlib.error,
    struct.error,
    LookupError,
    TypeError,
    OverflowError,
)
"""What Pillow raises for broken files."""


def _eight_bits(image: "Image", kind: str | None, path: str | Path) -> "Image":
    """In RGB, of eight bits per channel; ``kind`` is the format of the file."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind in {"PNG", "PPM"}):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: expected 8 or 16 bits per channel, found an image of mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


Shape = tuple[int | str, ...]
"""Shape of an array: a number fixes a dimension; a letter leaves it open, and the same letter means the same number."""


def npz_arrays(
    path: str | Path, expected: Mapping[str, tuple[str, Shape]], *, finite: bool = True
) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file, checked; nothing is unpickled.

    ``npz_arrays(path, {"images": ("uint8", ("N", 32, 32, 3)), "labels": ("int32|int64", ("N",))})`` also makes sure that
    there are as many labels as images.

    Args:
        path: the file.
        expected: dtype (or several joined by ``|``) and shape by key. Other keys of the file are not read.
        finite: refuse NaN and infinity.

    Raises:
        UserError: no such file, not an npz, a missing key, another dtype or shape; the message names file and key.
        NonFiniteError: NaN or infinity.
    """
    path = Path(path)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        if not zipfile.is_zipfile(path):  # np.load reads other formats, too
            raise UserError(f"{path}: {'not a whole npz file' if path.exists() else 'no such file'}")
        with np.load(path, allow_pickle=False) as file:
            for key in expected:
                if key not in file.files:
                    raise UserError(f"{path}: no array '{key}': {did_you_mean(key, file.files)}")
                arrays[key] = np.asarray(file[key])
    except UserError:
        raise
    except (*BROKEN_ARRAYS, TypeError) as error:
        # TypeError: NumPy 2.3 on a member of the archive that is no array
        raise UserError(f"{path}: not a whole npz file of plain arrays ({' '.join(str(error).split())})") from error
    sizes: dict[str, tuple[int, str]] = {}
    for key, (dtypes, shape) in expected.items():
        array = arrays[key]
        fits = array.ndim == len(shape) and array.dtype in [np.dtype(dtype) for dtype in dtypes.split("|")]
        if not fits or any(isinstance(want, int) and want != n for n, want in zip(array.shape, shape, strict=True)):
            wanted = f"{dtypes.replace('|', ' or ')} ({', '.join(map(str, shape))})"
            raise UserError(f"{path}: '{key}' is {array.dtype} {array.shape}, expected {wanted}")
        for n, letter in zip(array.shape, shape, strict=True):
            if isinstance(letter, str) and sizes.setdefault(letter, (n, key))[0] != n:
                before, first = sizes[letter]
                raise UserError(f"{path}: '{key}' is {array.shape}: {letter} is {n} here, but {before} in '{first}'")
        if finite and array.dtype.kind in "fc" and not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise NonFiniteError(f"{path}: '{key}' holds {array[where]} at {where}")
    return arrays


_PARTS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("x", "y"),
)


def npz_images(path: str | Path, *, channels: Sequence[int] = (3,)) -> tuple[Images, Images | None]:
    """Images with labels from an ``.npz`` file, as (train, test).

    Arrays are ``train_images, train_labels, test_images, test_labels``, or ``x_train, y_train, x_test, y_test``, or ``x, y``
    alone (test is then None): images (N, H, W) or (N, H, W, 3) uint8, labels whole numbers from 0. ``classes``, if present,
    names them.

    Args:
        path: the file.
        channels: numbers of channels that images with an axis of channels may have.

    Raises:
        UserError: no such file, not an npz, another form, images of two sizes, a label that is negative or has no name.
    """
    path = Path(path)
    forms = _npz_forms(path)
    keys = next((keys for keys in _PARTS if keys[0] in forms), _PARTS[0])
    expected: dict[str, tuple[str, Shape]] = {}
    for number, key in enumerate(keys):
        rows = f"N{number // 2}"
        own = forms[key][0][3] if key in forms and len(forms[key][0]) == 4 else 0
        color: Shape = ((own if own in channels else channels[0]),) if own else ()
        expected[key] = ("uint8|int16|int32|int64", (rows,)) if number % 2 else ("uint8", (rows, "H", "W", *color))
    found = npz_arrays(path, expected)
    labels = {key: found[key].astype(np.int64) for key in keys[1::2]}
    top = max(int(part.max(initial=-1)) for part in labels.values())
    names = tuple(str(label) for label in range(top + 1))
    if "classes" in forms:
        dtype = forms["classes"][1]
        if dtype.kind != "U":
            raise UserError(f"{path}: 'classes' is {dtype}, expected names")
        names = tuple(map(str, npz_arrays(path, {"classes": (dtype.str, ("C",))})["classes"]))
    for key, part in labels.items():
        if len(part) and not 0 <= part.min() <= part.max() < len(names):
            wrong = int(part.min() if part.min() < 0 else part.max())
            raise UserError(f"{path}: '{key}' holds {wrong}, expected 0 to {len(names) - 1}")
    source = f"the user's: {path.name}"
    parts = [Images(found[i], labels[j], names, source) for i, j in zip(keys[::2], keys[1::2], strict=True)]
    return parts[0], parts[1] if len(parts) > 1 else None


def _npz_forms(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of the arrays, by their headers; empty for a file that cannot be read, as ``npz_arrays`` then says."""
    forms = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    old = np.lib.format.read_magic(file) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                    forms[member.removesuffix(".npy")] = shape, dtype
    except BROKEN_ARRAYS:
        return {}
    return forms


@dataclasses.dataclass(frozen=True)
class CifarFiles:
    """What CIFAR-10 or CIFAR-100 is published as: files of each part, file of the names, keys of labels and of names."""

    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


CIFAR_FILES = {
    "CIFAR-10": CifarFiles(
        tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"
    ),
    "CIFAR-100": CifarFiles(("train",), "test", "meta", "fine_labels", "fine_label_names"),
}
CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
"""Published checksums of the files of CIFAR-10 and CIFAR-100 for Python."""


def cifar(root: str | Path) -> tuple[Images, Images]:
    """CIFAR-10 or CIFAR-100 as published for Python, as (train, test); images (N, 32, 32, 3).

    Its files are pickles. A file is unpickled only if its checksum is the published one, so nothing foreign ever is.

    Args:
        root: the unpacked folder (``cifar-10-batches-py``, ``cifar-100-python``) or the one above it.

    Raises:
        UserError: no such folder, a file that is missing, or one that is not the published file; the message names it.
    """
    root = Path(root)
    folders = [root, root / "cifar-10-batches-py", root / "cifar-100-python"]
    found = [
        (folder, kind) for folder in folders for kind, files in CIFAR_FILES.items() if (folder / files.meta).is_file()
    ]
    if not found:
        raise UserError(f"{root}: expected the files of CIFAR-10 or CIFAR-100 (batches.meta or meta), found neither")
    if len(found) > 1:
        raise UserError(f"{root} holds {' and '.join(kind for _, kind in found)}: give the folder of one")
    folder, kind = found[0]
    files = CIFAR_FILES[kind]
    names = tuple(_cifar_file(folder / files.meta)[files.names])

    def part(batches: Sequence[str]) -> Images:
        contents = [_cifar_file(folder / name) for name in batches]
        rows = np.concatenate([content["data"] for content in contents])
        labels = np.concatenate([np.asarray(content[files.labels], np.int64) for content in contents])
        images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return Images(images, labels, names, f"real: {kind}, from files of the user")

    return part(files.train), part([files.test])


def _cifar_file(path: Path) -> dict[str, Any]:
    """What a published file holds."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != CIFAR_MD5[path.name]:
        raise UserError(
            f"{path} is not the published file of CIFAR (its md5 differs), and others are not unpickled: unpack the published"
            " archive again, or give your own images as npz:FILE"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy deprecates how its arrays were pickled then
        found: dict[str, Any] = pickle.loads(content, encoding="latin-1")  # noqa: S301  # by its checksum, the published one
    return found
