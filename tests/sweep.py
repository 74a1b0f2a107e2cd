"""Try every verb of a package with what goes wrong in daily work: `nox -s "sweep(corda)"`, or all by `nox -s sweep`.

    python tests/sweep.py corda --report sweep-report     # one package: sweep-report/corda.json
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
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from distributions import PACKAGES, ROOT, Distribution
from PIL import Image

SPOILED = ("missing", "empty", "cut short", "foreign")
CASES = (
    "no arguments",
    *SPOILED,
    "read-only folder",
    "full disk",
    "Ctrl-C",
    "kill -9, --resume",
    "two at once",
    "mended",
)
NOT_TRIED = "-"
WORDS = (
    "Written by `nox -s sweep`, which tries each verb of each package with what stands above the columns. *refused*: exit "
    "code 2, one line that says what was expected, nothing left behind. *read*: the command could do its work all the same. "
    "*resumed*: the same command with `--resume` went on to its end. *fits*: the results fit on a disk of 16 KiB. *was done*: "
    "it ended before it could be interrupted. *ok*: a refused command, mended, ran without `--overwrite`. -: there is nothing "
    "of the kind."
)


class Sweep:
    """The steps of one package, in a folder of its own."""

    def __init__(self, package: Distribution, folder: Path) -> None:
        self.package, self.folder = package, folder
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
            faults = sum(value.startswith("FAULT") for value in self.rows[name].values())
            sys.stderr.write(f"{self.package.name} {name}: {time.monotonic() - start:.0f} s, {faults} faults\n")
        return self.rows

    def step(self, step: dict[str, Any], words: list[str], out: Path | None) -> dict[str, str]:
        """The cases of one step; the last one is the run that later steps build on."""
        row = dict.fromkeys(CASES, NOT_TRIED)
        row["no arguments"] = self.refused([words[0]], may_be_done=out is None)
        for option in step.get("files", []):
            for kind in SPOILED:
                value = words[words.index(option) + 1]
                spoiled = self.spoiled(value, kind)
                if spoiled is None:
                    continue
                changed = [spoiled if word == value else word for word in words]
                found = self.refused(
                    self.with_out(changed, self.fresh() if out else None), may_be_done=kind != "missing"
                )
                if found.startswith("FAULT") or row[kind] == NOT_TRIED:
                    row[kind] = f"{found} ({option})" if found.startswith("FAULT") else found
        if out is not None:
            row["read-only folder"] = self.on_a_disk(words, "ro", "")
            row["full disk"] = self.on_a_disk(words, "rw", "size=16k")
            if step.get("long"):
                row["Ctrl-C"] = self.interrupted(words, signal.SIGINT, 130)
                row["kill -9, --resume"] = self.interrupted(words, signal.SIGKILL, -9)
                row["two at once"] = self.two_at_once(words)
        refused = self.refused(self.with_out([*words, "--no_such_option", "1"], out))
        code, text = self.call(self.with_out(words, out))
        row["mended"] = "ok" if refused == "refused" and code == 0 else f"FAULT: {code}, {last_line(text)}"
        return row

    def with_out(self, words: list[str], out: Path | None) -> list[str]:
        """With an output folder; what the command keeps beside it ({fresh}) then is new as well."""
        words = [word.replace("{fresh}", f"{out or self.fresh()}-kept") for word in words]
        return [*words, "--out", str(out)] if out else words

    def fresh(self) -> Path:
        """An output folder that is not there."""
        self.tried += 1
        return self.folder / "tries" / str(self.tried)

    def call(self, words: list[str]) -> tuple[int, str]:
        """Exit code and what was printed, in this process."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = self.main(words)
            except BaseException as error:  # a traceback at the user's
                return 1, f"{type(error).__name__}: {error}"
        return code, printed.getvalue()

    def refused(self, words: list[str], *, may_be_done: bool = False) -> str:
        """ "refused" in one line that leaves nothing behind, "read" where the command could do its work, or the fault."""
        code, text = self.call(words)
        out = Path(words[words.index("--out") + 1]) if "--out" in words else None
        if code == 0 and may_be_done:
            return "read"
        errors = [line for line in text.splitlines() if line.startswith(f"{self.package.name}: error: ")]
        if code != 2 or len(errors) != 1 or text.splitlines()[-1] != errors[0]:
            return f"FAULT: exit code {code}, {last_line(text)}"
        if out is not None and out.exists():
            return f"FAULT: {out.name} is left behind"
        return "refused"

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

    def on_a_disk(self, words: list[str], mode: str, options: str) -> str:
        """The command with an output folder on a small disk, or on one that cannot be written to."""
        with mounted(self.folder / "disk", mode, options) as disk:
            if disk is None:
                return NOT_TRIED
            code, text = self.call(self.with_out(words, disk / "out"))
            if code == 0 and mode == "rw":
                return "fits"
            errors = [line for line in text.splitlines() if line.startswith(f"{self.package.name}: error: ")]
            if code != 2 or len(errors) != 1:
                return f"FAULT: exit code {code}, {last_line(text)}"
            return "refused"

    def start(self, words: list[str]) -> subprocess.Popen[str]:
        script = f"import sys; from {self.package.import_name}.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def until_there(self, process: subprocess.Popen[str], out: Path) -> None:
        """Wait for the command's folder, or for its end."""
        while process.poll() is None and not (out / "config.yaml").exists():
            time.sleep(0.02)
        time.sleep(0.5)

    def interrupted(self, words: list[str], sent: signal.Signals, expected: int) -> str:
        """Interrupted in the middle, then continued."""
        out = self.fresh()
        process = self.start(self.with_out(words, out))
        self.until_there(process, out)
        process.send_signal(sent)
        text, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            return "was done"
        if process.returncode != expected:
            return f"FAULT: exit code {process.returncode}, {last_line(text)}"
        code, text = self.call([*self.with_out(words, out), "--resume"])
        return "resumed" if code == 0 else f"FAULT: resumed with {code}, {last_line(text)}"

    def two_at_once(self, words: list[str]) -> str:
        """The second of two commands with one folder is refused, and the first one ends as if it had been alone."""
        out = self.fresh()
        process = self.start(self.with_out(words, out))
        self.until_there(process, out)
        alone = process.poll() is not None
        code, text = self.call(self.with_out(words, out))
        first, _ = process.communicate(timeout=600)
        if alone:
            return "was done"
        if code != 2:
            return f"FAULT: exit code {code}, {last_line(text)}"
        return "refused" if process.returncode == 0 else f"FAULT: the first ended with {last_line(first)}"


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
        *("---", "orphan: true", "---", ""),  # not in the site's tree, since it is there only when the sweep has run
        "# What goes wrong in daily work",
        "",
        *textwrap.fill(WORDS, 150).splitlines(),
        "",
    ]
    for path in sorted(reports.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"## {path.stem}", "", f"| verb | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
        lines += [f"| `{name}` | {' | '.join(row[case] for case in CASES)} |" for name, row in rows.items()]
        lines += [""]
    return "\n".join(lines)


def main() -> int:
    """One package, or the table of all."""
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
        rows = Sweep(package, Path(folder)).run()
    (given.report / f"{package.name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    faults = [
        (name, case, value) for name, row in rows.items() for case, value in row.items() if value.startswith("FAULT")
    ]
    for name, case, value in faults:
        sys.stdout.write(f"{package.name} {name}, {case}: {value}\n")
    sys.stdout.write(f"{package.name}: {len(rows)} verbs tried, {len(faults)} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
