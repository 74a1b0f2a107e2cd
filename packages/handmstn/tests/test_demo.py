"""The demonstration at its quick level: mechanics only."""

import json

import yaml
from handmstn.cli import main

from tenfold.testing import assert_user_error


def test_the_quick_demo_writes_everything_and_decides_nothing(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: rendered")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert list(summary["arms"]) == ["aligner", "whole", "palm", "all"]
    assert {claim["holds"] for claim in summary["claims"]} == {None}
    assert {"palm_over_whole", "palm_times_whole", "aligner", "open_set", "cllr"} <= {
        c["id"] for c in summary["claims"]
    }
    pictures = {p.stem for p in (tmp_path / "d/figures").glob("*.png")}
    assert pictures == {"aligned", "cmc", "other-domain", "probes"}
    kept = yaml.safe_load((tmp_path / "d/config.yaml").read_text())
    assert kept["steps"] == 6
    assert kept["sizes"]["train"] == [8, 4]
    assert None not in kept["sizes"].values()
    assert (tmp_path / "d/report.html").stat().st_size > 10000


def test_sizes_that_are_given_count_and_the_rest_is_the_levels(tmp_path, capsys):
    from handmstn.config import LEVELS, DemoSettings, Sizes

    found = DemoSettings(level="full", sizes=Sizes(test=(30, 5)))
    assert (found.sizes.test, found.sizes.train, found.steps) == ((30, 5), LEVELS["full"][0].train, 300)
    words = ["demo", "--quick", "--sizes.batch", "9,2", "--out", str(tmp_path / "x")]
    assert_user_error(main, words, capsys, "--sizes.batch: expected no more than --sizes.train")
