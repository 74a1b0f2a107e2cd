"""A command line out of frozen dataclasses: one ``App`` per package, one ``Verb`` per command, no torch to parse it.

The fields of a verb's dataclass are its options (``--field value``, nested ``--a.b value``), the first line of its
docstring is the verb's line of help, the section "Args:" the help of the options, and a YAML file of the same names is
taken by ``--config``. What a verb does stands in ``<package>.commands.<verb>``, which is imported when the verb runs. The
parsing and the checking of types are jsonargparse's, the checking of ranges ``tenfold.config``'s.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.resources
import inspect
import io
import itertools
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import yaml

from tenfold.config import SettingError, described, leaves, nested, one_of, plain_kind
from tenfold.errors import RUNNING, UserError, did_you_mean
from tenfold.runs import Run, flat, launched_rank

if typing.TYPE_CHECKING:
    import jsonargparse

T = TypeVar("T")
_LEVELS = ("quick", "full")


@contextlib.contextmanager
def _noting_interrupt(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is remembered."""
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """How a verb was called, besides its settings.

    Attributes:
        run: output folder, opened; None for a verb without one.
        quiet: whether to show no progress on stderr.
        strict: whether a claim that fails gives exit code 1.
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
    """One command of a package; its function is ``run(settings, invocation)`` in ``<package>.commands.<name>``.

    The file of a verb such as ``add-class`` is ``add_class.py``. What ``run`` returns is the exit code (None is 0).

    Args:
        name: name as typed.
        settings: frozen dataclass whose fields are the options; its docstring holds their help.
        out: whether the verb writes a run folder (``--out``, ``--resume``, ``--overwrite``).
        claims: whether it ends with claims (``--strict``); with a field ``level``, ``--quick`` and ``--full`` set it.
    """

    name: str
    settings: type[Any]
    out: bool = True
    claims: bool = False

    @property
    def help(self) -> str:
        """One line: the first of the settings' docstring."""
        return (inspect.getdoc(self.settings) or "").partition("\n")[0]


