"""The folder that generated views lie in: it grows over many commands and many workers at once.

    views.json               what holds for all of it: plan, generator, steps, sizes; written once
    rows/PART.jsonl          one line per picture, appended and flushed after the picture; a part is one worker's
    images/KEY.V.png         the pictures, under their source's path and full name, so that no two collide

``tenfold.growing`` keeps one index per part and writes it anew for each file, which a million files do not bear; here the
index grows by a line. A line that a kill has cut short does not count and is cut off by the part's next worker. A picture
whose line is missing is made again, and is the same.
"""

import contextlib
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genview.plans import PlanRow, line_of
from tenfold import UserError
from tenfold.files import TEMPORARY, Lock, mendable, replacing, sync

HEAD = "views.json"
KIND = "genview.views"
_LONGEST = 200
"""Bytes of a file's name beyond which it is shortened, with a digest in place of what is cut."""


def file_of(key: str, variation: int, suffix: str) -> str:
    """Where the view of a source lies below the folder: under the source's own path and full name.

    Raises:
        UserError: a key that leads out of the folder.
    """
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts:
        raise UserError(f"the plan names '{key}', which leads outside of the folder of views")
    name = path.name
    raw = os.fsencode(name)
    if len(raw) > _LONGEST:
        cut = raw[: _LONGEST - 20].decode("utf-8", "ignore")
        name = f"{cut}~{hashlib.sha256(raw).hexdigest()[:16]}"
    return (PurePosixPath("images") / path.parent / f"{name}.{variation}.{suffix}").as_posix()


@dataclass(frozen=True)
class Stored:
    """What one line of a part says.

    Attributes:
        key: name of the source.
        variation: number of the view.
        path: the picture, below the folder.
        bytes: size of the file.
        crc32: checksum of the file.
        status: ok or error.
        error: why not.
        worker: part that made it.
        ms: milliseconds that it took, its share of its batch.
        at: seconds since 1970 when it was written.
    """

    key: str
    variation: int
    path: str
    bytes: int
    crc32: int
    status: str
    error: str
    worker: str
    ms: float
    at: float

    @property
    def name(self) -> tuple[str, int]:
        """What tells rows apart."""
        return self.key, self.variation


