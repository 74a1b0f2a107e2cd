import json

import numpy as np
import pytest
from head_kd.cli import main
from head_kd.per_image import average_precision


def test_the_quick_demo_runs_and_goes_on_where_it_was(tmp_path, capsys):
    out = tmp_path / "demo"
    words = ["demo", "--quick", "--out", str(out), "--processes", "1", "--quiet"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("data: rendered")
    assert "not decided" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == {"plain", "assist", "akd"}
    assert all(claim["holds"] is None for claim in summary["claims"])
    for name in (
        "report.html",
        "figures/arms.png",
        "figures/detections.png",
        "teacher.safetensors",
        "students/akd.safetensors",
    ):
        assert (out / name).stat().st_size > 0
    with np.load(out / "results/akd-seed-0.npz") as found:
        assert 100 * average_precision(found) == pytest.approx(summary["arms"]["akd"]["AP"][0])
        assert found["objects"].shape == (12, 6)
    manifest = json.loads((out / "run.json").read_text())
    manifest["finished"] = False
    (out / "run.json").write_text(json.dumps(manifest))
    before = json.loads((out / "results/akd-seed-0.json").read_text())
    (out / "results/plain-seed-0.json").unlink()
    assert main([*words, "--resume"]) == 0
    assert json.loads((out / "results/akd-seed-0.json").read_text()) == before
    again = json.loads((out / "summary.json").read_text())
    assert again["arms"] == summary["arms"]