@dataclasses.dataclass(frozen=True)
class App:
    """The command line of one distribution.

    Args:
        dist: name of the distribution, which is also the command's.
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
        running = RUNNING.set(self.dist)
        interrupted = threading.Event()
        try:
            with _noting_interrupt(interrupted), warnings.catch_warnings():
                if "--debug" not in words:  # of libraries to their developers, not to the person at the terminal
                    for kind in (FutureWarning, DeprecationWarning, SyntaxWarning):
                        warnings.simplefilter("ignore", kind)
                    warnings.showwarning = self._one_line()
                return self._run(words)
        except UserError as error:
            if "--debug" in words:
                traceback.print_exc()
            sys.stderr.write(f"{self.dist}: error: {' '.join(str(error).split())}\n")
            return 2
        except KeyboardInterrupt:
            return self._interrupted(words)
        except BrokenPipeError:  # the reader of stdout (head, less) has left: nothing is wrong here
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except SystemExit as stop:  # --help and --print_config end inside the parser
            return stop.code if isinstance(stop.code, int) else 0
        except Exception:
            if interrupted.is_set():  # compiled code may turn a KeyboardInterrupt into an error of its own
                return self._interrupted(words)
            traceback.print_exc()
            return 1
        finally:
            RUNNING.reset(running)

    def _interrupted(self, words: Sequence[str]) -> int:
        if "--debug" in words:
            traceback.print_exc()
        sys.stderr.write(f"{self.dist}: interrupted\n")
        return 130

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
        first = launched_rank() == 0
        with contextlib.ExitStack() as stack:
            if not first:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            run = None
            if verb.out:
                run = stack.enter_context(
                    Run.open(
                        options.out,
                        package=self.dist,
                        verb=verb.name,
                        settings=settings,
                        resume=options.resume,
                        overwrite=options.overwrite,
                    )
                )
                if run.finished:
                    sys.stdout.write(f"{options.out}: this run has finished; nothing is left to do\n")
                    return 0
            invocation = Invocation(run, options.quiet or not first, verb.claims and options.strict)
            command = importlib.import_module(f"{self.package}.commands.{verb.name.replace('-', '_')}")
            code = command.run(settings, invocation)
            if run is not None:
                run.finish()
        return code or 0

    def _normalize(self, parser: "jsonargparse.ArgumentParser", verb: Verb, words: list[str]) -> list[str]:
        """What people type, as the parser wants it.

        ``--batch-size`` is ``--batch_size``; a list may be ``a,b`` as well as ``[a,b]``; ``--quick`` is
        ``--level quick``; ``recipe:NAME`` is a file of the package.
        """
        kinds = {f"--{name}": plain_kind(kind) for name, kind in leaves(verb.settings)}
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

    kinds = dict(leaves(verb.settings))

    class Parser(jsonargparse.ArgumentParser):
        """jsonargparse's parser with errors of one line, and without the invocation's options in what it dumps."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            raise UserError(_one_line(message, options, kinds)) from ex

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
        parser.add_argument("--strict", action="store_true", help="exit with code 1 if a claim fails")
    parser.add_argument("--quiet", action="store_true", help="show no progress on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    _add_settings(parser, verb.settings)
    return parser


def _add_settings(parser: "jsonargparse.ArgumentParser", settings: type[Any]) -> None:
    """An option for each setting, in a group per dataclass."""
    helps = dict(_helps(settings))
    groups = {"": parser.add_argument_group("settings")}
    defaults = dict(_defaults(settings))
    for name, kind in leaves(settings):
        owner = name.rpartition(".")[0]
        if owner not in groups:
            groups[owner] = parser.add_argument_group(f"settings of {owner}")
        given = {"default": defaults[name]} if name in defaults else {"required": True}
        groups[owner].add_argument(f"--{name}", type=plain_kind(kind), help=helps.get(name, ""), **given)


def _one_line(message: str, options: list[str], kinds: dict[str, Any]) -> str:
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
    if match := re.search(r"[Kk]ey \"(\S+?)\"", message):
        return f"--{match[1]}: {_expectation(kinds.get(match[1]), message)}"
    if match := re.search(r"argument --([\w.]+)\S*: expected (one|at least one) argument", message):
        return f"--{match[1]}: a value is missing"
    return message


def _expectation(kind: Any, message: str) -> str:
    """What an option takes and what came, for a value that is not of its kind."""
    came = re.findall(r"(?:Got value|Given value): (.*)", message)
    value = came[-1].strip().removeprefix("[").removesuffix("]").replace("'", "") if came else "something else"
    choices = _choices(kind)
    if choices:
        wrong = next((word for word in re.split(r",\s*", value) if word not in choices), value)
        return one_of(wrong, choices)
    return f"expected {described(kind)}, got '{value}'"


def _choices(kind: Any) -> list[str]:
    """The words that an option takes, where it takes nothing else (or null), also as a list."""
    kind = plain_kind(kind)
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return _choices(parts[0]) if len(parts) == 1 else []


def _check_config(path: Path, settings: type[Any]) -> None:
    """Check that a settings file can be read and names only settings that there are; jsonargparse checks the values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected settings by name, found {type(content).__name__}")
    known = [name for name, _ in leaves(settings)]
    for key in flat(content):
        if any(name.startswith(f"{key}.") for name in known):
            raise UserError(f"--config {path}: '{key}' holds settings, such as {key}.{_first_under(key, known)}")
        if key not in known:
            raise UserError(f"--config {path}: unknown setting '{key}': {did_you_mean(key, known)}")


def _first_under(group: str, names: list[str]) -> str:
    return next(name for name in names if name.startswith(f"{group}.")).removeprefix(f"{group}.")


def _defaults(settings: type[Any], prefix: str = "", values: Any = None) -> Iterator[tuple[str, Any]]:
    """Dotted name and default of every setting that has one."""
    for field in dataclasses.fields(settings):
        if values is not None:
            default = getattr(values, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = dataclasses.MISSING
        if inner := nested(typing.get_type_hints(settings)[field.name]):
            yield from _defaults(inner, f"{prefix}{field.name}.", None if default is dataclasses.MISSING else default)
        elif default is not dataclasses.MISSING:
            yield f"{prefix}{field.name}", default


def _helps(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and description of every field, out of the "Args:" or "Attributes:" section of the docstrings."""
    for base in reversed(settings.__mro__[:-1]):
        section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", inspect.getdoc(base) or "", re.MULTILINE)
        for match in re.finditer(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE):
            yield prefix + match[1], " ".join(match[2].split()).replace("%", "percent")
    for name, kind in typing.get_type_hints(settings).items():
        if inner := nested(kind):
            yield from _helps(inner, f"{prefix}{name}.")


def _build(settings: type[T], values: Any, path: str = "--") -> T:
    """The dataclass out of parsed values, so that its own checks run, at every depth; a fault has the option's whole path."""
    arguments = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        inner = nested(typing.get_type_hints(settings)[field.name])
        value = values[field.name]
        arguments[field.name] = _build(inner, value, f"{path}{field.name}.") if inner else value
    try:
        return settings(**arguments)
    except SettingError as error:
        raise UserError(f"{path}{error.field}: {error.message}") from error
