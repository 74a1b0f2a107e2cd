"""The demonstration's mechanics on a model that is hardly trained; what it shows is decided by its own full level."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from corda import demo
from corda.cli import main
from corda.config import DemoSettings
from transformers import AutoTokenizer

from tenfold import UserError
from tenfold.runs import Run

SETTINGS = DemoSettings(level="quick", steps=2, facts=16)
ARMS = ["whole", "svd"] + [f"{name}-{kind}" for name in ("asvd", "half", "corda") for kind in ("facts", "text")]


def open_run(path, **options):
    return Run.open(path, package="corda", verb="demo", settings=SETTINGS, **options)


@pytest.fixture(scope="module", autouse=True)
def few_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.CALIBRATION_WINDOWS, "quick", 16)
        patch.setattr(demo, "MEASURED_WINDOWS", 16)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "first"
    return folder, demo.run(SETTINGS, open_run(folder), quiet=True)


def test_quick_level_measures_every_arm_and_decides_nothing(first):
    folder, summary = first
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["level"] == "quick"
    assert summary["seeds"] == [0]
    assert sorted(summary["arms"]) == sorted([*ARMS, "directions-facts", "directions-text"])
    assert [claim["holds"] for claim in summary["claims"]] == [None] * 10
    assert {claim["kind"] for claim in summary["claims"]} == {"ratio", "count"}
    assert summary["arms"]["directions-facts"]["layers"] == [21]
    assert (folder / "figures/truncation.png").stat().st_size > 10_000
    assert "data:image/png" in (folder / "report.html").read_text()


def test_equal_seeds_give_equal_numbers_and_another_seed_others(first, tmp_path):
    again = demo.run(DemoSettings(level="quick", steps=2, facts=16, seeds=[0]), open_run(tmp_path / "b"), quiet=True)
    assert again["arms"] == first[1]["arms"]
    assert again["claims"] == first[1]["claims"]
    parts = demo.halves(16, 0), demo.halves(16, 1)
    assert parts[0] != parts[1]


def test_resume_measures_no_seed_twice(first, tmp_path, monkeypatch):
    folder, summary = first
    run = open_run(tmp_path / "killed")
    values = json.loads((folder / "results/seed-0.json").read_text())
    run.write_json("results/seed-0.json", values)
    trained = []
    monkeypatch.setattr(demo, "train", lambda facts, seed, steps, **_: trained.append(seed))
    resumed = demo.run(SETTINGS, open_run(tmp_path / "killed", resume=True), quiet=True)
    assert trained == []
    assert resumed["arms"] == summary["arms"]
    assert resumed["seconds"] == summary["seconds"]


KILLED = """
import os, signal, sys
from corda import cli, demo

demo.CALIBRATION_WINDOWS["quick"] = demo.MEASURED_WINDOWS = 16
directions, calls = demo.directions, []

def until_killed(*arguments):
    calls.append(arguments)
    if len(calls) == 4:  # in the second seed, after its training and most of its measurements
        os.kill(os.getpid(), signal.SIGKILL)
    return directions(*arguments)

