"""Settings as frozen dataclasses whose annotations say what is valid; read by command lines, so without torch.

    @dataclass(frozen=True, kw_only=True)
    class Views(Settings):
        number: Annotated[int, Ge(1)] = 4
        kind: Literal["crop", "none"] = "crop"

``Views(number=0)`` raises ``number: expected 1 or more, got 0``, and a command line that nests it says
``--views.number: expected 1 or more, got 0``. The markers have the attributes of those of the library annotated-types,
which therefore serve as well.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from tenfold.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Ge:
    """At least ``ge``."""

    ge: float


@dataclasses.dataclass(frozen=True)
class Gt:
    """More than ``gt``."""

    gt: float


@dataclasses.dataclass(frozen=True)
class Le:
    """At most ``le``."""

    le: float


@dataclasses.dataclass(frozen=True)
class Lt:
    """Less than ``lt``."""

    lt: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Between two bounds, each of which belongs to it (``ge``, ``le``) or not (``gt``, ``lt``)."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


@dataclasses.dataclass(frozen=True)
class Length:
    """At least ``min_length`` and at most ``max_length`` entries."""

    min_length: int = 0
    max_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Distinct:
    """No entry twice."""


Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(gt=0, lt=1)]
"""A part of a whole, neither nothing nor all of it."""
Probability = Annotated[float, Interval(ge=0, le=1)]
Seed = Natural
Seeds = Annotated[list[Seed], Length(1), Distinct()]
Level = Literal["quick", "default", "full"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "32", "bf16", "16"]


class SettingError(UserError):
    """A setting has a value that is not valid.

    The message begins with the setting's name; a command line puts its whole path before it.

    Args:
        field: name of the setting within its dataclass, dotted for a nested one.
        message: what was expected and what came: ``expected 1 or more, got 0``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def under(self, prefix: str) -> "SettingError":
        """The same fault, of a setting that lies under ``prefix``."""
        return SettingError(f"{prefix}.{self.field}", self.message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: each field is checked against its annotation when an instance is made.

    A class with checks of its own overrides ``__post_init__``, calls ``super().__post_init__()`` first, and raises
    ``SettingError`` for a single setting, or ``UserError`` for a rule between several, which it names by their options.

    Raises:
        SettingError: a number out of its range, a choice that there is not, a list that is too short or repeats itself.
    """

    def __post_init__(self) -> None:
        check(self)


_UNIONS = {typing.Union, types.UnionType}


def check(settings: Any) -> None:
    """Check every field of a dataclass against its annotation: ranges, choices, lists; types are the parser's to check.

    Raises:
        SettingError: for the first field that does not fit.
    """
    for name, annotation in _annotations(type(settings)).items():  # type: ignore[arg-type]
        if message := _fault(getattr(settings, name), annotation):
            raise SettingError(name, message)


@functools.cache
def _annotations(kind: type[Any]) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fault(value: Any, annotation: Any) -> str:
    """What is wrong with a value, or nothing."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner, *markers = arguments
        return _fault(value, inner) or next((text for m in markers if (text := _out_of_range(value, m))), "")
    if origin in _UNIONS:
        faults = [_fault(value, option) for option in arguments if _is_kind(value, option)]
        return "" if not faults or "" in faults else faults[0]
    if origin is Literal:
        return "" if value in arguments else one_of(value, arguments)
    if origin in {list, tuple} and isinstance(value, list | tuple):
        kinds = arguments if origin is tuple and arguments[-1:] != (...,) else arguments[:1] * len(value)
        return next((text for item, kind in zip(value, kinds, strict=False) if (text := _fault(item, kind))), "")
    return ""


def _is_kind(value: Any, annotation: Any) -> bool:
    """Whether a union's part is the one that a value belongs to."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _is_kind(value, typing.get_args(annotation)[0])
    if annotation in {None, types.NoneType}:
        return value is None
    if origin is Literal:
        return any(type(value) is type(choice) for choice in typing.get_args(annotation))
    kind = origin or annotation
    if kind is float:
        return isinstance(value, int | float)
    return not isinstance(kind, type) or isinstance(value, kind)


def _out_of_range(value: Any, marker: Any) -> str:
    if isinstance(value, list | tuple):
        if isinstance(marker, Distinct):
            return "" if len(set(value)) == len(value) else f"expected each once, got {_listed(value)}"
        low, high = getattr(marker, "min_length", 0), getattr(marker, "max_length", None)
        if len(value) < low:
            return "expected at least one" if low == 1 else f"expected at least {low}, got {_listed(value) or 'none'}"
        return f"expected at most {high}, got {len(value)}" if high is not None and len(value) > high else ""
    if not isinstance(value, int | float):
        return ""
    low, above, high, below = (getattr(marker, name, None) for name in ("ge", "gt", "le", "lt"))
    fits = (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )
    return "" if fits and not math.isnan(value) else f"expected {_range(low, above, high, below)}, got {value}"


def _range(low: float | None, above: float | None, high: float | None, below: float | None) -> str:
    """``1 or more``, ``more than 0``, ``0 to 1``, ``more than 0 and less than 1``."""
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    parts = [] if low is None else [f"{low:g} or more"]
    parts += [] if above is None else [f"more than {above:g}"]
    parts += [] if high is None else [f"{high:g} or less" if not parts else f"at most {high:g}"]
    parts += [] if below is None else [f"less than {below:g}"]
    return " and ".join(parts)


def _listed(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def one_of(value: Any, choices: Sequence[Any]) -> str:
    """The message about a value that is none of the choices, with the nearest ones where it is a name."""
    near = did_you_mean(str(value), map(str, choices)) if isinstance(value, str) else ""
    hint = f": {near}" if near.startswith("did you mean") else ""
    return f"expected one of {', '.join(map(str, choices))}, got '{value}'{hint}"


def leaves(settings: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of every setting that is not itself a dataclass."""
    for name, kind in _annotations(settings).items():  # type: ignore[arg-type]
        if inner := nested(kind):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def nested(kind: Any) -> type[Any] | None:
    """``kind``, where it is a dataclass."""
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def plain_kind(annotation: Any) -> Any:
    """An annotation without its ranges: what a parser has to make of the text."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return plain_kind(arguments[0])
    if origin in {None, Literal} or not arguments:
        return annotation
    inner = [plain_kind(part) for part in arguments]
    return functools.reduce(operator.or_, inner) if origin in _UNIONS else origin[tuple(inner)]


def described(annotation: Any) -> str:
    """What a setting takes, in words: ``a whole number, or null``, ``numbers separated by commas``, ``one of a, b``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return described(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in _UNIONS:
        parts = [described(part) for part in arguments if part is not types.NoneType]
        return " or ".join(parts) + (", or null" if types.NoneType in arguments else "")
    if origin is tuple and arguments[-1:] != (...,):
        return f"{len(arguments)} values: {', '.join(map(described, arguments))}"
    if origin in {list, tuple}:
        kind = plain_kind(arguments[0])
        return f"{_PLURALS.get(kind, f'values, each {described(kind)},')} separated by commas"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "words"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Settings that every demonstration has; a package's own class inherits them and says what it shows.

    Args:
        level: quick (mechanics only), default (direction of the main claim) or full (five seeds decide every claim).
        seeds: seeds of the demonstration; default: by level.
    """

    level: Level = "default"
    seeds: Seeds | None = None

    def seeds_of(self, counts: Mapping[str, int]) -> list[int]:
        """The seeds that were asked for, or 0, 1, ... as many as the level has."""
        return list(range(counts[self.level])) if self.seeds is None else self.seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(Settings):
    """Settings of ``tenfold.training.fit``; a package inherits or nests them and gives its own defaults.

    At least one of ``epochs`` and ``steps`` is needed; the one that is reached first ends the training. A step is one
    update of the weights, also when several batches are accumulated into it.

    Args:
        epochs: passes over the training data.
        steps: updates of the weights.
        accumulate: batches whose gradients are averaged into one step.
        clip_norm: largest norm of the gradient of all parameters together; null leaves it.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two rows of metrics.csv.
        validate_every: steps (of ``accumulate`` batches) between two validations; 0 validates at the end of each epoch.
        device: where to compute; auto takes a GPU when there is one.
        devices: number of devices.
        precision: number format; auto is bf16 mixed precision on a CUDA device that has it, 32 bits elsewhere.
        strategy: Lightning's strategy for several devices, such as ddp or fsdp.

    Raises:
        UserError: a value is out of its range, or neither ``epochs`` nor ``steps`` is given.
    """

    epochs: Count | None = None
    steps: Count | None = None
    accumulate: Count = 1
    clip_norm: Positive | None = None
    checkpoint_every: Count = 500
    log_every: Count = 10
    validate_every: Natural = 0
    device: Device = "auto"
    devices: Count = 1
    precision: Precision = "auto"
    strategy: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is None and self.steps is None:
            raise UserError("neither --epochs nor --steps is given: the training would not end")

    def total_steps(self, batches: int) -> int:
        """Updates of the weights that the training makes on all devices together, for a schedule that ends with it.

        Args:
            batches: batches per epoch over all devices, ``KeyedLoader.batches``.
        """
        each = -(-(batches // self.devices) // self.accumulate)  # the last step of an epoch may have fewer batches
        limits = [] if self.epochs is None else [self.epochs * each]
        return min([*limits, self.steps] if self.steps is not None else limits)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, option: str = "") -> int:
    """Bytes of ``"6GB"``, ``"500 MiB"`` or ``"123456"``; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Args:
        text: number with or without a unit.
        option: what the message about a fault begins with.

    Raises:
        UserError: no such number or unit, or not more than 0 bytes.
    """
    start = f"{option}: " if option else ""
    number = text.strip().rstrip("BbIiKkMmGgTt")
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"{start}expected a number of bytes such as 6GB or 500MiB, got '{text}'") from None
    if unit not in _UNITS:
        raise UserError(f"{start}unknown unit in '{text}': {did_you_mean(unit, _UNITS)}")
    if not 0 < value < math.inf:
        raise UserError(f"{start}expected more than 0 bytes, got '{text}'")
    return int(value * _UNITS[unit])
