"""The demonstration at its quick level: mechanics only."""

import json

import pytest
import torch
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


@pytest.mark.slow
def test_two_processes_that_train_all_aligners_first_measure_what_one_process_does(tmp_path, capsys):
    words = ["demo", "--seeds", "0,1", "--steps", "4", "--sizes.pixels", "96", "--sizes.train", "8,4"]
    words += ["--sizes.test", "6,4", "--sizes.strangers", "3,2", "--sizes.develop", "6,3", "--sizes.batch", "4,2"]
    words += ["--sizes.align", "4", "--quiet"]
    found = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        torch.set_num_threads(1)
        assert main([*words, "--processes", str(count), "--out", str(out)]) == 0
        assert {p.name for p in (out / "worlds").iterdir() if p.suffix != ".lock"} == {
            f"{name}{seed}{suffix}"
            for name, suffix in (("seed-", ".npz"), ("aligner-", ".safetensors"))
            for seed in (0, 1)
        }
        found[count] = json.loads((out / "summary.json").read_text())
    assert found[1]["arms"] == found[2]["arms"]
    assert [c["estimate"] for c in found[1]["claims"]] == [c["estimate"] for c in found[2]["claims"]]