demo.directions = until_killed
cli.main(sys.argv[1:])
"""


def test_a_killed_demo_resumes_to_the_numbers_of_an_unbroken_one(tmp_path, capsys):
    words = ["demo", "--quick", "--steps", "2", "--facts", "16", "--seeds", "0,1", "--quiet", "--out"]
    command = [sys.executable, "-c", KILLED, *words, str(tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed/results").iterdir()] == ["seed-0.json"]
    assert main([*words, str(tmp_path / "killed")]) == 2  # unfinished: neither --resume nor --overwrite
    assert main([*words, str(tmp_path / "killed"), "--resume"]) == 0
    assert main([*words, str(tmp_path / "whole")]) == 0
    killed, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole"))
    assert {**killed, "seconds": 0} == {**whole, "seconds": 0}


def test_claims_follow_the_measured_numbers(first, tmp_path, monkeypatch):
    results = json.loads((first[0] / "results/seed-0.json").read_text())
    values = results["values"]
    for kind in ("facts", "text"):
        for arm, increase in ((f"corda-{kind}", 0.3), ("svd", 1.0), (f"asvd-{kind}", 0.8)):
            values[arm][f"{kind} +loss 50"] = increase
        values[f"corda-{'text' if kind == 'facts' else 'facts'}"][f"{kind} +loss 50"] = 0.29
    values["whole"]["facts known"] = 95
    values["directions-text"]["layers, energy KPM / MiLoRA"] = 20
    monkeypatch.setitem(demo.DROPS, "full", (50,))
    settings = DemoSettings(level="full")
    run = Run.open(tmp_path / "full", package="corda", verb="demo", settings=settings)
    for seed in range(5):
        run.write_json(f"results/seed-{seed}.json", results)
    summary = demo.run(settings, run, quiet=True)
    assert summary["seeds"] == [0, 1, 2, 3, 4]
    claims = {claim["id"]: claim["holds"] for claim in summary["claims"]}
    true = dict.fromkeys(
        ("learned", "svd_facts", "svd_text", "asvd_facts", "asvd_text", "gain_kpm", "energy_ipm"), True
    )
    assert claims == true | dict.fromkeys(("matched_facts", "matched_text", "energy_kpm"), False)


def test_the_saved_model_goes_on_with_the_command_line(first, tmp_path, capsys):
    folder, _ = first
    text = (folder / "text.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(text[:2000])["input_ids"]
    assert ids == demo.encode(text[:2000]).tolist()
    assert tokenizer.decode(ids) == text[:2000]
    calibration = ["--calibration.pack", "128", "--calibration.windows", "4"]
    for source in (f"text:{folder}/text.txt", f"jsonl:{folder}/facts.jsonl"):
        out = tmp_path / source.partition(":")[0]
        words = ["stats", "--model", f"{folder}/model", "--data", source, "--out", str(out), *calibration]
        assert main(words) == 0
        assert "21 layers" in capsys.readouterr().out


def test_calibration_and_measurement_share_neither_facts_nor_paragraphs():
    parts = demo.halves(192, 3)
    assert len(set(parts["calibration"]) | set(parts["measured"])) == 192
    assert len(parts["calibration"]) == len(parts["measured"]) == 96
    paragraphs = [text.split("\n\n") for text in demo.texts().values()]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert len(paragraphs[1]) > 100


def test_losses_count_the_names_only(llama):
    facts = ["U+0416 -> CYRILLIC CAPITAL LETTER ZHE", "U+03C0 -> GREEK SMALL LETTER PI"]
    vocabulary = len(demo.tokenizer())

    class Oracle(torch.nn.Module):
        """Knows the next character with certainty, but for one of the second name; guesses code points and text."""

        def forward(self, input_ids, use_cache):
            scores = torch.zeros(*input_ids.shape, vocabulary)
            scores[:, 10:-1] = 40 * torch.nn.functional.one_hot(input_ids[:, 11:], vocabulary)
            if len(input_ids) == 2:
                scores[1, 15] = 0
            return type("Output", (), {"logits": scores})

    found = demo.losses(Oracle(), facts)
    characters = sum(len(fact) - len("U+0416 -> ") + 1 for fact in facts)
    assert found["facts loss"] == pytest.approx(torch.tensor(float(vocabulary)).log().item() / characters, rel=1e-5)
    assert found["facts known"] == 50


def test_gain_is_the_norm_of_the_answer():
    A, X = torch.randn(4, 16, dtype=torch.float64), torch.randn(16, 50, dtype=torch.float64)
    expected = torch.linalg.norm(A @ X) / torch.linalg.norm(A) / torch.linalg.norm(X)
    assert demo.gain(A, X @ X.T) == pytest.approx(expected.item())


def test_fact_windows_begin_with_a_whole_fact():
    facts = demo.halves(16, 0)["measured"]
    windows = demo.fact_windows(facts, 20, torch.Generator().manual_seed(0))
    assert windows.shape == (20, demo.LENGTH)
    for row in windows:
        assert any(demo.tokenizer().decode(row).startswith(f"\n{fact}\n") for fact in facts)


def test_impossible_settings_are_refused():
    for settings in ({"facts": 3}, {"rank": 0}, {"steps": 0}, {"seeds": []}):
        with pytest.raises(UserError, match="at least"):
            DemoSettings(**settings)
    with pytest.raises(UserError, match="at most 64"):
        DemoSettings(rank=65)
