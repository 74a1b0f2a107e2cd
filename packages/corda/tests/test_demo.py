"""The demonstration's mechanics on a model that is hardly trained; what it shows is decided by its own full level."""

import json

import numpy as np
import pytest
import torch
from corda.cli import main
from corda.commands import _small_llama, demo
from corda.commands._finetune import Trajectory
from corda.config import DemoSettings
from transformers import AutoTokenizer

from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.runs import Run

SETTINGS = DemoSettings(level="quick", steps=2, facts=16, seeds=[0, 1])
STARTS = ("lora", "corda-kpm", "corda-ipm", "ipm-balanced")
ARMS = ["whole", "svd"] + [f"{name}-{kind}" for name in ("asvd", "half", "corda") for kind in ("facts", "text")]
ARMS += [f"directions-{kind}" for kind in ("facts", "text")]
ARMS += [f"{rate}-{name}" for rate in ("tuned", "common") for name in STARTS]


def summary_of(settings, run):
    with run:
        assert demo.run(settings, Invocation(run, quiet=True)) == 0
    return json.loads((run.path / "summary.json").read_text())


def open_run(path, **options):
    return Run.open(path, package="corda", verb="demo", settings=SETTINGS, **options)


@pytest.fixture(scope="module", autouse=True)
def few_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STARTS", {name: demo.STARTS[name] for name in STARTS})
        patch.setitem(demo.CALIBRATION_WINDOWS, "quick", 16)
        patch.setitem(demo.TASK_STEPS, "quick", 2)
        patch.setattr(demo, "MEASURED_WINDOWS", 4)
        patch.setattr("corda.commands._small_llama.MEASURED_WINDOWS", 4)
        patch.setattr(demo, "TASK_WINDOWS", 4)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "first"
    return folder, summary_of(SETTINGS, open_run(folder))


def test_quick_level_measures_every_arm_and_decides_nothing(first):
    folder, summary = first
    assert summary["level"] == "quick"
    assert summary["seeds"] == [0, 1]
    assert sorted(summary["arms"]) == sorted(ARMS)
    assert [claim["holds"] for claim in summary["claims"]] == [None] * 15
    assert {claim["kind"] for claim in summary["claims"]} == {"ratio", "count", "difference"}
    assert summary["arms"]["directions-facts"]["layers"] == [21, 21]
    assert summary["arms"]["tuned-lora"]["reached"] == [0, 0]
    assert summary["arms"]["tuned-lora"]["steps"] == [2, 2]
    for name in ("truncation", "fine-tuning"):
        assert (folder / f"figures/{name}.png").stat().st_size > 10_000
    assert (folder / "report.html").read_text().count("data:image/png") == 2


def test_another_seed_gives_other_facts_and_other_numbers(first):
    for arm in ("whole", "corda-text", "directions-text", "tuned-corda-kpm"):
        assert any(a != b for a, b in first[1]["arms"][arm].values())
    assert _small_llama.halves(16, 0) != _small_llama.halves(16, 1)


def test_an_interrupted_demo_resumes_to_the_numbers_of_an_unbroken_one_and_measures_no_seed_twice(
    first, tmp_path, capsys, monkeypatch
):
    words = [
        "demo",
        "--quick",
        "--steps",
        "2",
        "--facts",
        "16",
        "--seeds",
        "0,1",
        "--quiet",
        "--out",
        f"{tmp_path}/run",
    ]
    train = demo.train

    def until_the_second_seed(facts, seed, *arguments, **options):
        if seed == 1:
            raise KeyboardInterrupt
        return train(facts, seed, *arguments, **options)

    monkeypatch.setattr(demo, "train", until_the_second_seed)
    assert main(words) == 130
    assert [path.name for path in (tmp_path / "run/results").iterdir()] == ["seed-0.json"]
    assert main(words) == 2  # unfinished: neither --resume nor --overwrite
    trained = []
    monkeypatch.setattr(demo, "train", lambda facts, seed, *a, **k: trained.append(seed) or train(facts, seed, *a, **k))
    assert main([*words, "--resume"]) == 0
    assert trained == [1]
    resumed = json.loads((tmp_path / "run/summary.json").read_text())
    assert {**resumed, "seconds": 0} == {**first[1], "seconds": 0}


def demo_metrics(level):
    losses = demo.levels(demo.TARGET[level])
    return [f"{what} {loss:.2f}" for what in ("facts known at", "steps to") for loss in losses]


