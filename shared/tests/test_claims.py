import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tenfold import NonFiniteError, UserError, executors
from tenfold.claims import Bound, Study, arm_rows, claim_rows, interval, mean_ci95
from tenfold.runs import Run
from tenfold.terminal import claims_table, show_claims, table

sys.path.insert(0, str(Path(__file__).parent))
from claims_run import broken_at_1, scaled

KD, CE = [61.9, 62.8, 61.2, 62.4, 63.0], [52.1, 53.0, 51.4, 52.2, 52.9]


def study(path, level="full", seeds=range(5), **flags):
    run = Run.open(path, package="tenfold", verb="demo", settings={}, **flags)
    return Study(run, level=level, seeds=list(seeds), data="none")


def measure(seed):
    return {"kd": {"top1": KD[seed]}, "ce": {"top1": CE[seed]}}


def test_difference_is_the_paired_t_interval(tmp_path):
    s = study(tmp_path)
    s.over_seeds(measure)
    s.difference("kd_beats_ce", "KD beats CE", ("kd", "top1"), ("ce", "top1"), required=">= 4")
    claim = s.finish()["claims"][0]
    expected = stats.ttest_rel(KD, CE).confidence_interval(0.95)
    assert claim["ci95"] == pytest.approx([expected.low, expected.high])
    assert claim["estimate"] == pytest.approx(9.94)
    assert claim["holds"] is True
    assert claim["method"] == "paired t over 5 seeds"


def test_ratio_is_the_geometric_mean_with_t_on_logs(tmp_path):
    s = study(tmp_path)
    s.over_seeds(measure)
    s.ratio("r", "text", ("ce", "top1"), ("kd", "top1"), required="<= 0.9")
    claim = s.finish()["claims"][0]
    logs = np.log(np.array(CE) / np.array(KD))
    low, high = stats.t.interval(0.95, 4, loc=logs.mean(), scale=stats.sem(logs))
    assert claim["estimate"] == pytest.approx(stats.gmean(np.array(CE) / np.array(KD)))
    assert claim["ci95"] == pytest.approx([np.exp(low), np.exp(high)])
    assert claim["holds"] is True


def test_a_ratio_of_values_that_are_not_positive_is_not_decided(tmp_path):
    s = study(tmp_path, seeds=[0, 1])
    s.over_seeds(lambda seed: {"a": {"loss": 1.0}, "b": {"loss": float(seed)}})
    s.ratio("r", "text", ("a", "loss"), ("b", "loss"), required=">= 1")
    assert s.finish()["claims"][0]["holds"] is None


