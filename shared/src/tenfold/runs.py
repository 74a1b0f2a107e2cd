"""A run folder: settings, environment, metrics and results of one command, whole or not at all, and safe to resume.

A folder belongs to a run when it holds ``run.json``: the package, the verb, whether it has finished, and the name of
every file that the run has written, so that starting anew deletes those and nothing else.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import yaml

from tenfold.config import nested
from tenfold.errors import UserError
from tenfold.files import TEMPORARY, Lock, mendable, replacing, sync, usual_mode

MANIFEST = "run.json"
_LOCK = f"{TEMPORARY}lock"
_ABOUT = (MANIFEST, "config.yaml", "environment.json")
"""Files that say what a run is; every other one is a result."""
S = TypeVar("S")


def launched_rank() -> int:
    """Number of this process among those that a launcher (Lightning, torchrun, SLURM) started for one command; else 0."""
    return max(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def plain(value: Any) -> Any:
    """``value`` as the plain dicts, lists, strings and numbers that YAML and JSON hold; dataclasses become dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return out


def environment(package: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run depended on besides its settings: versions, seed, device, threads, machine and git state."""
    versions = {}
    requirements: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        requirements = importlib.metadata.requires(package) or []
    for name in sorted({package, "tenfold", *(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements)}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else os.cpu_count()
    options = flat(settings)
    return {
        "package": package,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "seed": options.get("seed", options.get("seeds")),
        "device": options.get("device", "cpu"),
        "threads": threads,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the repository around the working directory, or None outside of one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S607
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "clean": not status.stdout.strip()}


class Run:
    """One output folder of one verb. Made by ``Run.open``; every file that it writes appears whole or not at all.

    A run is a context: at its end the folder is free for another command again, and where the command was refused
    (``UserError``) before it wrote a result, nothing of it is left behind.

    Attributes:
        path: the folder.
        package: distribution whose command writes it.
        verb: the command.
        settings: the resolved settings, as plain dicts.
        resumed: True when this continues an unfinished run.
        writes: False in the further processes of a command that a launcher runs several times: they share the folder,
            and the first process alone writes to it. What they write is dropped, until they call ``share``.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], settings: dict[str, Any], resumed: bool, lock: Lock | None = None
    ) -> None:
        self.path = path
        self.package: str = manifest["package"]
        self.verb: str = manifest["verb"]
        self.settings = settings
        self.resumed = resumed
        self.writes = launched_rank() == 0
        self._shares = False
        self._manifest = manifest
        self._lock = lock
        self._made: list[Path] = []  # folders that opening has made, innermost last
        self._begun = False
        self._old: list[str] = []  # files of the run that is started anew over
        self._prepared: set[str] = set()  # files that are no results

    @property
    def finished(self) -> bool:
        """True when there is nothing left to do."""
        return bool(self._manifest["finished"])

    @property
    def version(self) -> str:
        """Version of the distribution whose command writes the run; empty where it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        package: str,
        verb: str,
        settings: Any,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "Run":
        """Start, continue or refuse, by what the folder holds; nothing in it changes before the first file is written.

        | folder                      | no flag | resume           | overwrite                                    |
        |-----------------------------|---------|------------------|----------------------------------------------|
        | missing or empty            | start   | start            | start                                        |
        | unfinished run of this verb | refuse  | continue         | start anew, deleting what that run wrote     |
        | finished run of this verb   | refuse  | nothing to do    | start anew, likewise                         |
        | anything else               | refuse  | refuse           | refuse                                       |

        Args:
            path: the folder.
            package: distribution name.
            verb: the command that writes the folder.
            settings: a dataclass or mapping; written to ``config.yaml``.
            resume: continue an unfinished run. Changed settings refuse with their differences.
            overwrite: start anew over a run of this verb.

        Raises:
            UserError: the folder is refused, or another command is writing to it at this moment.
        """
        path = Path(path)
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        asked = plain(settings)
        new = {"package": package, "verb": verb, "finished": False, "files": []}
        if launched_rank() > 0:  # the first process has refused what is to be refused
            found = _read_manifest(path, package, verb) if resume and path.exists() else None
            return cls(path, found or new, asked, resumed=found is not None)
        made = [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
        lock = Lock(path / _LOCK)
        with mendable(path):
            path.mkdir(parents=True, exist_ok=True)
            free = lock.acquire()
        if not free:
            raise UserError(f"{path}: another command is writing to this folder at this moment")
        run = cls(path, new, asked, False, lock)
        run._made = made
        try:
            with mendable(path):
                found = _read_manifest(path, package, verb)
            if found is not None and not (resume or overwrite):
                state = "a finished" if found["finished"] else "an unfinished"
                raise UserError(
                    f"{path} holds {state} run of '{package} {verb}': --resume continues it, --overwrite starts anew"
                )
            if found is not None and resume:
                run._manifest, run.resumed = found, True
                if (path / "config.yaml").exists():
                    run._refuse_changed_settings()
            elif found is not None:
                run._old = [*found["files"], MANIFEST]
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError) and not self.resumed and not self._has_results():
            self._withdraw()
        self.close()

    def close(self) -> None:
        """Free the folder for other commands; where nothing was written, folders that opening has made are gone again."""
        if self._lock is None:
            return
        self._lock.release()
        self._lock = None
        for folder in reversed(self._made):
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def _has_results(self) -> bool:
        results = set(self._manifest["files"]) - {*_ABOUT, *self._prepared}
        return any((self.path / name).exists() for name in results)

    def _withdraw(self) -> None:
        """Delete what says that a run was begun."""
        if self._begun:
            for name in [*self._manifest["files"], *_ABOUT]:
                _delete(self.path, name)
            self._begun = False

    def _begin(self) -> None:
        """Make the folder this run's, with the first file that it writes."""
        if self._begun or not self.writes:
            return
        self._begun = True
        for name in self._old:
            with mendable(self.path):
                _delete(self.path, name)
        self._remove_temporaries()
        self._save_manifest()
        self.write_text("config.yaml", yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True))
        self.write_json("environment.json", environment(self.package, self.settings))

    def _refuse_changed_settings(self) -> None:
        then = flat(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")) or {})
        now = flat(json.loads(json.dumps(self.settings)))
        changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if changed:
            differences = "; ".join(f"{key}: {then.get(key)!r} -> {now.get(key)!r}" for key in changed)
            raise UserError(f"{self.path} was begun with other settings ({differences}): resume with the same ones")

    def _remove_temporaries(self) -> None:
        for left in sorted(self.path.rglob(f"{TEMPORARY}*")):
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _LOCK:
                left.unlink(missing_ok=True)

    def _save_manifest(self) -> None:
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(self._manifest, indent=1), encoding="utf-8")

    def own(self, name: str, *, result: bool = True) -> Path:
        """Remember ``name`` as a file of this run (so that starting anew may delete it) and return its path.

        Args:
            name: path below the run's folder.
            result: False for a file that is prepared for the work and goes again if the command is refused after all.

        Raises:
            UserError: the name leads outside of the folder.
        """
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{name} leads outside of the run folder {self.path}")
        self._begin()
        if not result:
            self._prepared.add(name)
        if self.writes and name not in self._manifest["files"]:
            self._manifest["files"].append(name)
            self._save_manifest()
        return path

    def figure(self, name: str) -> Path:
        """Remember ``figures/NAME.png`` as a picture of this run and return its path."""
        return self.own(f"figures/{name}.png")

    def adopt(self, folder: str) -> None:
        """Remember every file below ``folder`` (another library has written them) as a file of this run."""
        for path in sorted((self.path / folder).rglob("*")):
            if path.is_file():
                self.own(path.relative_to(self.path).as_posix())

    def share(self, names: Iterable[str]) -> None:
        """From now on every process of this command writes files of its own, whole or not at all.

        All of them call it, and the further ones write nothing until the first has returned from it.

        Args:
            names: all files that any of the processes may write, so that the first remembers them as files of this run.

        Raises:
            UserError: a name leads outside of the folder.
        """
        self._shares = True
        if self.writes:
            self._begin()
            paths = {name: self.path / name for name in names}
            outside = [name for name, path in paths.items() if not path.resolve().is_relative_to(self.path.resolve())]
            if outside:
                raise UserError(f"{outside[0]} leads outside of the run folder {self.path}")
            self._manifest["files"] = list(dict.fromkeys([*self._manifest["files"], *paths]))
            self._save_manifest()

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """``tenfold.files.replacing`` for a file of this run."""
        if self.writes or self._shares:
            with replacing(self.own(name)) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory() as dropped:
                yield Path(dropped) / Path(name).name

    @contextlib.contextmanager
    def replacing_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty temporary folder; when the block ends well, move each file in it, whole, under ``name``."""
        if not self.writes:
            with tempfile.TemporaryDirectory() as dropped:
                yield Path(dropped)
            return
        target = self.path / name
        self._begin()
        with mendable(target), tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self.path) as temporary:
            yield Path(temporary)
            for source in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
                destination = self.own(f"{name}/{source.relative_to(temporary).as_posix()}")
                destination.parent.mkdir(parents=True, exist_ok=True)
                usual_mode(source)
                sync(source)
                source.replace(destination)
                sync(destination.parent)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        with self.replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as JSON, whole or not at all; NaN and infinity are refused, since JSON has neither."""
        self.write_text(name, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def finish(self) -> None:
        """Mark the run as finished, with the environment as it is now (threads and versions of what was loaded)."""
        if not self.writes:
            return
        self._begin()
        self.write_json("environment.json", environment(self.package, self.settings))
        self._manifest["finished"] = True
        self._save_manifest()
        self.close()


def _read_manifest(path: Path, package: str, verb: str) -> dict[str, Any] | None:
    """The manifest of a folder that holds a run of this verb; None for an empty one."""
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(TEMPORARY)]
    if not names:
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        owner = (manifest["package"], manifest["verb"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not empty and holds no run ({', '.join(sorted(names)[:3])}): give a new folder"
        ) from None
    if owner != (package, verb):
        raise UserError(
            f"{path} holds a run of '{' '.join(map(str, owner))}', not of '{package} {verb}': give a new folder"
        )
    return dict(manifest)


def _delete(root: Path, name: str) -> None:
    """Delete one file of a run and the folders below ``root`` that this leaves empty."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root / MANIFEST} names a file outside of its folder: {name}")
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == root or not parent.is_dir() or any(parent.iterdir()):
            break
        parent.rmdir()


@dataclasses.dataclass(frozen=True)
class Finished(Generic[S]):
    """A finished run as ``read`` found it.

    Attributes:
        path: its folder.
        settings: the settings that it was made with.
        version: version of the package that made it; empty where the run does not say.
    """

    path: Path
    settings: S
    version: str


def read(folder: str | os.PathLike[str], settings: type[S], *, package: str, verb: str) -> Finished[S]:
    """A finished run of ``package verb``, with its settings as their dataclass.

    Args:
        folder: the run's folder, or a file in it.
        settings: dataclass of the verb's settings.
        package: distribution name.
        verb: the command that wrote the folder.

    Raises:
        UserError: no such folder, no run of this verb, an unfinished one, or settings that this version does not know.
    """
    path = Path(folder).expanduser()
    if path.is_file():
        path = next((parent for parent in path.parents if (parent / MANIFEST).is_file()), path.parent)
    wanted = f"expected the folder of a finished `{package} {verb}`"
    if not path.is_dir():
        raise UserError(f"--run {folder}: no such folder; {wanted}")
    if not (path / MANIFEST).is_file():
        raise UserError(f"--run {folder}: {wanted}, found no {MANIFEST}")
    manifest = _read_manifest(path, package, verb)
    if manifest is None or not manifest["finished"]:
        raise UserError(f"--run {folder}: this run is unfinished; {wanted}")
    try:
        values = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        found = from_plain(settings, values)
        about = json.loads((path / "environment.json").read_text(encoding="utf-8"))
        version = str(about["versions"].get(package, ""))
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path / 'config.yaml'}: not the settings of `{package} {verb}` ({error})") from error
    return Finished(path, found, version)


def from_plain(settings: type[S], values: Mapping[str, Any]) -> S:
    """The dataclass that ``plain`` made ``values`` of, at every depth; lists become tuples where the field is one.

    Raises:
        TypeError: a name that the dataclass does not have, or one that it needs and that is missing.
        UserError: a value is out of its range.
    """
    hints = typing.get_type_hints(settings)
    arguments = {}
    for name, value in values.items():
        inner = nested(hints.get(name))
        if inner is not None and isinstance(value, Mapping):
            arguments[name] = from_plain(inner, value)
        else:
            arguments[name] = tuple(value) if _is_tuple(hints.get(name)) and isinstance(value, list) else value
    return settings(**arguments)


def _is_tuple(kind: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in (kind, *typing.get_args(kind)))


def read_metrics(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, float]]]:
    """The rows of a ``metrics.csv`` as (step, {name: value}), without what a row leaves empty.

    Raises:
        UserError: no such file, or not one of ours.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            return [
                (int(row["step"]), {name: float(value) for name, value in row.items() if name != "step" and value})
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: expected a metrics.csv of a run ({error})") from error


class Metrics:
    """``metrics.csv``: one row a logged step, in order, without wall-clock columns, so equal runs have equal files.

    Values logged for the same step share a row. A name that appears first at a later step widens the file; earlier rows
    stay empty there. Rows are appended, and ``cut_after`` takes back those that a checkpoint does not know of.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._step: int | None = None
        self._row: dict[str, str] = {}
        if self.path.exists() and (rows := self._read()):
            self._columns = rows[0][1:]

    def _read(self) -> list[list[str]]:
        """All complete rows; a last line without its newline was cut short by a kill and does not count."""
        text = self.path.read_text(encoding="utf-8")
        return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the row of ``step``; a step before the current one is an error of the caller."""
        if self._step is not None and step != self._step:
            assert step > self._step, f"step {step} logged after step {self._step}"
            self.flush()
        self._step = step
        self._row.update({name: _number(value) for name, value in values.items()})

    def flush(self) -> None:
        """Write the current row."""
        if self._step is None or not self._row:
            return
        new = [name for name in self._row if name not in self._columns]
        if new or not self.path.exists():
            rows = self._read()[1:] if self.path.exists() else []
            self._columns += new
            self._write([[*row, *[""] * (1 + len(self._columns) - len(row))] for row in rows])
        with self.path.open("a", encoding="utf-8", newline="") as file:
            row = [str(self._step), *(self._row.get(name, "") for name in self._columns)]
            csv.writer(file, lineterminator="\n").writerow(row)
        self._step, self._row = None, {}

    def cut_after(self, step: int) -> None:
        """Drop every row of a later step, and columns that only those rows filled."""
        self._step, self._row = None, {}
        if not self.path.exists():
            return
        rows = [row for row in self._read()[1:] if int(row[0]) <= step]
        used = [i for i in range(len(self._columns)) if any(row[1 + i] for row in rows)]
        self._columns = [self._columns[i] for i in used]
        self._write([[row[0], *(row[1 + i] for i in used)] for row in rows])

    def _write(self, rows: list[list[str]]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["step", *self._columns], *rows])


def _number(value: float) -> str:
    """The shortest text that reads back as the same double."""
    value = float(value)
    return str(int(value)) if math.isfinite(value) and value.is_integer() and abs(value) < 1e15 else repr(value)