def test_claims_follow_the_measured_numbers(first, tmp_path, monkeypatch):
    results = json.loads((first[0] / "results/seed-0.json").read_text())
    values = results["values"]
    for kind in ("facts", "text"):
        for arm, increase in ((f"corda-{kind}", 0.3), ("svd", 1.0), (f"asvd-{kind}", 0.8)):
            values[arm][f"{kind} +loss 50"] = increase
        values[f"corda-{'text' if kind == 'facts' else 'facts'}"][f"{kind} +loss 50"] = 0.29
    values["whole"]["facts known"] = 95
    values["directions-text"]["layers, energy KPM / MiLoRA"] = 20
    measured = (("lora", 40, 100), ("corda-kpm", 33, 50), ("corda-ipm", 90, 81), ("ipm-balanced", 50, 79))
    for name, lost, steps in measured:
        values[f"tuned-{name}"]["facts lost"] = lost
        values[f"common-{name}"].update({"facts lost": 31 if name == "corda-kpm" else lost, "steps": steps})
    for name in STARTS:
        for kind in ("tuned", "common"):
            values[f"{kind}-{name}"] |= {"reached": 1, **dict.fromkeys(demo_metrics("full"), 50)}
    monkeypatch.setitem(demo.DROPS, "full", (50,))
    settings = DemoSettings(level="full")
    run = Run.open(tmp_path / "full", package="corda", verb="demo", settings=settings)
    for seed in range(5):
        run.write_json(f"results/seed-{seed}.json", results)
    summary = summary_of(settings, run)
    assert summary["seeds"] == [0, 1, 2, 3, 4]
    claims = {claim["id"]: claim["holds"] for claim in summary["claims"]}
    true = ("learned", "svd_facts", "svd_text", "asvd_facts", "asvd_text", "gain_kpm", "energy_ipm", "target")
    true += ("kept_common", "steps_ipm_balanced")
    false = ("matched_facts", "matched_text", "energy_kpm", "kept_tuned", "steps_corda_ipm")
    assert claims == dict.fromkeys(true, True) | dict.fromkeys(false, False)


def test_the_default_level_fine_tunes_with_one_rate_and_decides_the_main_claims(first, tmp_path, monkeypatch):
    assert demo.fine_tuned("default") == {f"common-{name}": (name, demo.COMMON_RATE) for name in STARTS}
    results = json.loads((first[0] / "results/seed-0.json").read_text())
    values = {arm: metrics for arm, metrics in results["values"].items() if not arm.startswith("tuned")}
    for name in STARTS:
        values[f"common-{name}"]["facts lost"] = 30 if name == "corda-kpm" else 50
    monkeypatch.setitem(demo.DROPS, "default", (50,))
    settings = DemoSettings()
    run = Run.open(tmp_path / "default", package="corda", verb="demo", settings=settings)
    run.write_json("results/seed-0.json", {**results, "values": values})
    summary = summary_of(settings, run)
    claims = {claim["id"]: claim["holds"] for claim in summary["claims"] if claim["id"].startswith(("kept", "steps"))}
    assert claims == {"kept_common": True, "steps_corda_ipm": None, "steps_ipm_balanced": None}
    assert "tuned-lora" not in summary["arms"]


def test_the_saved_model_goes_on_with_the_command_line(first, tmp_path, capsys):
    folder, _ = first
    text = (folder / "text.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(text[:2000])["input_ids"]
    assert ids == _small_llama.encode(text[:2000]).tolist()
    assert tokenizer.decode(ids) == text[:2000]
    calibration = ["--calibration.pack", "128", "--calibration.windows", "4"]
    for source in (f"text:{folder}/text.txt", f"jsonl:{folder}/facts.jsonl"):
        out = tmp_path / source.partition(":")[0]
        words = ["stats", "--model", f"hf:{folder}/model", "--data", source, "--out", str(out), *calibration]
        assert main(words) == 0
        assert "21 layers" in capsys.readouterr().out


def test_calibration_and_measurement_share_neither_facts_nor_paragraphs():
    parts = _small_llama.halves(192, 3)
    assert len(set(parts["calibration"]) | set(parts["measured"])) == 192
    assert len(parts["calibration"]) == len(parts["measured"]) == 96
    for kind in ("text", "code"):
        paragraphs = [text.split("\n\n") for text in _small_llama.texts(kind).values()]
        assert not set(paragraphs[0]) & set(paragraphs[1])
        assert len(paragraphs[1]) > 100


def test_losses_count_the_names_only(llama):
    facts = ["U+0416 -> CYRILLIC CAPITAL LETTER ZHE", "U+03C0 -> GREEK SMALL LETTER PI"]
    vocabulary = len(_small_llama.tokenizer())

    class Oracle(torch.nn.Module):
        """Knows the next character with certainty, but for one of the second name; guesses code points and text."""

        def forward(self, input_ids, use_cache):
            scores = torch.zeros(*input_ids.shape, vocabulary)
            scores[:, 10:-1] = 40 * torch.nn.functional.one_hot(input_ids[:, 11:], vocabulary)
            if len(input_ids) == 2:
                scores[1, 15] = 0
            return type("Output", (), {"logits": scores})

    found = _small_llama.losses(Oracle(), facts)
    characters = sum(len(fact) - len("U+0416 -> ") + 1 for fact in facts)
    assert found["facts loss"] == pytest.approx(torch.tensor(float(vocabulary)).log().item() / characters, rel=1e-5)
    assert found["facts known"] == 50


def test_gain_is_the_norm_of_the_answer():
    A, X = torch.randn(4, 16, dtype=torch.float64), torch.randn(16, 50, dtype=torch.float64)
    expected = torch.linalg.norm(A @ X) / torch.linalg.norm(A) / torch.linalg.norm(X)
    assert demo.gain(A, X @ X.T) == pytest.approx(expected.item())


def test_price_is_what_stands_at_the_target_and_on_the_way_there():
    metrics = {"loss": [2.2, 1.8, 1.6], "facts known": [90.0, 70.0, 60.0], "facts loss": [0.1, 0.3, 0.4]}
    trajectory = Trajectory([0, 10, 20], metrics | {"text loss": [1.5, 1.6, 1.8]})
    found = demo.price(trajectory, 1.7)
    expected = {"reached": 1, "steps": 15, "facts known": 65, "facts loss": 0.35, "text loss": 1.7, "facts lost": 25}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["steps to 2.00"] == pytest.approx(5)
    assert found["facts known at 2.00"] == pytest.approx(80)
    unreached = demo.price(trajectory, 1.5)
    assert (unreached["reached"], unreached["steps"], unreached["facts known at 1.50"]) == (0, 20, 60)


def test_fact_windows_begin_with_a_whole_fact():
    facts = _small_llama.halves(16, 0)["measured"]
    windows = _small_llama.fact_windows(facts, 20, torch.Generator().manual_seed(0))
    assert windows.shape == (20, _small_llama.LENGTH)
    for row in windows:
        assert any(_small_llama.tokenizer().decode(row).startswith(f"\n{fact}\n") for fact in facts)


def test_impossible_settings_are_refused():
    for settings, message in (
        ({"facts": 3}, "facts: expected 4 or more, got 3"),
        ({"rank": 0}, "rank: expected 1 to 64, got 0"),
        ({"rank": 65}, "rank: expected 1 to 64, got 65"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"seeds": []}, "seeds: expected at least one"),
    ):
        with pytest.raises(UserError, match=message):
            DemoSettings(**settings)


