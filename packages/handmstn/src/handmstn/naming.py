"""What ids and names look like that are easily mixed up; each suspicion is a warning that names the ids."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from handmstn.lists import bare
from handmstn.records import Strings


def numbered(count: int, noun: str = "picture") -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_SUFFIX = re.compile(r"(.+?)[ _.-](l|r|left|right)", re.IGNORECASE)
_ANY_SPACE = re.compile(r"\s+")


def stripped(persons: Strings) -> Strings:
    """Ids without what stands around them and nobody sees; a warning says that there was something."""
    plain = np.asarray([bare(p) for p in persons.tolist()], dtype=np.str_)
    odd = plain != persons
    if odd.any():
        name = persons[odd][0]
        warnings.warn(
            f"ids with spaces around them are taken without: {str(name)!r} and {int(odd.sum()) - 1} more", stacklevel=4
        )
    return plain


def _key(name: str) -> str:
    """What two ways of writing an id have in common: no case, no leading zeros, one kind of space."""
    plain = _ANY_SPACE.sub(" ", name).casefold()
    return re.sub(r"(?<!\d)0+(?=\d)", "", plain)


def warn_of_ids(persons: Strings, sides: Strings) -> None:
    """Warn of ids that differ in leading zeros, case or kind of space only, and of ids that seem to tell a side."""
    names = np.unique(persons).tolist()
    seen: dict[str, str] = {}
    alike = []
    for name in names:
        first = seen.setdefault(_key(name), name)
        if first != name:
            alike.append(f"{first!r} and {name!r}")
    if alike:
        more = f" and {len(alike) - 1} more such pairs" if len(alike) > 1 else ""
        warnings.warn(
            f"two people in the data, or one that is written in two ways? {alike[0]}{more}; they are taken as two",
            stacklevel=4,
        )
    unknown = np.unique(persons[sides == "unknown"]).tolist()
    told = [(name, m) for name in unknown if (m := _SUFFIX.fullmatch(name))]
    if unknown and len({m[2][0].lower() for _, m in told}) == 2 and len(told) > len(unknown) / 2:
        warnings.warn(
            f"ids such as '{told[0][0]}' seem to tell the side of a hand, which is not read from an id: left hands are not"
            " mirrored. Give the side in a column of its own (csv:) or a folder (ID/left/...)",
            stacklevel=4,
        )


def warn_of_shared_files(files: Sequence[Path], persons: Strings) -> None:
    """Warn of a file that is listed for two people."""
    owner: dict[Path, str] = {}
    shared = []
    for file, person in zip(files, persons.tolist(), strict=True):
        first = owner.setdefault(file, person)
        if first != person:
            shared.append(f"{file} for '{first}' and '{person}'")
    if shared:
        more = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
        warnings.warn(f"a picture is listed for two people: {shared[0]}{more}", stacklevel=4)


UNREAD = {
    "HEIC": (".heic", ".heif", ".hif"),
    "JPEG XL": (".jxl",),
    "raw": (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"),
    "AVIF": (".avif",),
    "PSD": (".psd",),
    "PDF": (".pdf",),
    "video": (".mov", ".mp4", ".avi"),
}
"""Files that hold pictures and are not read, as cameras and phones write them."""


def unread(files: Sequence[Path]) -> str:
    """In words, how many of the files hold pictures of kinds that are not read; empty for none."""
    kinds: dict[str, list[Path]] = {}
    for kind, suffixes in UNREAD.items():
        for file in files:
            if file.suffix.lower() in suffixes:
                kinds.setdefault(kind, []).append(file)
    if not kinds:
        return ""
    told = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
    first = next(iter(kinds.values()))[0].name
    return f"{told} (such as {first}): save them as JPEG or PNG"
