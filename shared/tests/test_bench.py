import json
import time

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
