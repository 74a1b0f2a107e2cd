"""A command line out of frozen dataclasses: one ``App`` a package, one ``Verb`` a command, no torch to parse it.

The fields of a verb's dataclass are its options (``--field value``, nested ``--a.b value``), their help texts stand in
the dataclass's docstring, and a YAML file of the same names is taken by ``--config``. The parsing and the checking of
types are jsonargparse's.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.resources
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from tenfold.errors import MissingExtraError, UserError, did_you_mean
from tenfold.runs import Run, flat, launched_rank

if typing.TYPE_CHECKING:
    import jsonargparse

T = TypeVar("T")
_LEVELS = ("quick", "full")


@dataclasses.dataclass(frozen=True)
class Invocation:
    """How a verb was called, besides its settings.

    Attributes:
        run: the output folder, opened; None for a verb without one.
        quiet: no progress on stderr.
        strict: a claim that does not hold is worth exit code 1.
    """

    run: Run | None
    quiet: bool
    strict: bool = False

    @property
    def folder(self) -> Run:
        """The output folder of a verb that has one."""
        assert self.run is not None
        return self.run


@dataclasses.dataclass(frozen=True)
class Verb:
    """One command of a package.

    Args:
        name: as typed.
        settings: frozen dataclass; its fields are the options, its docstring's "Args:" section their help.
        handler: called with the settings and the ``Invocation``; its return value is the exit code (None is 0).
        help: one line.
        out: whether the verb writes a run folder (``--out``, ``--resume``, ``--overwrite``).
        claims: whether it ends with claims (``--strict``); with a field ``level``, ``--quick`` and ``--full`` set it.
    """

    name: str
    settings: type[Any]
    handler: Callable[[Any, Invocation], int | None]
    help: str
    out: bool = True
    claims: bool = False


@dataclasses.dataclass(frozen=True)
class App:
    """The command line of one distribution.

    Args:
        dist: distribution name, which is also the command's.
        package: import name; ``recipe:NAME`` means its ``recipes/NAME.yaml``.
        summary: one line for ``--help``.
        verbs: the commands.
    """

    dist: str
    package: str
    summary: str
    verbs: tuple[Verb, ...]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run one command; returns the exit code.

        0 done; 2 what the user can mend (``UserError``: one line on stderr); 1 any other fault, with a traceback;
        130 on Ctrl-C. ``--debug`` shows every traceback.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            with warnings.catch_warnings():
                if "--debug" not in words:  # of libraries to their developers, not to the person at the terminal
                    warnings.simplefilter("ignore", FutureWarning)
                    warnings.showwarning = self._one_line()
                return self._run(words)
        except UserError as error:
            if "--debug" in words:
                traceback.print_exc()
            sys.stderr.write(f"{self.dist}: error: {' '.join(str(error).split())}\n")
            return 2
        except KeyboardInterrupt:
            if "--debug" in words:
                traceback.print_exc()
            sys.stderr.write(f"{self.dist}: interrupted\n")
            return 130
        except BrokenPipeError:  # the reader of stdout (head, less) has left: nothing is wrong here
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except SystemExit as stop:  # --help and --print_config end inside the parser
            return stop.code if isinstance(stop.code, int) else 0
        except Exception:
            traceback.print_exc()
            return 1

    def _one_line(self) -> Callable[..., None]:
        """Writes a warning once, in one line, without its place in the source, of no use to the person at the terminal."""
        shown = set()

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            line = f"{self.dist}: warning: {' '.join(str(message).split())}\n"
            if line not in shown:
                shown.add(line)
                sys.stderr.write(line)

        return show

    def _run(self, words: list[str]) -> int:
        if not words or words[0] in {"-h", "--help"}:
            sys.stdout.write(self._help())
            return 0
        if words[0] == "--version":
            sys.stdout.write(f"{self.dist} {importlib.metadata.version(self.dist)}\n")
            return 0
        verb = next((verb for verb in self.verbs if verb.name == words[0]), None)
        if verb is None:
            kind = "option" if words[0].startswith("-") else "verb"
            known = ["--help", "--version"] if kind == "option" else [verb.name for verb in self.verbs]
            raise UserError(f"unknown {kind} '{words[0]}': {did_you_mean(words[0], known)}")
        return self._call(verb, words[1:])

    def _help(self) -> str:
        width = max(len(verb.name) for verb in self.verbs) + 2
        verbs = "\n".join(f"  {verb.name:{width}}{verb.help}" for verb in self.verbs)
        return (
            f"usage: {self.dist} VERB [options]\n\n{textwrap.fill(self.summary, 100)}\n\nverbs:\n{verbs}\n\n"
            f"'{self.dist} VERB --help' lists the options of a verb; '{self.dist} --version' prints the version.\n"
        )

    def _call(self, verb: Verb, words: list[str]) -> int:
        parser = _parser(self.dist, verb)
        words = self._normalize(parser, verb, words)
        for option, value in itertools.pairwise([*words, ""]):
            name, _, attached = option.partition("=")
            if name == "--config":
                _check_config(Path(attached or value), verb.settings)
        options = parser.parse_args(words)
        settings = _build(verb.settings, options)
        run = None
        if verb.out:
            run = Run.open(
                options.out,
                package=self.dist,
                verb=verb.name,
                settings=settings,
                resume=options.resume,
                overwrite=options.overwrite,
            )
            if run.finished:
                sys.stdout.write(f"{options.out}: this run has finished; nothing is left to do\n")
                return 0
        first = launched_rank() == 0
        invocation = Invocation(run, options.quiet or not first, verb.claims and options.strict)
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            try:
                code = verb.handler(settings, invocation)
            except MissingExtraError as error:
                what, _, hint = str(error).partition(";")  # the package's own extra brings that of tenfold
                own = verb.claims and "tenfold[" in hint
                raise UserError(f'{what}; pip install "{self.dist}[demo]"' if own else str(error)) from error
        if run is not None:
            run.finish()
        return code or 0

    def _normalize(self, parser: "jsonargparse.ArgumentParser", verb: Verb, words: list[str]) -> list[str]:
        """What people type, as the parser wants it.

        ``--batch-size`` is ``--batch_size``; a list may be ``a,b`` as well as ``[a,b]``; ``--quick`` is
        ``--level quick``; ``recipe:NAME`` is a file of the package.
        """
        kinds = {f"--{name}": kind for name, kind in _leaves(verb.settings)}
        out: list[str] = []
        for word in words:
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in parser._option_string_actions:
                underscored = "--" + name[2:].replace("-", "_")
                if underscored in parser._option_string_actions:
                    name = underscored
            if name in {f"--{level}" for level in _LEVELS} and "--level" in kinds and not equals:
                out += ["--level", name[2:]]
            elif equals and name.startswith("--"):
                out.append(f"{name}={self._value(kinds.get(name), name, value)}")
            elif out and not name.startswith("--"):
                out.append(self._value(kinds.get(out[-1]), out[-1], word))
            else:
                out.append(name)
        return out

    def _value(self, kind: Any, option: str, value: str) -> str:
        if option == "--config" and value.startswith("recipe:"):
            return str(self._recipe(value.removeprefix("recipe:")))
        holds_many = any(typing.get_origin(part) in {list, tuple} for part in (kind, *typing.get_args(kind)))
        return f"[{value}]" if holds_many and not value.startswith("[") and value != "null" else value

    def _recipe(self, name: str) -> Path:
        folder = Path(str(importlib.resources.files(self.package))) / "recipes"
        recipes = {path.stem: path for path in folder.glob("*.yaml")}
        if name not in recipes:
            raise UserError(f"--config recipe:{name}: no such recipe; {did_you_mean(name, recipes)}")
        return recipes[name]


_OWN_OPTIONS = ("config", "out", "resume", "overwrite", "quiet", "strict", "debug")


def _parser(dist: str, verb: Verb) -> "jsonargparse.ArgumentParser":
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        """jsonargparse's parser with errors of one line, and without the invocation's options in what it dumps."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(_one_line(message, [s for s in self._option_string_actions if s.startswith("--")])) from ex

        def dump(self, cfg: jsonargparse.Namespace, *args: Any, **kwargs: Any) -> str:
            cfg = cfg.clone()
            for name in _OWN_OPTIONS:
                cfg.pop(name, None)
            return str(super().dump(cfg, *args, **kwargs))

    parser = Parser(prog=f"{dist} {verb.name}", description=verb.help, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings, or recipe:NAME; later options win")
    if verb.out:
        parser.add_argument("--out", required=True, metavar="DIR", help="folder that the results go to")
        parser.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
        parser.add_argument("--overwrite", action="store_true", help="start anew over the run in --out")
    if verb.claims:
        parser.add_argument("--strict", action="store_true", help="exit with 1 when a claim does not hold")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.add_class_arguments(verb.settings)
    helps = dict(_helps(verb.settings))
    for action in parser._actions:
        if action.dest in helps:
            action.help = helps[action.dest]
    titles = {str(verb.settings): "settings"}
    titles |= {str(inner): f"settings of {name}" for name, inner in _nested(verb.settings)}
    for group in parser._action_groups:
        group.title = titles.get(group.title or "", group.title)
    return parser


def _one_line(message: str, options: list[str]) -> str:
    """A message of jsonargparse as one line in our words, with the nearest valid names for a typo."""
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        word = match[1].partition("=")[0]
        if not word.startswith("-"):
            return f"unexpected argument '{word}': options start with --"
        return f"unknown option {word}: {did_you_mean(word, options)}"
    if match := re.search(r"arguments? (?:are|is) required: (.+)", message):
        return "missing " + ", ".join(f"--{name.strip().removeprefix('--')}" for name in match[1].split(","))
    if match := re.search(r"(?:Key|Option) [\"'](\S+?)[\"'] is required", message):  # jsonargparse up to 4.45
        return f"missing --{match[1]}"
    if match := re.search(r"[Kk]ey \"(\S+?)\":\s*(.*)", message, re.DOTALL):
        return f"--{match[1]}: {_expectation(match[2])}"
    return message


def _check_config(path: Path, settings: type[Any]) -> None:
    """Whether a settings file can be read and names only settings that there are; jsonargparse checks the values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected settings by name, found {type(content).__name__}")
    known = [name for name, _ in _leaves(settings)]
    groups = {name.rpartition(".")[0] for name in known}
    for key, value in flat(content).items():
        if key not in known and not (key in groups and value is None):
            raise UserError(f"--config {path}: unknown setting '{key}': {did_you_mean(key, known)}")


def _expectation(text: str) -> str:
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    return re.sub(r"Expected an? (.*?)\. Got value: (.*)", r"expected \1, got '\2'", " ".join(text.split()))


def _dataclass_in(kind: Any) -> type[Any] | None:
    """The dataclass that a field's type names, also inside ``X | None``."""
    return next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)  # type: ignore[return-value]


