"""A folder that grows over many commands: numbered files that never change, and an index that is renamed last.

    with Growing.open("gallery", kind="handmstn.gallery", writing=True) as gallery:
        with gallery.adding(".safetensors", {"person": "anna"}) as path:
            write(path)

A command that is killed at any moment leaves the folder as it was before: the index does not know the file yet, and the
repeated command writes the same file under the same number. Two commands that write at once are told apart by a lock, and
the second is refused; a thing that is made for several writers gives each a part of its own.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tenfold.errors import UserError
from tenfold.files import TEMPORARY, Lock, mendable, replacing
from tenfold.runs import plain

INDEX = "index"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a growing thing.

    Attributes:
        path: the file.
        about: what its writer said of it.
    """

    path: Path
    about: dict[str, Any]


class Growing:
    """The thing, as it is when it is opened; made by ``Growing.open``.

    Attributes:
        path: its folder.
        head: what holds for all of it, as its first writer said.
        entries: its files, by number; of several parts, part by part in the order of their names.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        part: str,
        head: dict[str, Any],
        lock: Lock | None,
        naming: Callable[[int], str] = "{:06d}".format,
    ) -> None:
        self.path = path
        self._naming = naming
        self.kind = kind
        self.head = head
        self._part = part
        self._lock = lock
        self._own = _entries(path, _index(path, part), kind)
        self._next = _next(_index(path, part), len(self._own) + 1)
        if lock is not None:
            self._delete_forgotten()
        self._others = {
            file.stem: _entries(path, file, kind)
            for file in sorted(path.glob(f"{INDEX}*.json"))
            if file != _index(path, part)
        }

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        kind: str,
        writing: bool = False,
        head: Mapping[str, Any] | None = None,
        part: str = "",
        option: str = "",
        naming: Callable[[int], str] = "{:06d}".format,
    ) -> "Growing":
        """Open the thing for reading, or for one command that adds to it.

        Args:
            path: its folder; made when the first file is added.
            kind: what it is, for example ``"handmstn.gallery"``; another kind is refused.
            writing: whether files are added.
            head: what holds for all of it (a model's digest, a form of features); one that differs from what is there is
                refused.
            part: name of this writer's share of a thing that is made for several writers at once; each has its own
                numbers, index and lock.
            option: option that the path came from, which a message begins with.
            naming: gives a file's name without its suffix from its number, counted from 1; default: six digits.

        Raises:
            UserError: nothing is there to be read, another kind or another head, a broken index, or (writing) another
                command is adding to it at this moment.
        """
        path = Path(path).expanduser()
        start = f"{option} {path}" if option else str(path)
        if not writing and not sorted(path.glob(f"{INDEX}*.json")):
            raise UserError(f"{start}: expected the folder of a {kind}, found no {INDEX}.json")
        lock = None
        if writing:
            with mendable(path):
                path.mkdir(parents=True, exist_ok=True)
                lock = Lock(path / f"{TEMPORARY}lock{_suffix(part)}")
                free = lock.acquire()
            if not free:
                raise UserError(f"{start}: another command is adding to it at this moment")
        try:
            there = [_read(file) for file in sorted(path.glob(f"{INDEX}*.json"))]
            wrong = [index["kind"] for index in there if index["kind"] != kind]
            if wrong:
                raise UserError(f"{start} holds a {wrong[0]}, expected a {kind}")
            if writing and not there:
                names = [p.name for p in path.iterdir() if not p.name.startswith(TEMPORARY) and not _begun(p, naming)]
                if names:
                    raise UserError(f"{start} is not empty and holds no {kind} ({', '.join(sorted(names)[:3])})")
            known = there[0]["head"] if there else None
            asked = json.loads(json.dumps(plain(dict(head)))) if head is not None else known or {}
            if known is not None and asked != known:
                changed = [key for key in {**known, **asked} if known.get(key) != asked.get(key)]
                differences = "; ".join(f"{key}: {known.get(key)!r} there, {asked.get(key)!r} here" for key in changed)
                raise UserError(f"{start} was made with something else ({differences})")
            return cls(path, kind, part, asked, lock, naming)
        except BaseException:
            if lock is not None:
                _free(lock, path)
            raise

    def _delete_forgotten(self) -> None:
        """Delete files of this writer that the index had forgotten when a kill came."""
        known, start = {entry.path for entry in self._own}, f"{self._part}-" if self._part else ""
        for path in self.path.glob(f"{start}[0-9][0-9][0-9][0-9][0-9][0-9].*"):
            number = path.name.removeprefix(start).partition(".")[0]
            if path not in known and int(number) < self._next:
                path.unlink(missing_ok=True)

    @property
    def entries(self) -> list[Entry]:
        """All files."""
        parts = {**self._others, _index(self.path, self._part).stem: self._own}
        return [entry for name in sorted(parts) for entry in parts[name]]

    @contextlib.contextmanager
    def adding(self, suffix: str, about: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Yield a temporary name; when the block ends well, it becomes the next file, and then the index knows it.

        Args:
            suffix: of the file, such as ``".safetensors"``.
            about: what is to be known of it without opening it; JSON can hold it.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        assert self._lock is not None, "opened for reading"
        path = self.path / f"{self._part + '-' if self._part else ''}{self._naming(self._next)}{suffix}"
        with replacing(path) as temporary:
            yield temporary
        self._own.append(Entry(path, json.loads(json.dumps(plain(dict(about or {}))))))
        self._next += 1
        self._write_index()

    @contextlib.contextmanager
    def replaced(self, entry: Entry, suffix: str, about: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Yield a temporary name; when the block ends well, it becomes the next file in the place of ``entry``.

        The index forgets the old file before it is deleted, so that a kill at any moment leaves one of both states; a file
        that a kill has left over is deleted when the thing is opened for writing the next time.

        Args:
            entry: one of this writer's own.
            suffix: of the new file.
            about: as for ``adding``.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        place = self._own.index(entry)
        with self.adding(suffix, about) as temporary:
            yield temporary
            del self._own[place]  # the index is written once, with the new file and without the old one
        entry.path.unlink(missing_ok=True)

    def drop(self, entry: Entry) -> None:
        """Take one of this writer's own files out of the index, and delete it.

        Raises:
            UserError: the folder cannot be written.
        """
        assert self._lock is not None, "opened for reading"
        self._own.remove(entry)
        self._write_index()
        entry.path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        files = [{"file": entry.path.name, "about": entry.about} for entry in self._own]
        index: dict[str, Any] = {"kind": self.kind, "head": self.head, "files": files}
        if self._next != len(self._own) + 1:  # a number is not used twice, also after a file is gone
            index["next"] = self._next
        with replacing(_index(self.path, self._part)) as temporary:
            temporary.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let others add to it."""
        if self._lock is not None:
            _free(self._lock, self.path)
            self._lock = None

    def __enter__(self) -> "Growing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free(lock: Lock, path: Path) -> None:
    """Release the lock; a folder that nothing was added to is gone again."""
    lock.release()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _suffix(part: str) -> str:
    if part and not all(c.isalnum() or c in "-_" for c in part):
        raise ValueError(f"a part's name holds letters, digits, - and _ only, got {part!r}")
    return f"-{part}" if part else ""


def _index(path: Path, part: str) -> Path:
    return path / f"{INDEX}{_suffix(part)}.json"


def _begun(path: Path, naming: Callable[[int], str]) -> bool:
    """Whether a file could be one that a killed first command has left."""
    return path.stem == naming(1) or _numbered(path)


def _numbered(path: Path) -> bool:
    return path.stem.rpartition("-")[2].isdigit() and len(path.stem.rpartition("-")[2]) == 6


def _read(file: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not (
            isinstance(index["kind"], str) and isinstance(index["head"], dict) and isinstance(index["files"], list)
        ):
            raise TypeError("another form")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not an index of ours ({error})") from error
    return index


def _next(file: Path, default: int) -> int:
    """Number of the next file; written down where files were taken out."""
    found = _read(file).get("next", default) if file.exists() else default
    if not isinstance(found, int) or found < default:
        raise UserError(f"{file}: not an index of ours (the next number is {found!r})")
    return found


def _entries(path: Path, file: Path, kind: str) -> list[Entry]:
    """The files of one index, each of which has to lie in the folder itself."""
    if not file.exists():
        return []
    entries = []
    for row in _read(file)["files"]:
        name = str(row["file"])
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{file} names {name}, which is no file of this {kind}")
        entries.append(Entry(path / name, dict(row["about"])))
    return entries
