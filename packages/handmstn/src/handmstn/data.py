"""Readers of the layouts that people have; each checks what it reads, and a guess is marked as one."""

import csv
import dataclasses
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from handmstn.config import DATA_KINDS, EMBEDDED_DATA, HandReading
from handmstn.landmarks import in_pixels, read_json, read_mat
from handmstn.lists import SIDES, picture_size, read_csv, read_list, resolve, spread, text_of
from handmstn.naming import stripped, unread, warn_of_ids, warn_of_shared_files
from handmstn.parts import PartSpec, preset
from handmstn.protocols import HALVES, halves
from handmstn.records import Hands, hands_of, to_unit
from handmstn.rendering import SyntheticHands
from tenfold import UserError, readers

RENDERED = "rendered hands"


def load(
    source: str, reading: HandReading, parts: tuple[PartSpec, ...] = (), *, seed: int = 0, first: int = 0
) -> Hands:
    """Read what ``--data`` names, every picture in memory, left hands mirrored.

    Args:
        source: KIND:PATH, or hands.
        reading: settings.
        parts: parts whose control points are wanted; () reads none.
        seed: seed of rendered hands.
        first: number of the first rendered person.

    Raises:
        UserError: an unknown kind, a file that is missing, broken or of another layout; the message names it.
    """
    hands = listed(source, reading, parts, seed=seed, first=first)
    decoded = hands.decoded(reading.size, skip_bad=reading.skip_bad)
    if len(decoded.skipped):
        warnings.warn(f"{source}: {len(decoded.skipped)} rows left out, the first: {decoded.skipped[0]}", stacklevel=2)
    return decoded.rightened(parts)


def listed(
    source: str, reading: HandReading, parts: tuple[PartSpec, ...] = (), *, seed: int = 0, first: int = 0
) -> Hands:
    """What ``--data`` names, not decoded yet.

    Raises:
        UserError: as for ``load``, except for broken pictures.
    """
    kind, path = readers.parse_source(source, kinds=DATA_KINDS, embedded=EMBEDDED_DATA)
    if path is None:
        hands = rendered(reading, seed, first)
        if parts and [p.name for p in parts] != [p.name for p in hand6_like(hands)]:
            hands = with_parts(hands, parts)
    else:
        hands = _READERS[kind](path, reading, parts)
    return _sided(dataclasses.replace(hands, identity=reading.identity), reading)


def _sided(hands: Hands, reading: HandReading) -> Hands:
    """With sides filled in and exchanged as asked, and what was guessed marked."""
    sides, guessed = hands.sides.copy(), hands.guessed.astype("<U40")
    open_ones = sides == "unknown"
    if reading.side in {"left", "right"}:
        sides[open_ones] = reading.side
    elif open_ones.any():
        guessed[open_ones] = "side unknown: taken as a right hand"
    if reading.mirrored:
        turned = {"left": "right", "right": "left", "unknown": "unknown"}
        sides = np.asarray([turned[s] for s in sides.tolist()], dtype=np.str_)
    persons = stripped(hands.persons)
    warn_of_ids(persons, sides)
    if hands.files:
        warn_of_shared_files(hands.files, persons)
    return dataclasses.replace(hands, sides=sides, guessed=guessed, persons=persons)


