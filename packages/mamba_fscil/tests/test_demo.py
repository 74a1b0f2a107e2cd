"""The demonstration's mechanics at the quick level; what it shows is decided at its own full level."""

import json

from mamba_fscil.cli import main
from mamba_fscil.commands import demo
from mamba_fscil.config import METHODS


def test_quick_level_measures_all_arms_in_both_worlds_and_decides_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demo.GLYPHS, "quick", (6, 2, 2))
    monkeypatch.setattr(demo, "STEPS", {"quick": 4})
    demo.data_of.cache_clear()
    assert main(["demo", "--quick", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: glyphs are rendered")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert {f"{world} {arm}" for world in demo.WORLDS for arm in METHODS} <= set(summary["arms"])
    assert [claim["holds"] for claim in summary["claims"]] == [None] * 7
    assert (tmp_path / "d/report.html").read_text().count("data:image/png") == 5
    demo.data_of.cache_clear()


def test_the_faces_that_letters_are_tested_on_are_in_no_training_picture():
    data = demo.data_of("glyphs", "quick", 0)
    base, way, sessions = demo.GLYPHS["quick"]
    assert len(data.classes) == base + way * sessions
    train = {x.numpy().tobytes() for x in data.base.split.images}
    assert not train & {x.numpy().tobytes() for x in data.test.split.images}
    assert [len(part) for part in data.shots] == [5 * way] * sessions
