import pytest

from tenfold.errors import RUNNING, MissingExtraError, did_you_mean, needs


def test_what_is_installed_is_not_asked_for():
    needs("yaml", "report")


@pytest.mark.parametrize(
    ("running", "distribution", "extra", "named"),
    [
        ("", "tenfold", "demo", "tenfold[demo]"),
        ("tenfold", "tenfold", "demo", "tenfold[demo]"),
        ("numpy", "tenfold", "demo", "tenfold[demo]"),  # runs, and has no such extra
        ("tenfold", "radiogat", "report", "tenfold[report]"),  # runs, and has it
        ("tenfold", "radiogat", "pyg", "radiogat[pyg]"),  # runs, and has it not
    ],
)
def test_the_message_names_the_distribution_that_has_the_extra(running, distribution, extra, named):
    token = RUNNING.set(running)
    try:
        with pytest.raises(MissingExtraError) as raised:
            needs("no_such_module", extra, distribution, why="--model x")
    finally:
        RUNNING.reset(token)
    assert str(raised.value) == f'--model x needs no_such_module, which is not installed; pip install "{named}"'


def test_a_module_that_a_test_hides_counts_as_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(MissingExtraError, match="^yaml is not installed"):
        needs("yaml", "report")


def test_near_names_are_suggested_few_are_listed_and_many_are_counted():
    assert did_you_mean("ranck", ["init.rank", "seed"]) == "did you mean init.rank?"
    assert did_you_mean("x", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", [f"name{i}" for i in range(30)]) == "none of the 30 known names is near"
    assert did_you_mean("x", []) == "none is known"
