"""The command `corda`: calibrate, initialise, look at both, and the demonstration."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda.config import DemoSettings, InitSettings, InspectSettings, StatsSettings
from tenfold import UserError
from tenfold.cli import App, Invocation, Verb, show_claims, table, track

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from corda.context import ContextStats

STATS = "context.safetensors"
REPORT = "corda_report.json"


def _stats(settings: StatsSettings, invocation: Invocation) -> None:
    from corda.config import CordaInit
    from corda.data import load_model

    run = invocation.folder
    init = CordaInit(scale=settings.scale, skip_first=settings.skip_first)
    model, tokenizer = load_model(settings.model, settings.device)
    stats = _collect(model, tokenizer, settings, init, invocation)
    stats.save(run.own(STATS))
    _print_stats(stats)


def _collect(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    settings: StatsSettings | InitSettings,
    init: Any,
    invocation: Invocation,
) -> "ContextStats":
    from corda.context import collect_context
    from corda.data import calibration_batches
    from corda.targets import resolve_targets

    assert settings.data is not None
    targets = list(resolve_targets(model, _lora_config(settings.targets, 1, 1)))
    batches = calibration_batches(settings.data, settings.calibration, tokenizer, model.device)
    return collect_context(model, track(batches, "calibrating", quiet=invocation.quiet), targets, init)


def _lora_config(targets: list[str], r: int, alpha: float) -> "LoraConfig":
    from peft import LoraConfig

    modules: Any = targets[0] if targets == ["all-linear"] else targets
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")  # type: ignore[arg-type]


def _init(settings: InitSettings, invocation: Invocation) -> None:
    from corda.attach import apply_corda, residual_state, save_initial
    from corda.context import ContextStats
    from corda.data import load_model
    from corda.factors import build_factors, output_energies

    run = invocation.folder
    model, tokenizer = load_model(settings.model, settings.device)
    lora_config = _lora_config(settings.targets, settings.r, settings.alpha or settings.r)
    stats = None
    if settings.stats is not None:
        stats = ContextStats.load(settings.stats)
        scale: Any = stats.scale
        settings = dataclasses.replace(settings, init=dataclasses.replace(settings.init, scale=scale))
    elif settings.data is not None:
        stats = _collect(model, tokenizer, settings, settings.init, invocation)
        stats.save(run.own(STATS))
    factors = build_factors(model, stats, lora_config, settings.init)
    report = factors.report(output_energies(model, stats, factors) if stats else None)
    wrapped = apply_corda(model, factors, lora_config)
    wrapped.peft_config["default"].base_model_name_or_path = (
        str((run.path / "residual").resolve()) if settings.residual else settings.model
    )
    with run.replacing_folder("corda_init") as folder:
        save_initial(wrapped, folder)
    if settings.residual:
        with run.replacing_folder("residual") as folder:
            base: Any = wrapped.get_base_model()
            base.save_pretrained(folder, state_dict=residual_state(wrapped))
            tokenizer.save_pretrained(folder)
    run.write_json(REPORT, report)
    _print_report(report)


def _inspect(settings: InspectSettings, invocation: Invocation) -> None:
    path = Path(settings.path)
    if path.is_dir():
        found = next((path / name for name in (REPORT, STATS) if (path / name).exists()), None)
        if found is None:
            raise UserError(f"{path}: neither {REPORT} nor {STATS} in it")
        path = found
    if path.suffix == ".json":
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            layers = report["layers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a report of corda init ({error})") from error
        assert layers is report["layers"]
        _print_report(report)
    else:
        from corda.context import ContextStats

        _print_stats(ContextStats.load(path))


def _print_stats(stats: "ContextStats") -> None:
    rows = []
    for group, moment in stats.moments.items():
        members = [name.rpartition(".")[2] for name, leader in stats.groups.items() if leader == group]
        parent = group.rpartition(".")[0]
        tokens = stats.tokens[group]
        rows.append([f"{parent}.{{{','.join(members)}}}", len(moment), tokens, f"{tokens / len(moment):.1f}"])
    sys.stdout.write(table(["layers of one input", "inputs", "tokens", "tokens / inputs"], rows) + "\n")
    sys.stdout.write(f"scale {stats.scale}, {len(stats.groups)} layers, model {stats.fingerprint[:12]}\n")


def _print_report(report: dict[str, Any]) -> None:
    headers = ["layer", "shape", "rank", "sigma first", "sigma last", "output energy", "solver", "seconds"]
    rows = [
        [
            name,
            "x".join(map(str, layer["shape"])),
            layer["rank"],
            f"{layer['sigma_first']:.3g}",
            f"{layer['sigma_last']:.3g}",
            "-" if layer["output_energy"] is None else f"{layer['output_energy']:.2e}",
            f"{layer['solver']} {layer['precision']}",
            f"{layer['seconds']:.3f}",
        ]
        for name, layer in report["layers"].items()
    ]
    init = report["init"]
    sys.stdout.write(table(headers, rows) + "\n")
    sys.stdout.write(
        f"mode {init['mode']}, power {init['power']:g}, balance {init['balance']}, scale {init['scale']}\n"
    )


def _demo(settings: DemoSettings, invocation: Invocation) -> int:
    from corda import demo

    sys.stdout.write(f"data: {demo.DATA}\n")
    sys.stdout.flush()
    return show_claims(demo.run(settings, invocation.folder, quiet=invocation.quiet), strict=invocation.strict)


app = App(
    "corda",
    "corda",
    "Context-oriented LoRA initialisation: start an adapter from the weights and a few calibration samples.",
    (
        Verb("stats", StatsSettings, _stats, "Run calibration text through a model and save what its layers see."),
        Verb("init", InitSettings, _init, "Make the initial adapter and the residual model that it belongs to."),
        Verb(
            "inspect",
            InspectSettings,
            _inspect,
            "Show the statistics or the initialisation, layer by layer.",
            out=False,
        ),
        Verb("demo", DemoSettings, _demo, "Train a small Llama and show what the method does to it.", claims=True),
    ),
)
main = app.main
