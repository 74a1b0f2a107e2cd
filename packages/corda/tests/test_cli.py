import json

import pytest
import torch
from corda.cli import main
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tenfold.testing import assert_user_error

CALIBRATION = ["--calibration.pack", "32", "--calibration.windows", "8"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 20)
    return f"text:{tmp_path / 'text.txt'}"


def call(*words):
    return main([str(word) for word in words])


def test_stats_then_init_then_plain_peft(model_folder, text, tmp_path, capsys):
    stats, init = tmp_path / "stats", tmp_path / "init"
    assert call("stats", "--model", model_folder, "--data", text, "--out", stats, *CALIBRATION) == 0
    out = capsys.readouterr().out
    assert "{q_proj,k_proj,v_proj}" in out
    assert "256" in out
    file = stats / "context.safetensors"
    assert call("init", "--model", model_folder, "--stats", file, "--r", 4, "--init.mode", "ipm", "--out", init) == 0
    assert "mode ipm" in capsys.readouterr().out
    residual = AutoModelForCausalLM.from_pretrained(init / "residual")
    adapted = PeftModel.from_pretrained(residual, init / "corda_init", is_trainable=True)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(ids).logits, base.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert json.loads((init / "corda_init/adapter_config.json").read_text())["init_lora_weights"] is True
    for path in (file, stats, init, init / "corda_report.json"):
        assert call("inspect", "--path", path) == 0
        assert "model.layers.0" in capsys.readouterr().out


def test_init_from_text_equals_init_from_its_statistics_and_is_deterministic(model_folder, text, tmp_path):
    for name, source in (("a", ["--data", text]), ("b", ["--data", text])):
        out = tmp_path / name
        assert call("init", "--model", model_folder, *source, "--out", out, "--residual", "false", *CALIBRATION) == 0
    assert (
        call("init", "--model", model_folder, "--stats", tmp_path / "a/context.safetensors", "--out", tmp_path / "c")
        == 0
    )
    weights = [(tmp_path / name / "corda_init/adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]
    assert not (tmp_path / "a/residual").exists()


def test_power_zero_needs_no_text(model_folder, tmp_path):
    assert call("init", "--model", model_folder, "--init.power", "0", "--out", tmp_path / "a") == 0


def test_a_finished_run_is_kept_and_overwritten_when_asked(model_folder, text, tmp_path, capsys):
    words = ["stats", "--model", str(model_folder), "--data", text, "--out", str(tmp_path / "a"), *CALIBRATION]
    assert main(words) == 0
    assert_user_error(main, words, capsys, "finished run of 'corda stats'", "--overwrite")
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--r", "17"], ["layer model.layers.0.self_attn.k_proj: rank 17 of a 16 x 32 layer: expected 1 to 16"]),
        (["--targets", "q_prj"], ["q_prj"]),
        (["--init.mode", "kmp"], ["--init.mode", "'kpm', 'ipm'"]),
        (["--calibration.pack", "5000"], ["tokens are less than one window"]),
        (["--data", "jsonl:missing"], ["jsonl:missing: No such file"]),
        (["--stats", "missing"], ["give either --data or --stats"]),
        (["--model", "no/such/folder"], ["--model no/such/folder: cannot be loaded"]),
    ],
)
def test_what_the_user_can_mend(model_folder, text, tmp_path, capsys, words, expected):
    options = {"--model": str(model_folder), "--data": text, "--out": str(tmp_path / "a"), "--calibration.pack": "32"}
    options |= dict(zip(words[::2], words[1::2], strict=True))
    assert_user_error(main, ["init", *(part for pair in options.items() for part in pair)], capsys, *expected)
    assert not (tmp_path / "a/corda_init").exists()


def test_statistics_of_another_model_or_a_broken_file_are_refused(model_folder, text, tmp_path, capsys):
    stats = tmp_path / "stats/context.safetensors"
    assert call("stats", "--model", model_folder, "--data", text, "--out", tmp_path / "stats", *CALIBRATION) == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(model_folder)
    words = ["init", "--model", str(model_folder), "--stats", str(stats), "--out", str(tmp_path / "a")]
    assert_user_error(main, words, capsys, "collected on another model")
    stats.write_bytes(stats.read_bytes()[:-100])
    assert_user_error(main, [*words, "--resume"], capsys, "context.safetensors is not a whole safetensors file")
    assert_user_error(main, ["inspect", "--path", str(tmp_path / "nowhere")], capsys, "no such file")
    (tmp_path / "b.json").write_text("{}")
    assert_user_error(main, ["inspect", "--path", str(tmp_path / "b.json")], capsys, "not a report of corda init")
