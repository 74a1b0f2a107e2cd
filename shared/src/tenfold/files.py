"""Files that appear whole or not at all, and locks that a killed process does not leave behind."""

import contextlib
import errno
import os
import re
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from tenfold.errors import UserError

TEMPORARY = ".tenfold-"
"""How names of files begin that are gone when a command ends."""
_USER_MENDABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


@contextlib.contextmanager
def mendable(path: Path) -> Iterator[None]:
    """Say in one line when the disk is full or a folder cannot be written; every other fault passes through.

    Raises:
        UserError: the system refuses to write ``path`` for a reason that the user can mend.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error


def _refusal(error: Exception) -> str | None:
    """Why the system did not write, where the user can mend it; None for every other fault."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", text)):
        number = int(match[1])
    if number is not None:
        return os.strerror(number) if number in _USER_MENDABLE else None
    # torch's writer of archives and NumPy's of arrays keep the system's number to themselves
    torchs = isinstance(error, RuntimeError) and re.search(
        r"inline_container.*unexpected pos|PytorchStreamWriter", text
    )
    numpys = isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text)
    return "it could not be written whole: is the disk full?" if torchs or numpys else None


def reserve(path: str | os.PathLike[str]) -> None:
    """Give a file of holes its whole size on the disk, so that writing to its memory map cannot fail later.

    A full disk kills a process that writes to a map of such a file, without a word.

    Raises:
        UserError: no space left.
    """
    path = Path(path)
    if hasattr(os, "posix_fallocate") and path.stat().st_size:
        with mendable(path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def sync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_mode(path: Path) -> None:
    """Give a file the mode of one that is plainly written; some libraries make theirs readable by the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; when the block ends well, fsync it and rename it onto ``path``.

    A reader, or a process that is killed at any moment, sees the old file or the new one whole. When the block raises,
    ``path`` stays as it was and the temporary file is removed. The temporary name keeps the suffix of ``path``.

    Raises:
        UserError: no space left, no permission, or a part of the path is not a folder.
    """
    path = Path(path)
    with mendable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            usual_mode(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


class Lock:
    """A lock on a file for as long as this process lives; the system takes it away from a process that is killed.

    It is this process's alone: children that it forks (the workers of a loader) do not hold it, so they do not keep it
    when their parent is killed and they live on for some seconds.

    Args:
        path: file of the lock, made when the lock is taken; its folder has to exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._free: weakref.finalize[[int, tuple[int, int]], Lock] | None = None

    def acquire(self) -> bool:
        """Take the lock; False where another process, or another ``Lock`` of this one, has it."""
        with _TAKING:
            while self._free is None:
                # the system knows processes only; and to close the file would free it
                if _identity(self.path) in _HELD:
                    return False
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                if not _lock(descriptor):
                    os.close(descriptor)
                    return False
                status = os.fstat(descriptor)
                identity = (status.st_dev, status.st_ino)
                if _identity(self.path) == identity:
                    _HELD.add(identity)
                    self._free = weakref.finalize(self, _give_back, descriptor, identity)
                else:  # its last owner has removed it meanwhile
                    os.close(descriptor)
            return True

    def release(self) -> None:
        """Give the lock back and remove its file; nothing where it was not taken."""
        if self._free is not None:
            with contextlib.suppress(PermissionError):  # Windows removes no file that is open: it stays, unlocked
                self.path.unlink(missing_ok=True)
            self._free()
            self._free = None


_HELD: set[tuple[int, int]] = set()
"""Device and number of the files that this process has locked."""
_TAKING = threading.RLock()
"""One thread at a time looks whether a file is held and takes it: between the two, another one would get it as well."""


def made_once(path: Path, make: Callable[[], None]) -> None:
    """Let one process make a file that several need, and the others wait for it; a killed maker's place is taken.

    Args:
        path: the file.
        make: makes it, whole (through ``replacing``).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        lock = Lock(path.parent / f"{path.name}.lock")
        if lock.acquire():
            try:
                if not path.exists():
                    make()
            finally:
                lock.release()
        else:
            time.sleep(0.3)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _give_back(descriptor: int, identity: tuple[int, int]) -> None:
    _HELD.discard(identity)
    os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True
