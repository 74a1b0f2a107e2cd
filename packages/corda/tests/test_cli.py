import json
import os
import resource
import shutil

import pytest
import torch
from corda import ContextStats, build_factors, load_anchor
from corda.cli import main
from corda.plus import select_context
from corda.targets import resolve_targets, with_ranks
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenfold.testing import assert_user_error

CALIBRATION = ["--calibration.pack", "32", "--calibration.windows", "8"]
IDS = torch.arange(20)[None]


def call(*words):
    return main([str(word) for word in words])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model, folder):
    """Three steps of gradient descent on an adapter, and what the model then computes."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def runs(shared_folder, text, tmp_path_factory):
    """Statistics, whole and in parts, and an initialization of each kind, trained: to be read only."""
    root = tmp_path_factory.mktemp("runs")
    data = ["--model", f"hf:{shared_folder}", "--data", text, *CALIBRATION]
    assert call("stats", *data, "--out", root / "stats") == 0
    assert call("stats", *data, "--candidates", 2, "--out", root / "parts") == 0
    start = ["init", "--model", f"hf:{shared_folder}", "--stats", root / "stats", "--r", 4]
    assert call(*start, "--out", root / "residual") == 0
    assert call(*start, "--attach", "anchor", "--out", root / "anchor") == 0
    adapted = PeftModel.from_pretrained(
        load(root / "residual/residual"), root / "residual/corda_init", is_trainable=True
    )
    anchored = load_anchor(load(shared_folder), root / "anchor/corda_init", is_trainable=True)
    for name, model in (("residual", adapted), ("anchor", anchored)):
        torch.save(trained(model, root / f"{name}-trained"), root / f"{name}.logits")
    return root


def test_stats_then_init_then_plain_peft(runs, shared_folder, tmp_path, capsys):
    init = tmp_path / "init"
    file = runs / "stats/context.safetensors"
    assert (
        call("init", "--model", f"hf:{shared_folder}", "--stats", file, "--r", 4, "--init.mode", "ipm", "--out", init)
        == 0
    )
    out = capsys.readouterr().out
    assert "mode ipm" in out
    assert f"train {init / 'residual'} with the adapter {init / 'corda_init'}" in out
    adapted = PeftModel.from_pretrained(load(init / "residual"), init / "corda_init", is_trainable=True)
    torch.testing.assert_close(logits(adapted), logits(load(shared_folder)), rtol=1e-4, atol=1e-5)
    assert json.loads((init / "corda_init/adapter_config.json").read_text())["init_lora_weights"] is True


def test_init_from_text_equals_init_from_its_statistics_and_is_deterministic(shared_folder, text, tmp_path):
    common = ["init", "--model", f"hf:{shared_folder}", "--residual", "false", "--targets", "k_proj,down_proj"]
    for name in "ab":
        assert call(*common, "--data", text, "--out", tmp_path / name, *CALIBRATION) == 0
    assert call(*common, "--stats", tmp_path / "a", "--out", tmp_path / "c") == 0
    weights = [(tmp_path / name / "corda_init/adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]
    assert not (tmp_path / "a/residual").exists()


def test_a_start_without_text_or_with_rslora_keeps_the_function(shared_folder, tmp_path):
    options = ["--init.power", 0, "--rslora", "true", "--alpha", 3, "--r", 4, "--targets", "q_proj,down_proj"]
    assert call("init", "--model", f"hf:{shared_folder}", *options, "--out", tmp_path) == 0
    adapted = PeftModel.from_pretrained(load(tmp_path / "residual"), tmp_path / "corda_init")
    assert adapted.base_model.model.model.layers[0].mlp.down_proj.scaling["default"] == 1.5
    torch.testing.assert_close(logits(adapted), logits(load(shared_folder)), rtol=1e-4, atol=1e-5)


def test_parts_and_budget_give_the_ranks_of_allocate(runs, shared_folder, text, tmp_path, capsys):
    """CorDA++ in one command and in three: the same ranks, adapter and report."""
    plus = ["--allocation", "corda++", "--budget", "uniform:4", "--residual", "false"]
    parts = ["--data", text, *CALIBRATION, "--candidates", 2]
    assert call("init", "--model", f"hf:{shared_folder}", *parts, *plus, "--out", tmp_path / "one") == 0
    assert "CorDA++, experimental" in capsys.readouterr().out
    assert (
        call("allocate", "--model", f"hf:{shared_folder}", "--stats", runs / "parts", "--r", 4, "--out", tmp_path / "a")
        == 0
    )
    given = ["--stats", runs / "parts", "--ranks", tmp_path / "a", "--residual", "false"]
    assert call("init", "--model", f"hf:{shared_folder}", *given, "--r", 4, "--out", tmp_path / "three") == 0
    one, three = (load_file(tmp_path / name / "corda_init/adapter_model.safetensors") for name in ("one", "three"))
    ranks = json.loads((tmp_path / "a/ranks.json").read_text())
    assert {len(t) for key, t in one.items() if "lora_A" in key} == set(ranks["ranks"].values()) != {4}
    assert ranks["budget"] < ranks["parameters"] == sum(t.numel() for t in one.values())
    for key, tensor in one.items():  # alpha is that of r = 16 in the one, of r = 4 in the other: s = 1 in both
        torch.testing.assert_close(three[key], tensor, rtol=1e-5, atol=1e-7)
    model, config = load(shared_folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config.rank_pattern, config.alpha_pattern = ranks["rank_pattern"], ranks["alpha_pattern"]
    targets = resolve_targets(model, config)
    assert {name: target.rank for name, target in targets.items()} == ranks["ranks"]
    assert {target.scaling for target in targets.values()} == {1.0}
    parts = [ContextStats.load(runs / f"parts/context-{i}.safetensors") for i in (1, 2)]
    plain = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    selected = select_context(model, plain, parts)
    factors = build_factors(model, selected.stats, with_ranks(model, plain, ranks["ranks"]))
    for name, found in factors.factors.items():
        torch.testing.assert_close(three[f"base_model.model.{name}.lora_A.weight"], found.A, rtol=1e-5, atol=1e-7)
    report = json.loads((tmp_path / "one/corda_report.json").read_text())
    assert report["selection"]["indices"] == selected.selection.indices
    assert set(selected.selection.indices.values()) != {0}
    assert report["allocation"]["ranks"] == ranks["ranks"]
    assert len(next(iter(report["selection"]["scores"].values()))) == 3


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_other_allocations(runs, shared_folder, tmp_path, allocation):
    words = ["--stats", runs / "stats", "--allocation", allocation, "--budget", 1500, "--out", tmp_path]
    assert call("allocate", "--model", f"hf:{shared_folder}", *words) == 0
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert abs(found["parameters"] - 1500) < 500
    assert (len(set(found["ranks"].values())) == 1) == (allocation == "uniform")


@pytest.mark.parametrize("kind", ["residual", "anchor"])
def test_an_initialization_is_verified(runs, shared_folder, text, tmp_path, capsys, kind):
    data = ["--model", f"hf:{shared_folder}", "--data", text, *CALIBRATION]
    assert call("verify", *data, "--run", runs / kind, "--strict", "--out", tmp_path / "a") == 0
    assert "holds: the start is the base model" in capsys.readouterr().out
    found = json.loads((tmp_path / "a/verification.json").read_text())
    assert len(found["layers"]) == 7
    assert found["max_difference"] == 0 if kind == "anchor" else found["max_difference"] < 1e-5


def test_a_start_that_was_changed_does_not_hold(runs, shared_folder, text, tmp_path, capsys):
    changed = shutil.copytree(runs / "residual", tmp_path / "changed")
    tensors = load_file(changed / "corda_init/adapter_model.safetensors")
    key = next(key for key in tensors if "up_proj.lora_B" in key)
    tensors[key][0] += 1e-4
    save_file(tensors, changed / "corda_init/adapter_model.safetensors", {"format": "pt"})
    data = ["--model", f"hf:{shared_folder}", "--data", text, *CALIBRATION]
    assert call("verify", *data, "--run", changed, "--strict", "--out", tmp_path / "a") == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out
    found = json.loads((tmp_path / "a/verification.json").read_text())
    assert [name for name, layer in found["layers"].items() if not layer["holds"]] == [key[17:].partition(".lora")[0]]


@pytest.mark.parametrize("kind", ["residual", "anchor"])
def test_conversion_of_folders_gives_the_trained_model_on_the_untouched_base(
    runs, shared_folder, tmp_path, kind, capsys
):
    words = ["convert", "--adapter", runs / f"{kind}-trained", "--run", runs / kind]
    assert call(*words, "--model", f"hf:{shared_folder}", "--out", tmp_path / "a") == 0
    assert "discarded 0 of a change of norm" in capsys.readouterr().out
    converted = PeftModel.from_pretrained(load(shared_folder), tmp_path / "a/lora")
    expected = torch.load(runs / f"{kind}.logits")
    torch.testing.assert_close(logits(converted), expected, rtol=1e-5, atol=1e-5)
    assert (logits(load(shared_folder)) - expected).abs().max() > 1e-2
    config = json.loads((tmp_path / "a/lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(shared_folder)
    assert config["r"] == 8
    assert call(*words, "--rank", 3, "--out", tmp_path / "b") == 0
    report = json.loads((tmp_path / "b/conversion.json").read_text())
    whole, cut = (load_file(tmp_path / name / "lora/adapter_model.safetensors") for name in "ab")
    for name, layer in report["layers"].items():
        products = [
            t[f"base_model.model.{name}.lora_B.weight"] @ t[f"base_model.model.{name}.lora_A.weight"]
            for t in (whole, cut)
        ]
        assert layer["discarded"] == pytest.approx((products[0] - products[1]).norm().item(), rel=1e-3, abs=1e-7)


def test_conversion_of_an_untrained_adapter_is_exactly_zero(runs, tmp_path):
    for kind, more in (("residual", ["--run", runs / "residual"]), ("anchor", [])):
        assert call("convert", "--adapter", runs / kind / "corda_init", *more, "--out", tmp_path / kind) == 0
        assert json.loads((tmp_path / kind / "conversion.json").read_text())["norm"] == 0


def test_truncation(runs, shared_folder, tmp_path):
    words = ["truncate", "--model", f"hf:{shared_folder}", "--targets", "k_proj"]
    assert call(*words, "--stats", runs / "stats", "--drop", 0, "--out", tmp_path / "none") == 0
    assert call(*words, "--method", "svd", "--drop", 0.5, "--out", tmp_path / "half") == 0
    before, none, half = (
        load_file(folder / "model.safetensors")
        for folder in (shared_folder, tmp_path / "none/model", tmp_path / "half/model")
    )
    assert all(torch.equal(before[key], none[key]) for key in before)
    name = "model.layers.0.self_attn.k_proj"
    assert [key for key in before if not torch.equal(before[key], half[key])] == [f"{name}.weight"]
    layer = json.loads((tmp_path / "half/truncation.json").read_text())["layers"][name]
    assert (layer["shape"], layer["dropped"], layer["kept"]) == ([16, 32], 8, 8)
    assert torch.linalg.matrix_rank(half[f"{name}.weight"], rtol=1e-5) == 8
    assert len(AutoTokenizer.from_pretrained(tmp_path / "half/model")) == len(
        AutoTokenizer.from_pretrained(shared_folder)
    )


def test_truncation_reports_the_error_of_the_outputs(runs, shared_folder, tmp_path):
    stats = runs / "stats"
    assert (
        call("truncate", "--model", f"hf:{shared_folder}", "--stats", stats, "--drop", 0.5, "--out", tmp_path / "a")
        == 0
    )
    layers = json.loads((tmp_path / "a/truncation.json").read_text())["layers"]
    C = ContextStats.load(stats / "context.safetensors")
    before, after = load(shared_folder), load(tmp_path / "a/model")
    for name, layer in layers.items():
        values, vectors = torch.linalg.eigh(C.covariance(name))
        L = vectors * values.clamp_min(0).sqrt()
        W, V = (model.get_submodule(name).weight.detach().double() for model in (before, after))
        assert layer["output_error"] == pytest.approx(((W - V) @ L).norm().item() / (W @ L).norm().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("stats", ["{q_proj,k_proj,v_proj}", "256", "model.layers.0.mlp.down_proj", "7 layers"]),
        ("stats/context.safetensors", ["{gate_proj,up_proj}"]),
        ("parts", ["context-2.safetensors", "128"]),
        ("residual", ["model.layers.0.self_attn.q_proj", "32x32", "mode kpm, power 1", "attached as residual"]),
        ("residual/corda_report.json", ["inverse fp64"]),
        ("residual/corda_init", ["plain LoRA", "|B|"]),
        ("anchor/corda_init", ["anchored at A0 and B0"]),
        ("residual-trained", ["plain LoRA"]),
    ],
)
def test_inspect_shows_what_commands_wrote(runs, capsys, path, expected):
    assert call("inspect", "--run", runs / path) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in expected), out


def test_inspect_shows_cross_moments_which_serve_a_start(shared_folder, text, tmp_path, capsys):
    words = [
        "--model",
        f"hf:{shared_folder}",
        "--data",
        text,
        *CALIBRATION,
        "--accumulate",
        "cross",
        "--targets",
        "down_proj",
    ]
    assert call("stats", *words, "--out", tmp_path / "stats") == 0
    capsys.readouterr()
    assert call("inspect", "--run", tmp_path / "stats") == 0
    assert "W C  32x48" in capsys.readouterr().out
    stats = ["--model", f"hf:{shared_folder}", "--stats", tmp_path / "stats", "--targets", "down_proj"]
    assert call("init", *stats, "--residual", "false", "--out", tmp_path / "init") == 0
    words = ["truncate", *map(str, stats), "--drop", "0.5", "--out", str(tmp_path / "a")]
    assert_user_error(main, words, capsys, "cross moment, no covariance")


@pytest.mark.parametrize("options", [["--stream", "true"], ["--memory_budget", "20KB"]])
def test_a_streamed_start_is_that_of_saved_statistics(runs, shared_folder, text, tmp_path, options):
    words = ["--model", f"hf:{shared_folder}", "--data", text, *CALIBRATION, "--r", 4, "--init.accumulate", "cov"]
    assert call("init", *words, *options, "--residual", "false", "--out", tmp_path) == 0
    streamed, kept = (load_file(p / "corda_init/adapter_model.safetensors") for p in (tmp_path, runs / "residual"))
    for key, tensor in kept.items():
        torch.testing.assert_close(streamed[key], tensor, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "context.safetensors").exists()


def test_a_finished_run_is_kept_and_overwritten_when_asked(shared_folder, text, tmp_path, capsys):
    words = ["stats", "--model", f"hf:{shared_folder}", "--data", text, "--out", str(tmp_path / "a"), *CALIBRATION]
    words += ["--targets", "q_proj"]
    assert main(words) == 0
    assert_user_error(main, words, capsys, "finished run of 'corda stats'", "--overwrite")
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--overwrite"]) == 0


def test_data_of_tokens_need_no_tokenizer(shared_folder, tmp_path, capsys):
    shutil.copytree(shared_folder, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"input_ids": list(range(i, i + 40))}) for i in range(20)))
    words = ["init", "--model", f"hf:{tmp_path}/model", *CALIBRATION, "--targets", "q_proj", "--out"]
    assert main([*words, str(tmp_path / "a"), "--data", f"jsonl:{tmp_path / 'a.jsonl'}"]) == 0
    assert not list((tmp_path / "a/residual").glob("tokenizer*"))
    assert_user_error(main, [*words, str(tmp_path / "b"), "--data", "names"], capsys, "text needs a tokenizer")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--r", "17"], ["layer model.layers.0.self_attn.k_proj: rank 17", "1 to 16"]),
        (["--targets", "q_prj"], ["q_prj"]),
        (["--init.mode", "kmp"], ["--init.mode: expected one of kpm, ipm, got 'kmp': did you mean kpm?"]),
        (["--calibration.pack", "5000"], ["tokens are less than one window"]),
        (["--data", "jsonl:missing"], ["--data jsonl:missing: no such file or folder: missing"]),
        (["--stats", "missing"], ["give either --data or --stats"]),
        (["--model", "hf:no/such/folder"], ["--model hf:no/such/folder: cannot be loaded"]),
        (["--model", "no/such/folder"], ["--model no/such/folder: expected hf:PATH", "is hf:no/such/folder"]),
        (["--model", "timm:resnet18"], ["--model timm:resnet18: unknown kind 'timm', expected hf:PATH"]),
        (["--device", "cdua"], ["--device: expected one of auto, cpu, cuda, mps, got 'cdua': did you mean cuda?"]),
        (["--attach", "anker"], ["--attach: expected one of residual, anchor, got 'anker'"]),
        (["--candidates", "9"], ["--candidates: expected at most the 8 windows, got 9"]),
        (["--candidates", "1"], ["--candidates: expected 0 (none) or 2 or more, got 1"]),
        (["--budget", "lots"], ["--budget: expected a number of parameters or uniform:R, got 'lots'"]),
        (["--allocation", "corda++", "--budget", "1"], ["budget 1 is too small"]),
        (["--ranks", "missing"], ["missing: No such file"]),
        (["--ranks", "missing", "--budget", "1"], ["give either --ranks or an --allocation"]),
        (["--alpha", "0"], ["--alpha: expected more than 0, got 0"]),
        (["--init.damping", "0"], ["--init.damping: expected more than 0, got 0"]),
        (["--calibration.windows", "0"], ["--calibration.windows: expected 1 or more, got 0"]),
        (["--memory_budget", "6 gigs"], ["--memory_budget: "]),
        (["--stream", "true", "--candidates", "2"], ["keep no statistics to choose from"]),
        (["--init.skip_first", "32"], ["no token is left after masking"]),
    ],
)
def test_what_the_user_can_mend(shared_folder, text, tmp_path, capsys, words, expected):
    options = {
        "--model": f"hf:{shared_folder}",
        "--data": text,
        "--out": str(tmp_path / "a"),
        "--calibration.pack": "32",
    }
    options |= {"--calibration.windows": "8"} | dict(zip(words[::2], words[1::2], strict=True))
    assert_user_error(main, ["init", *(part for pair in options.items() for part in pair)], capsys, *expected)
    assert not (tmp_path / "a/corda_init").exists()


def test_another_base_model_is_refused_everywhere(runs, shared_folder, model_folder, text, tmp_path, capsys):
    model = load(model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(model_folder)
    for words, expected in [
        (["init", "--stats", str(runs / "stats")], f"--stats {runs / 'stats'}: collected on another model than"),
        (["allocate", "--stats", str(runs / "parts")], "collected on another model than"),
        (["truncate", "--stats", str(runs / "stats"), "--drop", "1"], "collected on another model than"),
        (["verify", "--run", str(runs / "residual"), "--data", text, *CALIBRATION], "is not the base model of"),
        (
            ["convert", "--adapter", str(runs / "residual-trained"), "--run", str(runs / "residual")],
            "is not the base",
        ),
    ]:
        assert_user_error(
            main, [*words, "--model", f"hf:{model_folder}", "--out", str(tmp_path / words[0])], capsys, expected
        )
    words = ["--adapter", runs / "residual-trained", "--run", runs / "residual"]
    assert call("convert", *words, "--model", f"hf:{runs}/residual/residual", "--out", tmp_path / "c") == 0
    config = json.loads((tmp_path / "c/lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(shared_folder)  # it was trained on that one's residual


def test_broken_or_foreign_files_are_refused(runs, tmp_path, shared_folder, capsys):
    stats = shutil.copy(runs / "stats/context.safetensors", tmp_path / "s.safetensors")
    os.truncate(stats, os.path.getsize(stats) - 100)
    words = ["init", "--model", f"hf:{shared_folder}", "--stats", str(stats), "--out", str(tmp_path / "a")]
    assert_user_error(main, words, capsys, "s.safetensors is not a whole safetensors file")
    (tmp_path / "b.json").write_text('{"ranks": {"a": "b"}}')
    words = ["init", "--model", f"hf:{shared_folder}", "--stats", str(runs / "stats"), "--out", str(tmp_path / "a")]
    ranks = [*words, "--overwrite", "--ranks", str(tmp_path / "b.json")]
    assert_user_error(main, ranks, capsys, "b.json, field ranks: expected a whole number for each layer")
    (tmp_path / "b.json").write_text('{"ranks": {"model.layers.0.self_attn.q_proj": 2}}')
    assert_user_error(
        main, ranks, capsys, "b.json: layer model.layers.0.self_attn.k_proj is in the targets but not in the ranks"
    )
    foreign = {
        "nowhere": "no such file",
        "b.json": "not a file of ours; its fields are ranks",
        ".": "none of corda_report.json",
        "s.safetensors": "not a whole safetensors file",
    }
    for name, expected in foreign.items():
        assert_user_error(main, ["inspect", "--run", str(tmp_path / name)], capsys, expected)
    convert = ["convert", "--out", str(tmp_path / "c"), "--overwrite", "--adapter"]
    trained = str(runs / "residual-trained")
    for words, expected in [
        ([str(tmp_path)], "no adapter_config.json in"),
        ([trained], "is not anchored: give what it started from"),
        (
            [str(runs / "anchor-trained"), "--run", str(runs / "anchor"), "--rank", "0"],
            "--rank: expected 1 or more, got 0",
        ),
    ]:
        assert_user_error(main, [*convert, *words], capsys, expected)
    assert_user_error(
        main,
        ["verify", "--model", f"hf:{shared_folder}", "--run", str(tmp_path), "--out", str(tmp_path / "v")],
        capsys,
        "expected the folder of a finished `corda init`, found no run.json",
    )


@pytest.mark.parametrize("kind", ["stats", "residual", "anchor"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(shared_folder, text, tmp_path, capsys, kind):
    words = ["--model", f"hf:{shared_folder}", "--targets", "down_proj", "--out", str(tmp_path / "a")]
    start = ["init", "--init.power", "0", "--attach"]
    words = ["stats", "--data", text, *CALIBRATION, *words] if kind == "stats" else [*start, kind, *words]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        assert_user_error(main, words, capsys, "cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "a").exists()
    assert main(words) == 0