def test_the_world_of_a_real_model_measures_every_arm(shared_folder, tmp_path, monkeypatch, capsys):
    """With a tiny model in place of SmolLM2, which is installed as a package of its own."""
    from corda.commands import _pretrained
    from corda.commands._models import load_model, load_tokenizer

    tiny = f"hf:{shared_folder}"
    monkeypatch.setattr(_pretrained, "load", lambda: (load_model(tiny, "cpu"), load_tokenizer(tiny)))
    monkeypatch.setattr(_pretrained, "LENGTH", 32)
    monkeypatch.setitem(_pretrained.MEASURED, "quick", 3)
    monkeypatch.setitem(_pretrained.DROPS, "quick", (25, 40))
    settings = DemoSettings(level="quick", world="smollm2")
    with Run.open(tmp_path / "demo", package="corda", verb="demo", settings=settings) as run:
        assert demo.run(settings, Invocation(run, quiet=True)) == 0
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    arms = {"whole", "svd"} | {f"{method}-{kind}" for method in ("asvd", "half", "corda") for kind in ("text", "code")}
    assert set(summary["arms"]) == arms
    assert {claim["id"] for claim in summary["claims"]} == {
        f"{a}_{k}" for a in ("svd", "asvd", "mismatch") for k in ("text", "code")
    }
    assert (tmp_path / "demo/figures/truncation.png").exists()
    shown = capsys.readouterr().out
    assert "documentation, 40 %" in shown
    whole = np.mean([summary["arms"]["whole"][f"code loss {i}"][0] for i in range(3)])
    assert f"{np.exp(whole):.4g}" in next(line for line in shown.splitlines() if "none" in line)


def test_the_world_of_a_real_model_measures_nothing_twice(shared_folder, tmp_path, monkeypatch):
    from corda.commands import _pretrained
    from corda.commands._models import load_model, load_tokenizer

    tiny = f"hf:{shared_folder}"
    monkeypatch.setattr(_pretrained, "load", lambda: (load_model(tiny, "cpu"), load_tokenizer(tiny)))
    monkeypatch.setattr(_pretrained, "LENGTH", 32)
    measured, cut = [], _pretrained.World.cut

    def until_the_third(world, method, kind, seed):
        measured.append((method, kind))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return cut(world, method, kind, seed)

    monkeypatch.setattr(_pretrained.World, "cut", until_the_third)
    words = ["demo", "--world", "smollm2", "--quick", "--quiet", "--out", str(tmp_path / "run")]
    assert main(words) == 130
    assert main([*words, "--resume"]) == 0
    assert len(measured) == 3 + 5
    assert sorted(set(measured)) == sorted(measured[:2] + measured[3:])


def test_a_real_model_takes_no_steps():
    with pytest.raises(UserError, match="steps: expected none, since world smollm2 trains nothing, got 5"):
        DemoSettings(world="smollm2", steps=5)
