import json
import subprocess
import sys
import time

import numpy as np
import pytest

from tenfold import bench


def same(ours, peer):
    assert ours == peer
    return "equal"


def test_ratio_is_peer_over_ours_and_both_alternate():
    calls = []

    def ours():
        calls.append("ours")
        time.sleep(0.002)
        return 1

    def peer():
        calls.append("peer")
        time.sleep(0.02)
        return 1

    row = bench.compare("a", ours, peer, same, shape="s", required=">= 2", pairs=5)
    assert calls == ["ours", "peer"] * 7  # the equality check, one warm-up, five pairs
    assert row.ratio > 1
    assert row.ci95[0] <= row.ratio <= row.ci95[1]
    assert row.peer > row.ours >= 0.002
    assert row.statistic == "median of 5 alternating pairs"


def test_what_both_contain_is_taken_off_both(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def lasting(seconds):
        def work():
            now[0] += seconds
            return 1

        return work

    row = bench.compare("a", lasting(5), lasting(11), same, shape="s", required=">= 1.5", pairs=3, common=lasting(4))
    assert (row.ours, row.peer, row.ratio) == (1, 7, 7)
    assert row.statistic == "median of 3 alternating pairs, without what both contain"


def test_unequal_results_are_never_timed():
    calls = []
    with pytest.raises(AssertionError):
        bench.compare("a", lambda: calls.append(0) or 1, lambda: 2, same, shape="s", required=">= 2")
    assert len(calls) == 1


def test_bounds_close_to_one_need_21_pairs():
    arguments = {"shape": "s", "required": ">= 0.95"}
    assert bench.compare("a", lambda: 1, lambda: time.sleep(0.001) or 1, same, pairs=9, **arguments).holds is None
    assert bench.compare("a", lambda: 1, lambda: time.sleep(0.001) or 1, same, pairs=21, **arguments).holds is True


def test_bench_json_has_the_agreed_form(tmp_path):
    row = bench.compare("a", lambda: 1, lambda: 1, same, shape="s", required=">= 0.001", pairs=3)
    written = bench.write(tmp_path / "b/bench.json", "corda", {"peft": "1"}, [row])
    read = json.loads((tmp_path / "b/bench.json").read_text())
    assert read == json.loads(json.dumps(written))
    assert read["peers"] == {"peft": "1"}
    assert set(read["machine"]) >= {"cpu", "threads"}
    fields = {"id", "shape", "ours", "peer", "unit", "statistic", "ratio", "ci95", "required", "holds", "equal"}
    assert set(read["comparisons"][0]) == fields
    headers, rows = bench.rows(read)
    assert len(headers) == len(rows[0])


def allocating(megabytes):
    return [sys.executable, "-c", f"x = b'1' * {megabytes * 1_000_000}; print('done', len(x))"]


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_benchmark():
    ballast = np.ones(60_000_000)  # 480 MB here
    small, large = bench.peak_rss(allocating(1)), bench.peak_rss(allocating(200))
    assert ballast.size
    assert small < 100
    assert large - small == pytest.approx(199, abs=5)


def test_the_peak_of_a_process_that_fails_is_no_number():
    with pytest.raises(subprocess.CalledProcessError):
        bench.peak_rss([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_measured_process_gets_the_given_variables():
    command = [sys.executable, "-c", "import os; assert os.environ['MALLOC_ARENA_MAX'] == '1'"]
    assert bench.peak_rss(command, {"MALLOC_ARENA_MAX": "1"}) > 1


@pytest.mark.parametrize(
    ("required", "ratio", "ci95", "how", "holds"),
    [
        (">= 1.05", 1.2, (1.1, 1.3), {"pairs": 9}, None),
        (">= 1.05", 1.2, (1.1, 1.3), {"pairs": 21}, True),
        (">= 1.05", 1.2, None, {"counted": True}, True),
        (">= 1.05", 1.01, None, {"counted": True}, False),
        (">= 1.05", 1.2, None, {}, None),
        (">= 2", 2.5, (1.9, 3.0), {"pairs": 9}, None),
        (">= 2", 2.5, None, {}, True),
    ],
)
def test_a_bound_near_1_is_decided_by_counts_or_by_many_pairs_alone(required, ratio, ci95, how, holds):
    assert bench.decide(required, ratio, ci95, **how) is holds


def test_counts_make_a_row_whose_ratio_is_peer_over_ours_unless_it_is_given():
    row = bench.counted("bytes", 2.0, 5.0, shape="s", unit="MiB", required=">= 2.5", equal="same")
    assert (row.ratio, row.holds, row.ci95) == (2.5, True, None)
    share = bench.counted("share", 2.0, 5.0, shape="s", unit="MiB", required="<= 0.3", equal="same", ratio=0.4)
    assert (share.ratio, share.holds) == (0.4, False)


def test_resident_memory_is_what_the_computation_adds_to_an_idle_process():
    def grow(megabytes):
        return [sys.executable, "-c", f"x = bytearray({megabytes} * 10**6); x[::1000] = b'1' * len(x[::1000])"]

    row = bench.resident("rss", grow(40), grow(120), grow(0), shape="s", required=">= 2", equal="none", runs=1)
    assert 30 < row.ours < 50
    assert 110 < row.peer < 130
    assert row.holds is True
