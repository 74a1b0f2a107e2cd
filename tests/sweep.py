"""Try every verb of a package with what goes wrong in daily work: `nox -s "sweep(corda)"`, or all by `nox -s sweep`.

    python tests/sweep.py corda --report sweep-report     # one package: sweep-report/corda.json, and .log of the faults
    python tests/sweep.py --table --report sweep-report   # docs/sweep.md from all reports

What each verb is run with stands in `packages/<import name>/tests/sweep.yaml`, a list in the order of running:

    - verb: train
      words: [--data, "csv:{simulate}/hands.csv", --gallery, "{fresh}"]  # {simulate}: the folder of that step
      files: [--data]            # options whose file or folder is taken away, emptied, cut short, replaced
      long: true                 # takes seconds, so that it can be interrupted
      name: train                # of the step, where a verb comes twice

{fresh} is a path that is new each time, and {train-kept} the one of the run on which later steps build.

Every fault is a cell of the table and makes the exit code 1.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from distributions import PACKAGES, ROOT, Distribution
from PIL import Image

SPOILED = ("missing", "empty", "cut short", "foreign")
CASES = {
    "no arguments": "bare",
    **dict(zip(SPOILED, ("missing", "empty", "cut", "foreign"), strict=True)),
    "read-only folder": "read-only",
    "full disk": "full",
    "two at once": "twice",
    "Ctrl-C": "Ctrl-C",
    "kill -9, --resume": "kill -9",
    "mended": "mended",
}
"""What is tried, and the head of its column."""
NOT_TRIED, FAULT = "-", "FAULT:"
PROMISED = {"refused", "resumed", "ok"}
WORDS = """\
Written by `nox -s sweep`, which tries each verb of each package with what goes wrong in daily work; what each verb is run
with stands in `packages/*/tests/sweep.yaml`. ✓: it went as promised. -: there is nothing of the kind, since the verb takes no
file, writes no folder, or is not one whose work takes long. The columns and what is promised:

- **bare**: without any argument; and each file or folder that it reads **missing**, **empty**, **cut** to half (of a folder,
  all files in it), or **foreign** (noise in its place): exit code 2, one line of what was expected, nothing left behind.
  *read*: the verb could do its work all the same, or it needs no arguments.
- **read-only**: the output folder is on a disk that cannot be written to: refused likewise. **full**: it is on a disk of 16
  KiB: refused in one line, no temporary file left behind, and with more space the same command with `--resume` ends well
  (that of a demo is not repeated). *fits*: the results fit on that disk, and are those of an unbroken run.
- **twice**: a second command with the folder of a running one is refused. **Ctrl-C**: that one then ends with exit code 130
  and no traceback. **kill -9**: it goes on with `--resume`, is killed, and goes on again to its end: its weights and tables
  are those of an unbroken run, byte for byte. *was done*: it ended before it could be interrupted.
- **mended**: a command that was refused for an unknown option and for a missing file runs without `--overwrite` when these
  are mended.
