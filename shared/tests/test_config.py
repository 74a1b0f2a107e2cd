"""Ranges and choices of settings, from Python; the command line's part is in ``test_cli``."""

import dataclasses
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold import UserError
from tenfold.config import (
    Count,
    DemoSettings,
    Distinct,
    Ge,
    Interval,
    Length,
    Lt,
    NonNegative,
    Positive,
    Probability,
    Seeds,
    SettingError,
    Settings,
    Share,
    described,
    leaves,
    parse_bytes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    base: Annotated[float, Ge(1)] = 1.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    count: Count = 1
    rate: Positive = 0.1
    weight: NonNegative | None = None
    share: Share = 0.5
    probability: Probability = 0.0
    odd: Annotated[int, Interval(ge=1, lt=10)] = 1
    size: Literal["auto"] | Annotated[int, Ge(8)] = "auto"
    method: Literal["ce", "kd"] | None = None
    arms: Annotated[list[Literal["ce", "kd"]], Length(1), Distinct()] = dataclasses.field(
        default_factory=lambda: ["ce"]
    )
    ranges: tuple[float, Annotated[float, Lt(5)]] = (0.0, 1.0)
    seeds: Seeds = dataclasses.field(default_factory=lambda: [0])
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count: expected 1 or more, got 0"),
        ({"rate": 0}, "rate: expected more than 0, got 0"),
        ({"rate": float("nan")}, "rate: expected more than 0, got nan"),
        ({"weight": -1}, "weight: expected 0 or more, got -1"),
        ({"share": 1.0}, "share: expected more than 0 and less than 1, got 1.0"),
        ({"probability": 1.5}, "probability: expected 0 to 1, got 1.5"),
        ({"odd": 10}, "odd: expected 1 or more and less than 10, got 10"),
        ({"size": 4}, "size: expected 8 or more, got 4"),
        ({"size": "outo"}, "size: expected one of auto, got 'outo': did you mean auto?"),
        ({"method": "kdd"}, "method: expected one of ce, kd, got 'kdd': did you mean kd?"),
        ({"arms": []}, "arms: expected at least one"),
        ({"arms": ["kd", "kd"]}, "arms: expected each once, got kd,kd"),
        ({"arms": ["kd", "xx"]}, "arms: expected one of ce, kd, got 'xx'"),
        ({"ranges": (0.0, 5.0)}, "ranges: expected less than 5, got 5.0"),
        ({"seeds": [0, -1]}, "seeds: expected 0 or more, got -1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_name_and_what_was_expected(changes, message):
    with pytest.raises(SettingError) as refused:
        Example(**changes)
    assert str(refused.value) == message


def test_values_that_fit_are_taken_also_at_the_bounds_and_null():
    found = Example(count=1, weight=0, probability=1, odd=9, size=8, method="kd", arms=["kd", "ce"], seeds=[100])
    assert (found.weight, found.size, found.method) == (0, 8, "kd")
    assert Example(weight=None, method=None).weight is None


def test_a_nested_setting_is_checked_where_it_is_made_and_knows_its_path_below_another():
    with pytest.raises(SettingError, match=r"^base: expected 1 or more, got 0.5$"):
        Example(inner=Inner(base=0.5))
    assert str(SettingError("base", "expected 1 or more, got 0").under("losses.preview")) == (
        "losses.preview.base: expected 1 or more, got 0"
    )


@given(st.integers(-5, 15))
def test_the_range_of_an_interval_is_the_comparison(value):
    def valid():
        Example(odd=value)
        return True

    if 1 <= value < 10:
        assert valid()
    else:
        with pytest.raises(SettingError):
            valid()


def test_markers_of_the_library_annotated_types_are_understood():
    @dataclasses.dataclass(frozen=True)
    class TheirGe:  # the attribute is all that counts
        ge: int

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Theirs(Settings):
        count: Annotated[int, TheirGe(3)] = 3

    with pytest.raises(SettingError, match="count: expected 3 or more, got 2"):
        Theirs(count=2)


def test_settings_are_named_by_their_path_and_described_in_words():
    kinds = dict(leaves(Example))
    assert "inner.base" in kinds
    assert "inner" not in kinds
    assert described(kinds["count"]) == "a whole number"
    assert described(kinds["weight"]) == "a number, or null"
    assert described(kinds["arms"]) == "values, each one of ce, kd, separated by commas"
    assert described(kinds["seeds"]) == "whole numbers separated by commas"
    assert described(kinds["ranges"]) == "2 values: a number, a number"


def test_a_demos_seeds_are_those_asked_for_or_as_many_as_its_level_has():
    counts = {"quick": 1, "default": 2, "full": 5}
    assert DemoSettings(level="full").seeds_of(counts) == [0, 1, 2, 3, 4]
    assert DemoSettings(seeds=[7]).seeds_of(counts) == [7]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("123456", 123456), ("2GB", 2 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), ("1TiB", 2**40), (" 7 b ", 7)],
)
def test_sizes_are_read_with_decimal_and_binary_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "x GB", "0", "-1GB", "3 gallons", "nanGB", "infGB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="--budget: "):
        parse_bytes(text, "--budget")