class ViewStore:
    """The folder, opened for reading or by one worker; made by ``ViewStore.open``.

    Attributes:
        path: the folder.
        head: what holds for all of it.
        part: name of this worker's part; empty for reading.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], part: str, lock: Lock | None) -> None:
        self.path, self.head, self.part = path, dict(head), part
        self._lock = lock
        self._file: io.TextIOWrapper | None = None

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, head: Mapping[str, Any] | None = None, part: str = ""
    ) -> "ViewStore":
        """Open the folder.

        Args:
            path: the folder; a worker makes it.
            head: what a worker's pictures are made with; another head there is refused.
            part: the worker's part; reading needs none.

        Raises:
            UserError: no such folder, another head, a folder of something else, or a part that another command is adding
                to at this moment.
        """
        path = Path(path).expanduser()
        file = path / HEAD
        if not part:
            return cls(path, _read_head(file), "", None)
        assert head is not None
        asked = {"kind": KIND, **json.loads(json.dumps(dict(head)))}
        with mendable(path):
            (path / "rows").mkdir(parents=True, exist_ok=True)
            lock = Lock(path / f"{TEMPORARY}lock-{part}")
            free = lock.acquire()
        if not free:
            raise UserError(f"--views {path}: another command is working on {part} at this moment")
        try:
            if not file.exists():
                others = [p.name for p in path.iterdir() if p.name != "rows" and not p.name.startswith(TEMPORARY)]
                if others and others != ["images"]:
                    raise UserError(f"--views {path} holds no views of ours ({', '.join(sorted(others)[:3])})")
                _write_once(file, asked)
            found = _read_head(file)
            if found != asked:
                changed = [k for k in {**found, **asked} if found.get(k) != asked.get(k)]
                told = "; ".join(f"{k}: {found.get(k)!r} there, {asked.get(k)!r} here" for k in changed)
                raise UserError(f"--views {path} was made with something else ({told}): give another folder")
            return cls(path, found, part, lock)
        except BaseException:
            lock.release()
            raise

    def rows(self) -> dict[tuple[str, int], Stored]:
        """Whole rows of all parts; of several for one view, the last one that is ok."""
        found: dict[tuple[str, int], Stored] = {}
        for file in sorted((self.path / "rows").glob("*.jsonl")):
            for row in _whole_rows(file):
                if row.status == "ok" or row.name not in found:
                    found[row.name] = row
        return found

    def done(self) -> set[tuple[str, int]]:
        """Views that are there: their row, and their file in its size."""
        return {name for name, row in self.rows().items() if row.status == "ok" and self.is_there(row)}

    def is_there(self, row: Stored) -> bool:
        """Whether a view's file has its size; no byte of it is read."""
        try:
            return (self.path / row.path).stat().st_size == row.bytes
        except OSError:
            return False

    def fault(self, row: Stored) -> str:
        """What is wrong with a view's file, read whole; nothing where it is as it was written."""
        try:
            content = (self.path / row.path).read_bytes()
        except OSError as error:
            return f"{row.path}: {error.strerror}"
        if len(content) != row.bytes or zlib.crc32(content) != row.crc32:
            return f"{row.path}: {len(content)} bytes, not as it was written"
        return ""

    def add(self, row: PlanRow, pixels: NDArray[np.uint8], *, ms: float = 0.0) -> None:
        """Write a picture, then its row.

        Raises:
            UserError: the disk is full or the folder cannot be written; rows that are there stay whole.
        """
        content = _encoded(pixels, str(self.head["format"]), int(self.head["quality"]), self.head["store"])
        name = file_of(row.key, row.variation, str(self.head["format"]))
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(content)
        self._append(
            Stored(
                row.key,
                row.variation,
                name,
                len(content),
                zlib.crc32(content),
                "ok",
                "",
                self.part,
                round(ms, 1),
                now(),
            )
        )

    def fail(self, row: PlanRow, error: str) -> None:
        """Write a row that says why a view could not be made."""
        self._append(Stored(row.key, row.variation, "", 0, 0, "error", error[:300], self.part, 0.0, now()))

    def _append(self, row: Stored) -> None:
        file = self.path / "rows" / f"{self.part}.jsonl"
        with mendable(file):
            if self._file is None:
                _cut_broken_end(file)
                self._file = file.open("a", encoding="utf-8")
            self._file.write(line_of(vars(row)))
            self._file.flush()

    def close(self) -> None:
        """Free the part for another worker."""
        if self._file is not None:
            with mendable(self.path):
                self._file.close()
                sync(self.path / "rows" / f"{self.part}.jsonl")
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            if not (self.path / HEAD).exists():
                for folder in (self.path / "rows", self.path):
                    with contextlib.suppress(OSError):
                        folder.rmdir()

    def __enter__(self) -> "ViewStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def now() -> float:
    """Seconds since 1970, in milliseconds."""
    return round(time.time(), 3)


def _write_once(file: Path, head: Mapping[str, Any]) -> None:
    """Write the head; of several workers that start at once, the first one's stays."""
    temporary = file.parent / f"{TEMPORARY}head-{os.getpid()}-{time.monotonic_ns()}"
    with mendable(file):
        temporary.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        sync(temporary)
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not file.exists():
                temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _read_head(file: Path) -> dict[str, Any]:
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
        if head["kind"] != KIND:
            raise KeyError("kind")
    except OSError as error:
        raise UserError(f"--views {file.parent}: expected a folder of `genview generate`, found no {HEAD}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the head of a folder of views ({error})") from error
    return dict(head)


def _whole_rows(file: Path) -> Iterator[Stored]:
    """Rows of a part, without a last line that was cut short."""
    text = file.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield Stored(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}, line {number}: not a row of ours ({error})") from error


def _cut_broken_end(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with file.open("r+b") as part:
                part.truncate(whole)


def _encoded(pixels: NDArray[np.uint8], kind: str, quality: int, store: int | None) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    if store is not None and image.size != (store, store):
        image = image.resize((store, store), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    options: dict[str, Any] = {} if kind == "png" else {"quality": quality}
    image.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind], **options)
    return out.getvalue()
