import json
from pathlib import Path

import corda
import pytest
import yaml
from corda.cli import main

RECIPES = sorted(path.stem for path in (Path(corda.__file__).parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    sentence = "the quick brown fox jumps over the lazy dog"
    record = {"question": sentence, "query": sentence, "response": "and then sleeps", "answer": ["no", "text"]}
    path.write_text("\n".join(json.dumps(record) for _ in range(20)))
    return f"jsonl:{path}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_taken_back_as_it_is_printed_and_runs_on_a_tiny_llama(name, shared_folder, data, tmp_path, capsys):
    required = ["--out", "out", "--data", "jsonl:file"]
    assert main(["init", "--config", f"recipe:{name}", *required, "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    assert main(["init", "--config", str(tmp_path / "c.yaml"), *required, "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    recipe = yaml.safe_load(printed)
    assert (recipe["r"], recipe["alpha"]) == ((16, 16) if name == "smollm2" else (128, 128))
    small = {"--model": f"hf:{shared_folder}", "--data": data, "--r": 4, "--alpha": 4, "--calibration.windows": 8}
    if recipe["calibration"]["pack"]:
        small["--calibration.pack"] = 32
    if recipe["budget"]:
        small["--budget"] = "uniform:4"
    options = [str(word) for pair in small.items() for word in pair]
    assert main(["init", "--config", f"recipe:{name}", *options, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/corda_report.json").read_text())
    assert len(report["layers"]) == 7
    assert report["init"]["mode"] == recipe["init"]["mode"] == ("ipm" if "ipm" in name else "kpm")
    assert ("selection" in report) == ("plus" in name)
    assert (tmp_path / "out/corda_init/adapter_model.safetensors").exists()