@pytest.mark.parametrize(("level", "holds"), [("quick", None), ("default", True), ("full", None)])
def test_two_seeds_show_the_direction_at_the_default_level_and_decide_nothing_at_the_full_one(tmp_path, level, holds):
    s = study(tmp_path, level, seeds=[0, 1])
    s.over_seeds(measure)
    s.difference("d", "KD beats CE", ("kd", "top1"), ("ce", "top1"), required=">= 4", main=True)
    s.ratio("r", "CE / KD", ("ce", "top1"), ("kd", "top1"), required="<= 0.9", main=True)
    claims = s.finish()["claims"]
    assert [claim["holds"] for claim in claims] == [holds] * 2
    assert all(claim["method"].endswith("too few to decide") == (level == "full") for claim in claims)


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=20).filter(lambda v: np.std(v) > 1e-3))
def test_mean_ci95_is_students(values):
    mean, ci95 = mean_ci95(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert ci95 == pytest.approx((low, high), rel=1e-9, abs=1e-6)
    assert mean == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize(
    ("bound", "estimate", "ci95", "holds"),
    [
        (">= 4", 9.9, (9.6, 10.3), True),
        (">= 4", 4.2, (3.8, 4.6), None),
        (">= 4", 3.9, (3.8, 4.6), False),
        ("<= 1/3", 0.3, None, True),
        ("<= 1/3", 0.34, None, False),
        ("<= 0.9", 0.8, (0.7, 0.95), None),
    ],
)
def test_a_claim_holds_when_its_whole_interval_does(bound, estimate, ci95, holds):
    assert Bound.parse(bound).decide(estimate, ci95) is holds


@pytest.mark.parametrize(
    ("level", "expected"), [("quick", [None, None]), ("default", [True, None]), ("full", [True, True])]
)
def test_levels_decide_nothing_the_main_claims_or_all(tmp_path, level, expected):
    s = study(tmp_path, level)
    s.over_seeds(measure)
    s.count("main", "text", 4, 5, required=">= 4", main=True)
    s.count("side", "text", 4, 5, required=">= 4")
    assert [claim["holds"] for claim in s.finish()["claims"]] == expected


def test_a_killed_study_goes_on_where_it_was_and_ends_with_the_same_summary(tmp_path):
    class Killed(Exception):
        pass

    def killed_at_3(seed):
        if seed == 3:
            raise Killed
        return measure(seed)

    whole = study(tmp_path / "whole")
    whole.over_seeds(measure)
    broken = study(tmp_path / "broken")
    with pytest.raises(Killed):
        broken.over_seeds(killed_at_3)
    seen = []
    broken.run.close()
    resumed = study(tmp_path / "broken", resume=True)
    resumed.over_seeds(lambda seed: seen.append(seed) or measure(seed))
    assert seen == [3, 4]
    assert resumed.finish(seconds=1) == whole.finish(seconds=1)


def test_arms_are_measured_seed_by_seed(tmp_path):
    seen = []

    def arm(name):
        return lambda seed: seen.append((name, seed)) or {"top1": float(seed)}

    s = study(tmp_path, seeds=[0, 1])
    s.over_arms({"a": arm("a"), "b": arm("b")})
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert s.finish()["arms"] == {"a": {"top1": [0.0, 1.0]}, "b": {"top1": [0.0, 1.0]}}


def test_nan_in_a_measurement_is_caught_with_its_name(tmp_path):
    s = study(tmp_path, seeds=[0])
    with pytest.raises(NonFiniteError, match="seed-0: top1 of arm kd is nan"):
        s.over_seeds(lambda seed: {"kd": {"top1": float("nan")}})


def test_summary_has_the_agreed_form_and_strict_fails_on_a_failed_claim(tmp_path, capsys):
    s = study(tmp_path)
    s.over_seeds(measure)
    s.difference("d", "CE beats KD", ("ce", "top1"), ("kd", "top1"), required=">= 0")
    s.note("a remark")
    s.finish()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == [
        "package",
        "version",
        "command",
        "level",
        "data",
        "arms",
        "claims",
        "notes",
        "seconds",
        "seeds",
    ] or (
        set(summary)
        == {"package", "version", "command", "level", "data", "seconds", "seeds", "arms", "claims", "notes"}
    )
    assert set(summary["claims"][0]) == {"id", "text", "kind", "estimate", "ci95", "method", "required", "holds"}
    assert show_claims(summary) == 0
    assert show_claims(summary, strict=True) == 1
    out = capsys.readouterr().out
    assert "CE beats KD" in out
    assert "NO" in out
    assert "note: a remark" in out


def test_rows_of_several_summaries():
    claim = {"text": "t", "estimate": 1.234, "ci95": [1, 2], "required": ">= 1", "holds": None}
    headers, rows = claim_rows([{"package": "p", "level": "quick", "claims": [claim]}])
    assert rows == [["p", "quick", "t", "1.23 [1, 2]", ">= 1", "not decided"]]
    assert len(headers) == len(rows[0])


def test_intervals_have_three_digits_and_whole_thousands():
    assert interval(9.9444, (9.6, 10.333)) == "9.94 [9.6, 10.3]"
    assert interval(1234.6, (-0.00012345, 1e7)) == "1235 [-0.000123, 1e+07]"
    assert interval(3, None) == "3"


def test_arms_measured_in_processes_of_one_thread_equal_those_measured_here(tmp_path):
    arms = {"a": partial(scaled, 1.0), "b": partial(scaled, 2.0)}
    here, there = study(tmp_path / "here", seeds=[0, 1]), study(tmp_path / "there", seeds=[0, 1])
    here.over_arms(arms)
    shown = []
    with executors.make("processes:2") as pool:
        there.over_arms(arms, pool, lambda names: (shown.append(name) or name for name in names))
    assert sorted(shown) == ["a-seed-0", "a-seed-1", "b-seed-0", "b-seed-1"]
    for arm in arms:
        assert here.values((arm, "top1")).tolist() == there.values((arm, "top1")).tolist()
        assert np.array_equal(here.arrays(arm, 1)["history"], there.arrays(arm, 1)["history"])
    assert set(there.values(("a", "threads"))) == {1.0}
    assert os.getpid() not in {*there.values(("a", "pid")), *there.values(("b", "pid"))}


def test_a_fault_in_a_process_ends_the_study_and_keeps_what_was_measured(tmp_path):
    s = study(tmp_path, seeds=[0, 1])
    with executors.make("processes:1") as pool, pytest.raises(ZeroDivisionError):
        s.over_arms({"a": broken_at_1}, pool)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a-seed-0.json"]


def test_arms_are_measured_on_a_cluster_of_dask(tmp_path):
    distributed = pytest.importorskip("distributed", reason="the extra `dask`")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        s = study(tmp_path, seeds=[0, 1])
        with executors.make(f"dask:{cluster.scheduler_address}") as pool:
            s.over_arms({"a": partial(scaled, 3.0)}, pool)
        assert s.values(("a", "top1")).tolist() == [3.0, 6.0]


@pytest.mark.parametrize("spec", ["processes", "processes:0", "threads:2", "dask:"])
def test_an_executor_of_another_form_is_refused(spec):
    with pytest.raises(UserError, match=f"--executor {spec}: expected processes:N"), executors.make(spec):
        pass


def test_what_is_known_already_is_recorded_without_a_measurement(tmp_path):
    s = study(tmp_path, None, seeds=[4, 7])
    s.record("sgr", {"accuracy": 91})
    s.record("sgr", {"accuracy": 92}, seed=7)
    summary = s.finish()
    assert summary["arms"] == {"sgr": {"accuracy": [91.0, 92.0]}}
    assert (summary["level"], summary["package"], summary["command"]) == (None, "tenfold", "demo")
    with pytest.raises(NonFiniteError):
        s.record("other", {"accuracy": float("nan")})


def test_a_command_without_levels_decides_every_claim_from_three_seeds_on(tmp_path):
    for seeds, holds in (([0, 1], None), ([0, 1, 2], True)):
        s = study(tmp_path / str(len(seeds)), None, seeds=seeds)
        s.over_seeds(measure)
        s.against("ce", ["ce", "kd"], "top1", required=">= 4")
        (claim,) = s.finish()["claims"]
        assert (claim["id"], claim["text"], claim["holds"]) == ("kd_over_ce", "top1 of kd - top1 of ce", holds)


def test_seeds_that_settings_were_tuned_on_are_named(tmp_path):
    assert study(tmp_path / "a", seeds=[0, 1]).finish()["notes"] == []
    (note,) = study(tmp_path / "b", seeds=[0, 100, 101]).finish()["notes"]
    assert "2 seeds of this report (100, 101)" in note


def test_items_that_are_paired_have_their_own_name_and_are_not_taken_for_seeds_of_tuning(tmp_path):
    run = Run.open(tmp_path, package="tenfold", verb="compare", settings={})
    s = Study(run, data="none", seeds=range(101), unit="pair")
    s.over_seeds(lambda number: {"a": {"x": float(number)}, "b": {"x": 0.5 * number}})
    s.difference("d", "text", ("a", "x"), ("b", "x"), required=">= 0")
    summary = s.finish()
    assert summary["claims"][0]["method"] == "paired t over 101 pairs"
    assert summary["notes"] == []


def test_a_table_of_arms_has_means_with_intervals_and_a_dash_where_nothing_was_measured(tmp_path):
    s = study(tmp_path, seeds=[0, 1])
    s.over_seeds(lambda seed: {"a": {"x": float(seed)}, "b": {"x": 3.0, "y": 2.0}})
    headers, body = arm_rows(s, ["b", "a"], ["x", "y"], {"a": "the first"})
    assert headers == ["arm", "x", "y"]
    assert body == [["b", "3", "2"], ["the first", "0.5", "-"]]
    assert table(headers, body).splitlines()[-1].startswith("the first")


def test_a_summary_without_claims_has_no_empty_table():
    summary = {"package": "corda", "command": "compare", "level": None, "seeds": [0, 1], "seconds": 2.0, "claims": []}
    assert claims_table(summary) == "corda compare, seeds 0, 1: 2 s, no claims\n"