def rendered(reading: HandReading, seed: int = 0, first: int = 0) -> Hands:
    """Rendered right hands with points and visibility; of each person, the first third of the pictures is the gallery."""
    made = SyntheticHands(reading.people, reading.views, reading.size, seed, first, reading.domain)
    count = len(made)
    number = np.arange(count) % reading.views
    names = [f"{label:04d}/{view:02d}.png" for label, view in zip(made.labels, number, strict=True)]
    splits = ["gallery" if view < max(1, reading.views // 3) else "probe" for view in number]
    r = made.rendered
    return hands_of(
        names,
        [f"{label:04d}" for label in made.labels],
        f"{RENDERED}, world {reading.domain}",
        sides=["right"] * count,
        views=["palmar"] * count,
        splits=splits,
        points=r.points,
        visibility=r.visibility,
        images=torch.from_numpy(r.images),
    )


def hand6_like(hands: Hands) -> tuple[PartSpec, ...]:
    """The parts whose points rendered hands have."""
    return preset("hand6")


def with_parts(hands: Hands, parts: tuple[PartSpec, ...]) -> Hands:
    """Points of palm and fingers as the points of other parts; visibility follows the names, or is unknown."""
    own = hand6_like(hands)
    ends = np.cumsum([0, *(p.count for p in own)])
    names = [p.name for p in own]
    found: list[NDArray[np.float32]] = []
    visible = np.full((len(hands), len(parts)), np.nan, np.float32)
    for column, part in enumerate(parts):
        finger = part.name.partition("-")[0]
        if part.name in names:
            place = names.index(part.name)
            found.append(hands.points[:, ends[place] : ends[place + 1]])
            visible[:, column] = hands.visibility[:, place]
        elif finger in names and part.family == "similarity":
            found.append(np.stack([_joint(hands.points, ends, int(w)) for w in part.name.rsplit("-", 2)[1:]], 1))
            visible[:, column] = hands.visibility[:, names.index(finger)]
        else:
            found.append(np.full((len(hands), part.count, 2), np.nan, np.float32))
    return dataclasses.replace(hands, points=np.concatenate(found, 1), visibility=visible)


def _joint(points: NDArray[np.float32], ends: NDArray[np.int64], number: int) -> NDArray[np.float32]:
    """A landmark of the 21 out of the control points: the wrist is the palm's lower edge, joints lie along a finger's axis."""
    if number == 0:
        wrist: NDArray[np.float32] = points[:, 7]
        return wrist
    finger, step = divmod(number - 1, 4)
    strip = points[:, ends[1 + finger] : ends[2 + finger]].reshape(len(points), 3, 2, 2).mean(2)  # base, middle, tip
    share = (-0.12, 0.42, 0.72, 1.0)[step]
    low, high, t = (0, 1, share / 0.5) if share < 0.5 else (1, 2, share / 0.5 - 1)
    out: NDArray[np.float32] = strip[:, low] * (1 - t) + strip[:, high] * t
    return out


def wanted_parts(parts: tuple[PartSpec, ...], given_points: bool) -> tuple[PartSpec, ...]:
    """Parts whose points are read for a model: for the whole picture none, or those of hand6 where a box is wanted."""
    if [part.name for part in parts] == ["hand"]:
        return preset("hand6") if given_points else ()
    return parts


def boxed(hands: Hands, parts: tuple[PartSpec, ...], given_points: bool) -> Hands:
    """With the corners of a box as points, for a model that reads a box of the hand; else as it is."""
    if [part.name for part in parts] != ["hand"] or not given_points:
        return hands
    return dataclasses.replace(hands, points=boxes(hands), visibility=np.zeros((len(hands), 0), np.float32))


def boxes(hands: Hands, margin: float = 0.1) -> NDArray[np.float32]:
    """Corners of a square box around the points of each picture, (N, 4, 2), for the preset ``whole``.

    Raises:
        UserError: a picture has no points.
    """
    if not hands.has_points or not np.isfinite(hands.points).all():
        raise UserError(f"{hands.source}: a box needs points in every picture")
    low, high = hands.points.min(1), hands.points.max(1)
    middle, half = (low + high) / 2, (high - low).max(1, keepdims=True) / 2 * (1 + margin)
    corners = np.asarray([(-1, -1), (1, -1), (-1, 1), (1, 1)], np.float32)
    out: NDArray[np.float32] = middle[:, None] + half[:, None] * corners
    return out


# Layouts on disk


def _pictures(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder")
    files = sorted(p for p in root.rglob("*") if p.is_file())
    shown = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    found = [p for p in shown if p.suffix.lower() in readers.IMAGE_SUFFIXES]
    others = unread(shown)
    if not found:
        raise UserError(f"{root}: no picture in it" + (f" that can be read: {others}" if others else ""))
    if others:
        warnings.warn(f"{root}: not read: {others}", stacklevel=5)
    return found


def _loose(path: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """A picture, or all pictures below a folder, of hands of whom nobody knows whose they are; every id is empty."""
    files = [path] if path.is_file() else _pictures(path)
    names = [f.name if path.is_file() else f.relative_to(path).as_posix() for f in files]
    return hands_of(names, [""] * len(files), f"the user's pictures ({path.name})", files=files)


def with_ids(hands: Hands, source: str) -> Hands:
    """The same hands, after a check that it is known whose they are.

    Raises:
        UserError: they were read by ``pictures:``, which asks for no ids.
    """
    if (hands.persons == "").any():
        raise UserError(
            f"--data {source}: it is not known whose hands these are; expected imagefolder:DIR (ID/picture) or csv:FILE"
        )
    return hands


def _image_folder(root: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """ID/name.jpg, ID/left/name.jpg, or train|gallery|probe|test/ID/...; an id is a folder's name."""
    files, rows = _pictures(root), []
    wanted = {"train", "gallery", "probe", "test", "query"}
    tops = {p.relative_to(root).parts[0].lower() for p in files}
    parted = tops <= wanted
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        split = folders[0].lower() if parted and folders else ""
        inner = list(folders[1:] if parted else folders)
        side = SIDES[inner.pop().lower()] if len(inner) > 1 and inner[-1].lower() in {"left", "right"} else "unknown"
        if not inner:
            raise UserError(f"{file}: expected {root}/ID/{file.name}, found a picture outside of any person's folder")
        rows.append((inner[0], side, "probe" if split == "query" else split))
    inside = root.resolve()
    for file in files:
        if not reading.follow_links and not file.resolve().is_relative_to(inside):
            raise UserError(f"{file}: a link that leads outside of {root}; --reading.follow_links true follows it")
    persons, sides, splits = zip(*rows, strict=True)
    names = [f.relative_to(root).as_posix() for f in files]
    return hands_of(names, persons, f"the user's pictures ({root.name})", files=files, sides=sides, splits=splits)


def _named(root: Path, pattern: str, form: str, skip_bad: bool) -> tuple[list[Path], list[re.Match[str]], list[str]]:
    """The pictures below a folder whose names have a form."""
    files, matches, skipped = [], [], []
    for file in _pictures(root):
        match = re.fullmatch(pattern, file.stem, re.IGNORECASE)
        if match is None:
            if not skip_bad:
                raise UserError(f"{file}: expected a name like {form}; --reading.skip_bad true leaves others out")
            skipped.append(f"{file}: no name like {form}")
            continue
        files.append(file)
        matches.append(match)
    if not files:
        raise UserError(f"{root}: no picture has a name like {form}")
    return files, matches, skipped


def _ntu_pi(root: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """SUBJECT-L1-Class7.jpg; odd indices are the gallery (and are trained on), even ones the probes; landmarks/*.mat beside."""
    folder = next((root / name for name in ("img", "images", "NTU-PI-v1") if (root / name).is_dir()), root)
    form = "0001-L1-Class7.jpg"
    files, matches, skipped = _named(folder, r"(.+)-([LR])(\d+)-Class(\d+)", form, reading.skip_bad)
    sides = [SIDES[m[2].lower()] for m in matches]
    splits = ["gallery" if int(m[3]) % 2 else "probe" for m in matches]
    names = [f.relative_to(root).as_posix() for f in files]
    # a class is a palm already, so that left and right of a subject have classes of their own
    persons = [f"Class{m[4]}" for m in matches]
    found = hands_of(
        names,
        persons,
        f"real: NTU-PI (the user's copy, {root.name})",
        files=files,
        sides=sides,
        splits=splits,
        skipped=skipped,
    )
    marks = next((root / n for n in ("landmarks", "Landmarks") if (root / n).is_dir()), None)
    return found if marks is None or not parts else with_landmark_files(found, marks, "mat", parts)


def with_landmark_files(
    hands: Hands, folder: Path, kind: str, parts: tuple[PartSpec, ...], unit: str | None = None
) -> Hands:
    """With the landmarks that lie in a folder under the pictures' names, ``.mat`` or ``.json``.

    Pictures of one name in several folders have their landmarks in folders of the same names.

    Args:
        hands: the pictures.
        folder: where the files lie, at any depth.
        kind: mat or json.
        parts: parts whose control points are wanted.
        unit: unit of JSON files that do not have one by their form: pixels, unit or share; None is the form's own.

    Raises:
        UserError: no picture has a file of landmarks, one cannot be read, or it is not clear whose it is.
    """
    if not folder.is_dir():
        raise UserError(f"--landmarks {kind}:{folder}: expected a folder with one .{kind} file per picture")
    there: dict[str, list[Path]] = {}
    for found in sorted(folder.rglob(f"*.{kind}")):
        there.setdefault(found.stem.lower(), []).append(found)
    stems = [file.stem.lower() for file in hands.files]
    alike = Counter(stems)
    out = np.full((len(hands), sum(part.count for part in parts), 2), np.nan, np.float32)
    sides = hands.sides.copy()
    count = 0
    for row, file in enumerate(hands.files):
        mark = _mark_of(file, there.get(stems[row], []), alike[stems[row]], folder)
        if mark is None:
            continue
        landmarks = read_mat(mark) if kind == "mat" else read_json(mark, unit=unit)
        width, height = picture_size(file)
        placed = to_unit(in_pixels(landmarks, width, height), width, height)
        if np.abs(placed).max() > 2:
            raise UserError(
                f"{mark}: its landmarks lie far outside of {file.name} of {width} x {height} pixels: made for another size of"
                " it, or in another unit (--unit)?"
            )
        out[row] = spread(placed, parts)
        if sides[row] == "unknown":
            sides[row] = landmarks.side
        count += 1
    if not count:
        raise UserError(f"{folder}: no .{kind} file has the name of a picture, such as {hands.files[0].stem}.{kind}")
    visibility = np.full((len(hands), len(parts)), np.nan, np.float32)
    return dataclasses.replace(hands, points=out, visibility=visibility, sides=sides)


def _mark_of(file: Path, found: list[Path], pictures: int, folder: Path) -> Path | None:
    """The file of landmarks of a picture among those of its name; None where there is none."""
    if len(found) < 2 and pictures < 2:
        return found[0] if found else None
    near = [mark for mark in found if mark.parent.name.lower() == file.parent.name.lower()]
    if len(near) > 1 or (found and not near):
        raise UserError(
            f"{folder}: {len(found)} files {found[0].name} for {pictures} pictures of that name: put them into folders that are"
            f" called as those of the pictures ({file.parent.name}/{found[0].name})"
        )
    return near[0] if near else None


def _hands_11k(root: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """HandInfo.csv beside the folder Hands; pictures with accessories are left out, as the protocol has it."""
    info = root / "HandInfo.csv"
    folder = root / "Hands" if (root / "Hands").is_dir() else root
    table = csv.DictReader(io.StringIO(text_of(info), newline=""))
    needed = {"id", "accessories", "aspectOfHand", "imageName"}
    if not needed <= set(table.fieldnames or []):
        raise UserError(f"{info}: no column '{sorted(needed - set(table.fieldnames or []))[0]}'")
    rows = []
    skipped = []
    for number, row in enumerate(table, 2):
        aspect = row["aspectOfHand"].strip().lower().split()
        if len(aspect) != 2 or aspect[1] not in {"left", "right"}:
            raise UserError(
                f"{info}, row {number}: aspectOfHand '{row['aspectOfHand']}', expected such as 'palmar right'"
            )
        if row["accessories"].strip() == "1":
            skipped.append(f"{info}, row {number}: with accessories")
            continue
        try:
            file = resolve(folder, row["imageName"].strip(), f"{info}, row {number}", reading.follow_links)
        except UserError as error:
            if not reading.skip_bad:
                raise
            skipped.append(str(error))
            continue
        rows.append((row["imageName"].strip(), row["id"], aspect[1], aspect[0], file))
    if not rows:
        raise UserError(f"{info}: no picture without accessories")
    names, persons, sides, views, files = zip(*rows, strict=True)
    source = f"real: 11k Hands (the user's copy, {root.name})"
    splits = []
    for person, side, view in zip(persons, sides, views, strict=True):
        first = halves([person.strip()], HALVES.get((view, side)))[0] if person.strip().isdigit() else False
        splits.append("train" if first else "test")
    return hands_of(names, persons, source, files=files, sides=sides, views=views, splits=splits, skipped=skipped)


def _hd(root: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """1-501/ID_N.jpg, half of the people for training, and 502-712/ID_N.jpg, whose people are in galleries alone."""
    files, matches, skipped = _named(root, r"(\d+)_(\d+)", "17_3.jpg", reading.skip_bad)
    persons = [m[1] for m in matches]
    extra = [f.relative_to(root).parts[0].startswith("502") for f in files]
    people = np.unique([p for p, more in zip(persons, extra, strict=True) if not more])
    first = set(people[: len(people) // 2].tolist())
    splits = [
        "distractor" if more else "train" if p in first else "test" for p, more in zip(persons, extra, strict=True)
    ]
    names = [f.relative_to(root).as_posix() for f in files]
    source = f"real: PolyU HD (the user's copy, {root.name})"
    views = ["dorsal"] * len(files)
    return hands_of(names, persons, source, files=files, views=views, splits=splits, skipped=skipped)


def _palm_roi(root: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """Palms that others have cut out: CASIA (0001_m_l_05.jpg) or IITD (001_5.bmp, in folders Left and Right)."""
    form = "0001_m_l_05.jpg or 001_5.bmp"
    files, matches, skipped = _named(root, r"(\d+)_(?:([mf])_([lr])_)?(\d+)", form, reading.skip_bad)
    sides = []
    for file, match in zip(files, matches, strict=True):
        folders = " ".join(file.relative_to(root).parts[:-1]).lower()
        own = match[3] or ("left" if "left" in folders else "right" if "right" in folders else "")
        sides.append(SIDES[own.lower()])
    names = [f.relative_to(root).as_posix() for f in files]
    source = f"real: cut palms (the user's copy, {root.name})"
    return hands_of(names, [m[1] for m in matches], source, files=files, sides=sides, skipped=skipped)


_Reader = Callable[[Path, HandReading, tuple[PartSpec, ...]], Hands]
_READERS: dict[str, _Reader] = {
    "pictures": _loose,
    "imagefolder": _image_folder,
    "csv": read_csv,
    "list": read_list,
    "ntu-pi": _ntu_pi,
    "hands11k": _hands_11k,
    "hd": _hd,
    "palm-roi": _palm_roi,
}