"""


class Sweep:
    """The steps of one package, in a folder of its own."""

    def __init__(self, package: Distribution, folder: Path, log: Path) -> None:
        self.package, self.folder, self.log = package, folder, log
        self.log.write_text("", encoding="utf-8")
        self.main: Callable[[Sequence[str]], int] = package.main
        self.outs: dict[str, str] = {"data": str(folder / "data"), "fresh": "{fresh}"}
        self.rows: dict[str, dict[str, str]] = {}
        self.tried = 0

    def run(self) -> dict[str, dict[str, str]]:
        """All steps; the table's rows by step."""
        path = self.package.folder / "tests/sweep.yaml"
        if not path.exists():
            raise SystemExit(f"{path} is not there yet: what its verbs are tried with")
        steps = yaml.safe_load(path.read_text(encoding="utf-8"))
        verbs = {verb.name: verb for verb in self.package.app.verbs}
        if verbs.keys() - {step["verb"] for step in steps}:
            raise SystemExit(f"{self.package.name}: no step for {', '.join(verbs.keys() - {s['verb'] for s in steps})}")
        for step in steps:
            name, start = step.get("name", step["verb"]), time.monotonic()
            out = self.folder / "runs" / name
            self.outs[name], self.outs[f"{name}-kept"] = str(out), f"{out}-kept"
            words = [str(word).format(**self.outs) for word in flat(step.get("words", []))]
            self.rows[name] = self.step(step, [step["verb"], *words], out if verbs[step["verb"]].out else None)
            faults = sum(value.startswith(FAULT) for value in self.rows[name].values())
            sys.stderr.write(f"{self.package.name} {name}: {time.monotonic() - start:.0f} s, {faults} faults\n")
        return self.rows

    def step(self, step: dict[str, Any], words: list[str], out: Path | None) -> dict[str, str]:
        """The cases of one step; the last one is the run that later steps build on."""
        row = {"verb": step["verb"], **dict.fromkeys(CASES, NOT_TRIED)}
        row["no arguments"] = self.refused([words[0]], may_be_done=out is None)
        for option in step.get("files", []):
            for kind in SPOILED:
                changed = self.without(words, option, kind)
                if changed is None:
                    continue
                found = self.refused(
                    self.with_out(changed, self.fresh() if out else None), may_be_done=kind != "missing"
                )
                if found.startswith(FAULT):
                    row[kind] = f"{found} ({option})"
                elif row[kind] in (NOT_TRIED, "read"):
                    row[kind] = found
        if out is not None:
            row["read-only folder"] = self.on_a_disk(words, "ro", "")
            row["full disk"] = self.on_a_disk(words, "rw", "size=16k", fits := self.fresh())
        row["mended"] = self.mended(step, words, out)
        if row["full disk"] == "fits" and row["mended"] == "ok" and (different := unlike(out, fits)):
            row["full disk"] = self.fault(f"{', '.join(different)} is not whole, without a word", words, "")
        if out is not None and step.get("long") and row["mended"] == "ok":
            self.disturbed(words, out, row)
        return row

    def mended(self, step: dict[str, Any], words: list[str], out: Path | None) -> str:
        """Refused for a file that is missing and for an option that is unknown, then done, all with one folder."""
        wrong = [[*words, "--no_such_option", "1"]]
        wrong += [self.without(words, option, "missing") or wrong[0] for option in step.get("files", [])[:1]]
        for each in wrong:
            refused = self.refused(self.with_out(each, out))
            if refused != "refused":
                return refused
        code, text = self.call(self.with_out(words, out))
        return "ok" if code == 0 else self.fault(f"{code}, {last_line(text)}", words, text)

    def without(self, words: list[str], option: str, kind: str) -> list[str] | None:
        """The command with the file of an option spoiled; None where that names no file."""
        value = words[words.index(option) + 1]
        spoiled = self.spoiled(value, kind)
        return None if spoiled is None else [spoiled if word == value else word for word in words]

    def with_out(self, words: list[str], out: Path | None) -> list[str]:
        """With an output folder; what the command keeps beside it ({fresh}) then is new as well."""
        words = [word.replace("{fresh}", f"{out or self.fresh()}-kept") for word in words]
        return [*words, "--out", str(out)] if out else words

    def fresh(self) -> Path:
        """An output folder that is not there."""
        self.tried += 1
        return self.folder / "tries" / str(self.tried)

    def fault(self, what: str, words: list[str], text: str) -> str:
        """The cell of the table; the whole output goes into the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{FAULT} {what}\n$ {self.package.name} {' '.join(words)}\n{text}\n")
        return f"{FAULT} {what}"

    def call(self, words: list[str]) -> tuple[int, str]:
        """Exit code and what was printed, in this process."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = self.main(words)
            except BaseException as error:  # a traceback at the user's
                return 1, f"{type(error).__name__}: {error}"
        return code, printed.getvalue()

    def in_one_line(self, code: int, text: str) -> bool:
        """Whether a command was refused as promised: exit code 2, and one line of error, the last one."""
        errors = [line for line in text.splitlines() if line.startswith(f"{self.package.name}: error: ")]
        return code == 2 and len(errors) == 1 and text.splitlines()[-1] == errors[0]

    def refused(self, words: list[str], *, may_be_done: bool = False) -> str:
        """ "refused" in one line that leaves nothing behind, "read" where the command could do its work, or the fault."""
        there = [path for path in self.places(words) if path.exists()]
        code, text = self.call(words)
        if code == 0 and may_be_done:
            return "read"
        if not self.in_one_line(code, text):
            return self.fault(f"exit code {code}, {last_line(text)}", words, text)
        left = [path.name for path in self.places(words) if path.exists() and path not in there]
        return self.fault(f"{', '.join(left)} is left behind", words, text) if left else "refused"

    def places(self, words: list[str]) -> list[Path]:
        """The output folder of a command, and what it keeps beside it."""
        if "--out" not in words:
            return []
        out = words[words.index("--out") + 1]
        return [Path(out), Path(f"{out}-kept")]

    def spoiled(self, value: str, kind: str) -> str | None:
        """The same option value with its file or folder taken away, emptied, cut short or replaced; None for no file."""
        prefix, colon, rest = value.partition(":")
        path = Path(rest if colon else value)
        if not path.exists():
            return None
        self.tried += 1
        target = self.folder / "spoiled" / str(self.tried) / path.name
        target.parent.mkdir(parents=True)
        noise = random.Random(0).randbytes(2000)
        if kind != "missing" and path.is_dir():
            if kind == "empty":
                target.mkdir()
            else:
                shutil.copytree(path, target)
                files = sorted(file for file in target.rglob("*") if file.is_file())
                for file in files:  # the whole folder is damaged
                    data = file.read_bytes()
                    file.write_bytes(noise if kind == "foreign" else data[: len(data) // 2])
        elif kind != "missing":
            data = path.read_bytes()
            target.write_bytes({"empty": b"", "cut short": data[: len(data) // 2], "foreign": noise}[kind])
        return f"{prefix}{colon}{target}" if colon else str(target)

    def on_a_disk(self, words: list[str], mode: str, options: str, fits: Path | None = None) -> str:
        """The command with a folder on a disk that is read-only, or full and then given more space; results go to ``fits``."""
        with mounted(self.folder / "disk", mode, options) as disk:
            if disk is None:
                return NOT_TRIED
            words = self.with_out(words, disk / "out")
            code, text = self.call(words)
            if fits and code == 0:
                for end in ("", "-kept"):
                    if (disk / f"out{end}").is_dir():
                        shutil.copytree(disk / f"out{end}", f"{fits}{end}")
                return "fits"
            if not self.in_one_line(code, text):
                return self.fault(f"exit code {code}, {last_line(text)}", words, text)
            if mode == "rw" and words[0] != "demo":  # whose length is given
                left = sorted(path.name for path in disk.rglob(".tenfold-*"))
                if left:
                    return self.fault(f"{', '.join(left)} is left behind", words, text)
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                code, text = self.call([*words, "--resume"])
                if code != 0:
                    return self.fault(f"with space, resumed with {code}, {last_line(text)}", words, text)
            return "refused"

    def start(self, words: list[str]) -> "Command":
        self.tried += 1
        return Command(self.main, words, self.folder / f"printed-{self.tried}.txt")

    def disturbed(self, words: list[str], unbroken: Path, row: dict[str, str]) -> None:
        """One run that a second command comes in the way of, that is interrupted, killed, and then resumed to its end."""
        out = self.fresh()
        command = self.start(self.with_out(words, out))
        command.until_there(out)
        code, text = self.call(self.with_out(words, out))
        if not self.in_one_line(code, text):
            row["two at once"] = self.fault(f"exit code {code}, {last_line(text)}", words, text)
        else:
            row["two at once"] = "refused" if "another command" in text else "was done"
        row["Ctrl-C"], out = self.stopped(words, out, command, signal.SIGINT)
        resume = ["--resume"] if row["Ctrl-C"] == "resumed" else []
        out = out if resume else self.fresh()
        command = self.start([*self.with_out(words, out), *resume])
        row["kill -9, --resume"], out = self.stopped(words, out, command, signal.SIGKILL)
        if "resumed" not in (row["Ctrl-C"], row["kill -9, --resume"]):
            return
        code, text = self.call([*self.with_out(words, out), "--resume"])
        different = unlike(unbroken, out) if code == 0 else []
        if code != 0:
            row["kill -9, --resume"] = self.fault(f"resumed with {code}, {last_line(text)}", words, text)
        elif different:
            row["kill -9, --resume"] = self.fault(f"{', '.join(different)} differs from an unbroken run", words, text)

    def stopped(self, words: list[str], out: Path, command: "Command", sent: signal.Signals) -> tuple[str, Path]:
        """Stop a command in its middle, or sooner where it was done by then; what to write, and the folder."""
        expected = {signal.SIGINT: 130, signal.SIGKILL: -9}[sent]
        for seconds in (0.3, 0.0):
            command.until_there(out, seconds)
            command.send(sent)
            code, text = command.end()
            if code == expected and "Traceback" not in text:
                return "resumed", out
            if code != 0:
                return self.fault(f"exit code {code}, {last_line(text)}", words, text), out
            if seconds:
                out = self.fresh()
                command = self.start(self.with_out(words, out))
        return "was done", out


class Command:
    """A command in a process of its own: a fork of this one, which has imported already what takes seconds."""

    def __init__(self, main: Callable[[Sequence[str]], int], words: list[str], printed: Path) -> None:
        self.main, self.words, self.printed = main, words, printed
        self.process = multiprocessing.get_context("fork").Process(target=self.run)
        self.process.start()

    def run(self) -> None:
        """In the new process; a group of its own, as a terminal gives one to each command."""
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(self.printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.exit(self.main(self.words))

    def until_there(self, out: Path, seconds: float = 0.0) -> None:
        """Wait until the command works in its folder, and some time more, or for its end."""
        while self.process.is_alive() and not ((out / "config.yaml").exists() and (out / ".tenfold-lock").exists()):
            time.sleep(0.01)
        self.process.join(seconds)

    def send(self, sent: signal.Signals) -> None:
        """Ctrl-C to all of the group, as a terminal does; any other signal to the command alone."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if sent == signal.SIGINT else os.kill)(self.process.pid, sent)

    def end(self) -> tuple[int, str]:
        """Exit code and what was printed."""
        self.process.join(300)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return 1, "did not end in 300 s"
        assert self.process.exitcode is not None
        return self.process.exitcode, self.printed.read_text(encoding="utf-8") if self.printed.exists() else ""


def unlike(one: Path, other: Path) -> list[str]:
    """The weights and tables of a run, and of what it keeps beside itself, that another run has not alike."""
    names = [
        (end, path.relative_to(f"{one}{end}"))
        for end in ("", "-kept")
        for path in sorted(Path(f"{one}{end}").rglob("*"))
        if path.suffix in {".safetensors", ".csv", ".npy", ".npz", ".tif"}
    ]
    pairs = [(name, Path(f"{one}{end}") / name, Path(f"{other}{end}") / name) for end, name in names]
    return [str(name) for name, a, b in pairs if not b.exists() or a.read_bytes() != b.read_bytes()]


def flat(words: list[Any]) -> list[Any]:
    """Words of which some are lists of words, by an anchor of the file."""
    return [each for word in words for each in (flat(word) if isinstance(word, list) else [word])]


def write_data(folder: Path) -> None:
    """What several packages are tried with: pictures of three classes, in folders and one alone."""
    draw = np.random.default_rng(0)
    for part, label, number in itertools.product(("train", "val"), ("cup", "house", "tree"), range(6)):
        path = folder / "photos" / part / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = draw.integers(0, 80, (32, 32, 3))
        noise[8:24, 8:24, ("cup", "house", "tree").index(label)] += 150
        Image.fromarray(noise.astype(np.uint8)).save(path)
    shutil.copytree(folder / "photos/train", folder / "classes/base")
    shutil.copytree(folder / "photos/val", folder / "classes/test")
    shutil.copy(folder / "photos/val/cup/0.png", folder / "photo.png")


def last_line(text: str) -> str:
    """What the table shows of an output."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "nothing printed").replace("|", "/")[:160]


@contextlib.contextmanager
def mounted(folder: Path, mode: str, options: str) -> Iterator[Path | None]:
    """A disk of its own in memory; None where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(filter(None, [mode, options])), "tmpfs", str(folder)]
    try:
        there = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        there = False
    try:
        yield folder if there else None
    finally:
        if there:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def table(reports: Path) -> str:
    """The page of all reports that are there."""
    lines = [
        "# What goes wrong in daily work",
        "",
        WORDS,
    ]
    for path in sorted(reports.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"## {path.stem}", "", f"| verb | {' | '.join(CASES.values())} |", f"|---|{':-:|' * len(CASES)}"]
        faults = []
        for name, row in rows.items():
            called = f"`{row['verb']}`" if row["verb"] == name else f"`{row['verb']}`, {name}"
            cells = []
            for case, head in CASES.items():
                faults += [f"- `{name}`, {head}: {row[case]}"] if row[case].startswith(FAULT) else []
                cells.append(
                    "✓" if row[case] in PROMISED else "**fault**" if row[case].startswith(FAULT) else row[case]
                )
            lines += [f"| {called} | {' | '.join(cells)} |"]
        lines += ["", *faults, *([""] if faults else [])]
    return "\n".join(lines)


def main() -> int:
    """One package, or the table of all."""
    if os.environ.get("OMP_NUM_THREADS") != "1":  # a fork of a process with threads may wait for them for ever
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", choices=[package.name for package in PACKAGES])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.report.mkdir(parents=True, exist_ok=True)
    if given.table:
        (ROOT / "docs/sweep.md").write_text(table(given.report), encoding="utf-8")
        return 0
    (package,) = [each for each in PACKAGES if each.name == given.package]
    with tempfile.TemporaryDirectory(prefix=f"sweep-{package.name}-") as folder:
        write_data(Path(folder) / "data")
        own = package.folder / "tests/sweep_data.py"
        if own.exists():  # what this package alone is tried with
            sys.path.insert(0, str(own.parent))
            importlib.import_module("sweep_data").write(Path(folder) / "data")
        rows = Sweep(package, Path(folder), given.report / f"{package.name}.log").run()
    (given.report / f"{package.name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    faults = [
        (name, case, value) for name, row in rows.items() for case, value in row.items() if value.startswith(FAULT)
    ]
    for name, case, value in faults:
        sys.stdout.write(f"{package.name} {name}, {case}: {value}\n")
    sys.stdout.write(f"{package.name}: {len(rows)} verbs tried, {len(faults)} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
