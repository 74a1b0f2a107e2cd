"""The demonstration at its quick level: mechanics only."""

import json

from handmstn.cli import main


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
    assert (tmp_path / "d/report.html").stat().st_size > 10000