def _leaves(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field that is not itself a dataclass."""
    for name, kind in typing.get_type_hints(settings).items():
        inner = _dataclass_in(kind)
        if inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _nested(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Dotted name and class of every field that is a dataclass."""
    for name, kind in typing.get_type_hints(settings).items():
        if inner := _dataclass_in(kind):
            yield prefix + name, inner
            yield from _nested(inner, f"{prefix}{name}.")


def _helps(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and description of every field, out of the "Args:" or "Attributes:" section of the docstrings."""
    for base in reversed(settings.__mro__[:-1]):
        section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", inspect.getdoc(base) or "", re.MULTILINE)
        for match in re.finditer(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE):
            yield prefix + match[1], " ".join(match[2].split()).replace("%", "percent")
    for name, kind in typing.get_type_hints(settings).items():
        if inner := _dataclass_in(kind):
            yield from _helps(inner, f"{prefix}{name}.")


def _build(settings: type[T], values: Any) -> T:
    """The dataclass out of parsed values, so that its own checks run, at every depth."""
    arguments = {}
    for name, kind in typing.get_type_hints(settings).items():
        value = values[name]
        inner = _dataclass_in(kind)
        arguments[name] = _build(inner, value) if inner and value is not None else value
    return settings(**arguments)


def track(items: Iterable[T], description: str, total: int | None = None, *, quiet: bool = False) -> Iterator[T]:
    """Pass ``items`` through and show on stderr how far they are.

    On a terminal a bar with rate and remaining time; elsewhere a plain line every five seconds at most; nothing when
    ``quiet`` or when all is over sooner.
    """
    if total is None and isinstance(items, typing.Sized):
        total = len(items)
    if quiet:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{task.speed:.3g}/s" if task.speed else "")

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
    else:
        start = shown = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - shown >= 5:
                shown, rate_per_second = now, done / (now - start)
                left = f"/{total}, {(total - done) / rate_per_second:.0f} s left" if total and done else ""
                sys.stderr.write(f"{description}: {done}{left} ({rate_per_second:.3g}/s)\n")
            yield item


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Plain text table: text to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [
        all(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?|-|nan|", row[i]) for row in cells) for i in range(len(headers))
    ]
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def claims_table(summary: dict[str, Any]) -> str:
    """The claims of one summary under a line that says what was run; long claims are broken to fit a terminal."""
    from tenfold.claims import claim_rows

    headers, rows = claim_rows([summary])
    start = headers.index("claim")  # what stands before is the same in all rows
    broken = []
    for row in rows:
        first, *more = textwrap.wrap(row[start], 64)
        broken.append([first, *row[start + 1 :]])
        broken += [[line, *[""] * (len(headers) - start - 1)] for line in more]
    seeds = ", ".join(map(str, summary["seeds"]))
    head = f"{summary['package']} {summary['command']}, level {summary['level']}, seeds {seeds}: {summary['seconds']:.0f} s"
    return f"{head}\n\n{table(headers[start:], broken)}\n"


def show_claims(summary: dict[str, Any], *, strict: bool = False) -> int:
    """Print a summary's claims and notes to stdout; the exit code is 1 when one fails under ``strict``."""
    sys.stdout.write(claims_table(summary) + "\n" * bool(summary["notes"]))
    for note in summary["notes"]:
        sys.stdout.write(textwrap.fill(note, 110, initial_indent="note: ", subsequent_indent="      ") + "\n")
    return int(strict and any(claim["holds"] is False for claim in summary["claims"]))
