"""The demonstration's mechanics at the quick level; what it shows is decided at its own full level."""

import json

import numpy as np
import pytest
from pckd.cli import main
from pckd.commands import demo


@pytest.fixture(scope="module", autouse=True)
def few_letters():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "COPIES", {"train": 1, "test": 1})
        demo.letters.cache_clear()
        yield
    demo.letters.cache_clear()


def test_quick_level_measures_its_arms_and_decides_nothing(tmp_path, capsys):
    words = ["demo", "--quick", "--seeds", "0,1", "--out", str(tmp_path / "d"), "--quiet"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: rendered")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert set(summary["arms"]) == {"teacher", *demo.SHOWN["quick"]}
    assert [claim["holds"] for claim in summary["claims"]] == [None] * 5
    assert any("Preview itself changes top-1" in note for note in summary["notes"])
    assert (tmp_path / "d/report.html").read_text().count("data:image/png") == 4
    assert main([*words[:-2], str(tmp_path / "e"), "--quiet"]) == 0
    again = json.loads((tmp_path / "e/summary.json").read_text())
    assert again["arms"] == summary["arms"]


def test_letters_of_the_test_are_of_other_faces():
    data = demo.letters(0)
    assert len(data.classes) == len(demo.LETTERS) == len(set(demo.LETTERS))
    assert (len(data.train), len(data.test)) == (9 * len(demo.LETTERS), 3 * len(demo.LETTERS))
    assert np.array_equal(np.unique(data.test.labels), np.arange(len(demo.LETTERS)))
    assert demo.letters(1).train.images.float().sub(data.train.images.float()).abs().mean() > 1
