"""The comparison of starts: rates by validation text, arms at equal loss, here and in other processes."""

import json

import pytest
import torch
from corda.cli import main
from corda.commands._finetune import Trajectory
from corda.commands.compare import at_equal_loss, mean_loss
from transformers import AutoModelForCausalLM

from tenfold.testing import assert_user_error

OPTIONS = {"arms": "lora,corda-kpm", "learning_rates": "1e-3,1e-2", "seeds": 0, "steps": 2, "r": 2, "targets": "q_proj"}
OPTIONS |= {f"{side}_text.{key}": size for side in ("keep", "learn") for key, size in (("pack", 16), ("windows", 8))}


@pytest.fixture(scope="module")
def call(shared_folder, text, tmp_path_factory):
    """The command on the shared model; later options win."""
    learn = tmp_path_factory.mktemp("learn") / "learn.txt"
    learn.write_text("0123456789 + - * / = ( ) " * 40)
    source = {"model": f"hf:{shared_folder}", "keep": text, "learn": f"text:{learn}", "device": "cpu"}

    def words(out, **changes):
        options = {**source, **OPTIONS, **changes, "out": out}
        return ["compare", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]

    return words


def test_a_comparison_measures_every_arm_and_decides_from_its_numbers(call, tmp_path, capsys):
    assert main(call(tmp_path / "a")) == 0
    out = capsys.readouterr().out
    assert "CorDA-KPM" in out
    assert "learning rates of 0.001, 0.01, chosen by validation text on seed 100" in out
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["level"] is None
    assert summary["arms"].keys() == {"lora", "corda-kpm"}
    kept = {arm: found["kept increase at equal loss"][0] for arm, found in summary["arms"].items()}
    (claim,) = summary["claims"]
    assert claim["id"] == "kpm_keeps_more"
    assert claim["estimate"] == pytest.approx(kept["lora"] - kept["corda-kpm"])
    assert claim["holds"] is None, "one seed decides nothing"
    assert main(["inspect", "--run", str(tmp_path / "a")]) == 0
    tuned = json.loads((tmp_path / "a/results/tuning-lora-seed-100.json").read_text())["values"]["tuning-lora"]
    assert tuned["rate"] == min((0.001, 0.01), key=lambda rate: tuned[f"loss at {rate:g}"])


def test_another_process_measures_the_same_numbers(call, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(call(tmp_path / "here", learning_rates="1e-2")) == 0
    finally:
        torch.set_num_threads(threads)
    assert main(call(tmp_path / "there", learning_rates="1e-2", executor="processes:1")) == 0
    here, there = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("here", "there"))
    assert here["arms"] == there["arms"]


def test_a_report_may_use_the_tuning_seed_and_says_so(call, tmp_path, capsys):
    assert main(call(tmp_path / "a", seeds="100", learning_rates="1e-2", arms="lora")) == 0
    assert "settings were tuned on (100 and up)" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in (tmp_path / "a/results").glob("*.json")} == {
        "tuning-lora-seed-100.json",
        "lora-seed-100.json",
    }


def test_a_measurement_is_the_same_whatever_was_measured_before_it_in_the_process(call, tmp_path):
    """A resumed comparison, or one of other processes, begins anywhere."""
    assert main(call(tmp_path / "a", arms="lora,corda-kpm")) == 0
    found = tmp_path / "a/results/lora-seed-0.npz"
    whole = found.read_bytes()
    for path in (found, found.with_suffix(".json"), tmp_path / "a/summary.json"):
        path.unlink()
    manifest = tmp_path / "a/run.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    assert main([*call(tmp_path / "a", arms="lora,corda-kpm"), "--resume"]) == 0
    assert found.read_bytes() == whole


def test_what_the_user_can_mend_leaves_no_folder(call, tmp_path, capsys):
    for option, value, expected in [
        ("arms", "lora,lora", "--arms: expected each once, got lora,lora"),
        ("arms", "lorra", "--arms: expected one of lora, pissa, milora, corda-kpm, corda-ipm, got 'lorra'"),
        ("learning_rates", "0", "--learning_rates: expected more than 0, got 0"),
        ("init.solver", "randomized", "--init.solver: expected one of auto, exact, lapack_svd, got 'randomized'"),
        ("init.mode", "kpm", "unknown option --init.mode"),
        ("keep", "jsonl:missing", "--keep jsonl:missing: no such file or folder"),
        ("keep_text.windows", "99", "separate windows of 16, and 99 are needed"),
        ("executor", "threads:2", "--executor threads:2: expected processes:N"),
        ("r", "17", "layer model.layers.0.self_attn.k_proj: rank 17, expected 1 to 16"),
    ]:
        words = call(tmp_path / "a", **{option: value, "targets": "q_proj,k_proj"})
        assert_user_error(main, words, capsys, expected)
        assert not (tmp_path / "a").exists()


def test_arms_are_compared_where_all_have_learned_the_same():
    fast = Trajectory([0, 10, 20], {"loss": [4.0, 2.0, 1.0], "kept": [1.0, 2.0, 3.0]})
    slow = Trajectory([0, 10, 20], {"loss": [4.0, 3.5, 3.0], "kept": [1.0, 1.0, 1.5]})
    found = at_equal_loss({"fast": fast, "slow": slow})
    assert found["fast"]["equal loss"] == found["slow"]["equal loss"] == 3.0
    assert (found["fast"]["steps to equal loss"], found["slow"]["steps to equal loss"]) == (5.0, 20.0)
    assert (found["fast"]["kept increase at equal loss"], found["slow"]["kept increase at equal loss"]) == (0.5, 0.5)


def test_the_mean_loss_counts_every_predicted_token_once(shared_folder):
    model = AutoModelForCausalLM.from_pretrained(shared_folder).eval()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    ids = torch.arange(12).view(3, 4) * mask
    batches = [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in ([0], [1], [2])]
    losses = []
    for row, kept in zip(ids, mask, strict=True):
        logs = model(input_ids=row[: kept.sum()][None]).logits[0].log_softmax(dim=-1)
        losses += [-logs[i, row[i + 1]].item() for i in range(int(kept.sum()) - 1)]
    assert len(losses) == 4
    assert mean_loss(model, batches) == pytest.approx(sum(losses) / 4, rel=1e-5)
