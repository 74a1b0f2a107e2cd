"""The command `corda`: calibrate, initialize, allocate, verify, convert, truncate, inspect, and the demonstration."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda.config import (
    AdapterSettings,
    AllocateSettings,
    Calibration,
    CompareSettings,
    ConvertSettings,
    CordaInit,
    DemoSettings,
    InitSettings,
    InspectSettings,
    StatsSettings,
    TruncateSettings,
    VerifySettings,
)
from tenfold import UserError
from tenfold.cli import App, Invocation, Verb, show_claims, table, track

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from corda.context import ContextStats
    from corda.data import Batches
    from corda.factors import FactorSet


def _stats(settings: StatsSettings, invocation: Invocation) -> None:
    from corda.data import load_model
    from corda.inspection import CANDIDATES, STATS, stats_text

    parts, _ = _read(settings.data, settings.calibration, settings.model, max(1, settings.candidates))
    model = load_model(settings.model, settings.device)
    init = CordaInit(scale=settings.scale, skip_first=settings.skip_first, accumulate=settings.accumulate)
    lora_config = _lora_config(AdapterSettings(model=settings.model, targets=settings.targets))
    for number, part in enumerate(parts, 1):
        stats = _collect(model, part, lora_config, init, _calibrating(number, parts), invocation)
        name = CANDIDATES.replace("*", str(number)) if settings.candidates else STATS
        stats.save(invocation.folder.own(name))
        more = f"windows dealt out to {len(parts)} files, {CANDIDATES}\n" if settings.candidates else ""
        sys.stdout.write(stats_text(stats) + more if number == 1 else "")


def _read(
    data: str, calibration: Calibration, model: str, parts: int = 1
) -> "tuple[list[Batches], PreTrainedTokenizerBase | None]":
    """The text as batches, in parts, before any model is loaded: what is wrong with it shows at once."""
    from corda.data import calibration_batches, load_tokenizer

    tokenizer = load_tokenizer(model)
    return calibration_batches(data, calibration, tokenizer, parts), tokenizer


def _collect(
    model: "PreTrainedModel",
    batches: "Batches",
    lora_config: "LoraConfig",
    init: CordaInit,
    what: str,
    invocation: Invocation,
) -> "ContextStats":
    from corda.context import collect_context
    from corda.data import on_model
    from corda.targets import resolve_targets

    tracked = track(on_model(batches, model), what, len(batches), quiet=invocation.quiet)
    return collect_context(model, tracked, list(resolve_targets(model, lora_config)), init)


def _calibrating(number: int, parts: Sequence[Any]) -> str:
    return f"calibrating, part {number} of {len(parts)}" if len(parts) > 1 else "calibrating"


def _lora_config(settings: AdapterSettings) -> "LoraConfig":
    from peft import LoraConfig

    targets: Any = settings.targets[0] if settings.targets == ["all-linear"] else settings.targets
    alpha: Any = settings.alpha or settings.r
    return LoraConfig(
        r=settings.r, lora_alpha=alpha, use_rslora=settings.rslora, target_modules=targets, task_type="CAUSAL_LM"
    )


def _init(settings: InitSettings, invocation: Invocation) -> None:
    from corda.context import fingerprint
    from corda.data import load_model, load_tokenizer
    from corda.factors import build_factors, output_energies
    from corda.inspection import REPORT, STATS, init_text

    run = invocation.folder
    candidates = _load_stats(settings.stats)
    parts: list[Batches] = []
    tokenizer = None
    if settings.data is not None and settings.init.power:
        parts, tokenizer = _read(settings.data, settings.calibration, settings.model, max(1, settings.candidates))
    else:
        tokenizer = load_tokenizer(settings.model)
    scale: Any = candidates[0].scale if candidates else settings.init.scale
    settings = dataclasses.replace(settings, init=dataclasses.replace(settings.init, scale=scale))
    model = load_model(settings.model, settings.device)
    report: dict[str, Any] = {"model": settings.model, "attach": settings.attach, "fingerprint": fingerprint(model)}
    _check_stats(settings.stats, candidates, settings.model, report["fingerprint"])
    lora_config = _with_ranks(model, _lora_config(settings), settings.ranks)
    energies = None
    if settings.stream or settings.memory_budget is not None:
        factors = _streamed(model, parts[0], lora_config, settings, invocation)
    else:
        for number, part in enumerate(parts, 1):
            what = _calibrating(number, parts)
            candidates.append(_collect(model, part, lora_config, settings.init, what, invocation))
        stats, lora_config = _plus(model, candidates, lora_config, settings, report)
        if parts and stats is not None:
            stats.save(run.own(STATS))
        show = functools.partial(track, description="solving", quiet=invocation.quiet)
        factors = build_factors(model, stats, lora_config, settings.init, progress=show)
        energies = output_energies(model, stats, factors) if stats else None
    report = factors.report(energies) | report
    _attach(model, tokenizer, factors, lora_config, settings, report, invocation)
    run.write_json(REPORT, report)
    sys.stdout.write(init_text(report) + "\n" + _what_next(settings, run.path))


def _load_stats(paths: Sequence[str] | None) -> "list[ContextStats]":
    from corda.context import ContextStats
    from corda.inspection import stats_files

    return [ContextStats.load(file) for path in paths or () for file in stats_files(Path(path))]


def _check_stats(
    paths: Sequence[str] | None, candidates: "Sequence[ContextStats]", model: str, fingerprint: str
) -> None:
    if any(stats.fingerprint != fingerprint for stats in candidates):
        raise UserError(
            f"--stats {','.join(paths or ())}: collected on another model than {model} (names, shapes or weights differ)"
        )


def _with_ranks(model: "PreTrainedModel", lora_config: "LoraConfig", path: str | None) -> "LoraConfig":
    """The configuration with the ranks of a file, checked against the layers' sizes before any text passes."""
    from corda.inspection import RANKS, read_json
    from corda.plus import with_ranks
    from corda.targets import resolve_targets

    if path is None:
        ranks = {name: target.rank for name, target in resolve_targets(model, lora_config).items()}
        with_ranks(model, lora_config, ranks)
        return lora_config
    file = Path(path) / RANKS if Path(path).is_dir() else Path(path)
    ranks = read_json(file).get("ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise UserError(f"{file}, field ranks: expected a whole number for each layer")
    try:
        return with_ranks(model, lora_config, ranks)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _streamed(
    model: "PreTrainedModel",
    batches: "Batches",
    lora_config: "LoraConfig",
    settings: InitSettings,
    invocation: Invocation,
) -> "FactorSet":
    from corda.data import on_model
    from corda.streaming import stream_factors

    data = list(on_model(batches, model))
    show = functools.partial(track, description="block by block", quiet=invocation.quiet)
    budget = settings.memory_budget
    return stream_factors(model, data, lora_config, settings.init, memory_budget=budget, energies=True, progress=show)


def _plus(
    model: "PreTrainedModel",
    candidates: "Sequence[ContextStats]",
    lora_config: "LoraConfig",
    settings: InitSettings | AllocateSettings,
    report: dict[str, Any],
) -> "tuple[ContextStats | None, LoraConfig]":
    """CorDA++, as far as it is asked for: each layer's statistics and rank; what was decided goes into the report."""
    from corda import plus
    from corda.targets import resolve_targets, weight_of

    if not candidates:
        return None, lora_config
    init = settings.init
    stats = candidates[0]
    if len(candidates) > 1:
        found = plus.select_context(model, lora_config, candidates, init, per=settings.select_per)
        stats = found.stats
        report["selection"] = {"per": settings.select_per, **dataclasses.asdict(found.selection)}
    if settings.allocation == "uniform" and settings.budget is None:
        return stats, lora_config
    weights = {name: weight_of(model, name) for name in resolve_targets(model, lora_config)}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    uniform, _, number = (settings.budget or f"uniform:{settings.r}").rpartition(":")
    budget = plus.uniform_budget(shapes, int(number)) if uniform else int(number)
    if settings.allocation == "corda++":
        spectra = plus.layer_spectra(model, stats, lora_config, init)
        ranks = plus.allocate_ranks(spectra.spectra, spectra.compactness, shapes, budget, init.mode)
    elif settings.allocation == "energy":
        energies = {
            name: plus.component_energies(weight, stats.covariance(name), power=init.power, damping=init.damping)
            for name, weight in weights.items()
        }
        ranks = plus.allocate_by_energy(energies, shapes, budget, init.mode)
    else:
        ranks = plus.allocate_uniform(shapes, budget)
    parameters = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    decided = {"by": settings.allocation, "mode": init.mode, "budget": budget, "parameters": parameters}
    report["allocation"] = {**decided, "ranks": ranks, "shapes": shapes}
    return stats, plus.with_ranks(model, lora_config, ranks)


def _attach(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    factors: "FactorSet",
    lora_config: "LoraConfig",
    settings: InitSettings,
    report: dict[str, Any],
    invocation: Invocation,
) -> None:
    """Write the initial adapter and, where one is wanted, the residual model."""
    from corda.anchor import apply_anchor
    from corda.attach import ADAPTER, apply_corda, residual_state, save_initial
    from corda.context import fingerprint
    from corda.inspection import INITIAL, RESIDUAL

    run = invocation.folder
    if settings.attach == "anchor":
        wrapped = apply_anchor(model, factors, lora_config)
        wrapped.peft_config[ADAPTER].base_model_name_or_path = settings.model
        with run.replacing_folder(INITIAL) as folder:
            wrapped.save_pretrained(str(folder))
        return
    wrapped = apply_corda(model, factors, lora_config)
    report["residual_fingerprint"] = fingerprint(wrapped)
    wrapped.peft_config[ADAPTER].base_model_name_or_path = (
        str((run.path / RESIDUAL).resolve()) if settings.residual else settings.model
    )
    with run.replacing_folder(INITIAL) as folder:
        save_initial(wrapped, folder)
    if settings.residual:
        with run.replacing_folder(RESIDUAL) as folder:
            base: Any = wrapped.get_base_model()
            base.save_pretrained(folder, state_dict=residual_state(wrapped))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)


def _what_next(settings: InitSettings, out: Path) -> str:
    from corda.inspection import INITIAL, RESIDUAL

    adapter = out / INITIAL
    if settings.attach == "anchor":
        load = f"corda.load_anchor(model, '{adapter}', is_trainable=True)"
        return f"next: train {load}, save_pretrained(TRAINED), then corda convert --adapter TRAINED --out LORA\n"
    train = f"train {out / RESIDUAL} with the adapter {adapter}"
    if not settings.residual:
        train = f"train the adapter {adapter} on the base less s B A (the residual model, which was not written)"
    return f"next: {train}, then corda convert --adapter TRAINED --initial {out} --out LORA\n"


def _allocate(settings: AllocateSettings, invocation: Invocation) -> None:
    from corda.context import fingerprint
    from corda.data import load_model
    from corda.inspection import RANKS, ranks_text

    candidates = _load_stats(settings.stats)
    model = load_model(settings.model, settings.device)
    report: dict[str, Any] = {"model": settings.model, "fingerprint": fingerprint(model)}
    _check_stats(settings.stats, candidates, settings.model, report["fingerprint"])
    settings = dataclasses.replace(settings, budget=settings.budget or f"uniform:{settings.r}")
    _, lora_config = _plus(model, candidates, _lora_config(settings), settings, report)
    report |= {**report.pop("allocation"), "r": settings.r, "lora_alpha": lora_config.lora_alpha}
    report |= {"rank_pattern": lora_config.rank_pattern, "alpha_pattern": lora_config.alpha_pattern}
    invocation.folder.write_json(RANKS, report)
    sys.stdout.write(ranks_text(report))


def _verify(settings: VerifySettings, invocation: Invocation) -> int:
    from corda.context import fingerprint
    from corda.convert import verify_init
    from corda.data import load_model, on_model
    from corda.inspection import REPORT, VERIFICATION, read_json, verification_text

    initial = Path(settings.initial)
    recorded = read_json(initial / REPORT)
    (batches,), _ = _read(settings.data, settings.calibration, settings.model)
    base = load_model(settings.model, settings.device)
    _check_base(settings.model, fingerprint(base), recorded, initial)
    wrapped = _initialized(initial, recorded, settings)
    data = on_model(batches, base)
    reports = [
        verify_init(base, wrapped, batch) for batch in track(data, "verifying", len(batches), quiet=invocation.quiet)
    ]
    weights = [int(batch["attention_mask"].sum()) for batch in batches]
    report: dict[str, Any] = {
        "model": settings.model,
        "initial": settings.initial,
        "attach": recorded["attach"],
        "tokens": sum(weights),
        "max_difference": max(found.max_difference for found in reports),
        "mean_difference": sum(w * r.mean_difference for w, r in zip(weights, reports, strict=True)) / sum(weights),
        "kl": sum(w * r.kl for w, r in zip(weights, reports, strict=True)) / sum(weights),
        "layers": {name: {"units": layer.units, "holds": layer.holds} for name, layer in reports[0].layers.items()},
    }
    exact = recorded["attach"] != "anchor" or report["max_difference"] == 0
    report["holds"] = exact and not reports[0].wrong
    invocation.folder.write_json(VERIFICATION, report)
    sys.stdout.write(verification_text(report))
    return int(invocation.strict and not report["holds"])


def _check_base(model: str, found: str, recorded: dict[str, Any], initial: Path) -> None:
    expected = recorded.get("fingerprint")
    if found != expected:
        raise UserError(
            f"--model {model} is not the base model of {initial}, which was made for {recorded.get('model')}"
            f" (fingerprint {found[:12]}, expected {str(expected)[:12]})"
        )


def _initialized(initial: Path, recorded: dict[str, Any], settings: VerifySettings) -> Any:
    """The model that `corda init` made, as somebody who trains it loads it."""
    from peft import PeftModel

    from corda.anchor import load_anchor
    from corda.data import load_model
    from corda.inspection import INITIAL, RESIDUAL

    residual = initial / RESIDUAL
    if recorded.get("attach") == "anchor":
        return load_anchor(load_model(settings.model, settings.device), initial / INITIAL)
    if not residual.is_dir():
        raise UserError(f"{initial} holds no residual model to verify (--residual false)")
    return PeftModel.from_pretrained(load_model(str(residual), settings.device), str(initial / INITIAL))


def _convert(settings: ConvertSettings, invocation: Invocation) -> None:
    from corda.context import fingerprint
    from corda.convert import convert_adapter
    from corda.data import load_model
    from corda.factors import FactorSet
    from corda.inspection import CONVERSION, INITIAL, REPORT, conversion_text, read_json

    run = invocation.folder
    initial: Any = None
    recorded: dict[str, Any] = {}
    if settings.initial is not None:
        path = Path(settings.initial)
        folder = path / INITIAL if (path / INITIAL).is_dir() else path
        initial = FactorSet.load(path) if path.is_file() else folder
        if (folder.parent / REPORT).is_file():
            recorded = read_json(folder.parent / REPORT)
    base = settings.model or recorded.get("model")
    if settings.model is not None:
        found = fingerprint(load_model(settings.model, "cpu"))
        if isinstance(initial, FactorSet) and initial.fingerprint:
            recorded = {"fingerprint": initial.fingerprint, "model": settings.initial}
        if not recorded:
            raise UserError(f"--model {settings.model} cannot be checked: give --initial, the folder of `corda init`")
        if found == recorded.get("residual_fingerprint"):
            base = recorded["model"]
        else:
            _check_base(settings.model, found, recorded, path)
    with run.replacing_folder("lora") as folder:
        done = convert_adapter(settings.adapter, initial, folder, settings.rank, settings.tol, base)
    report = {"adapter": settings.adapter, "base": base, "norm": done.norm, "discarded": done.discarded}
    report["layers"] = {name: dataclasses.asdict(layer) for name, layer in done.layers.items()}
    run.write_json(CONVERSION, report)
    sys.stdout.write(conversion_text(report))
    sys.stdout.write(f"\nnext: PeftModel.from_pretrained(base, '{run.path / 'lora'}'), with the untouched base model\n")


def _truncate(settings: TruncateSettings, invocation: Invocation) -> None:
    from corda.context import fingerprint
    from corda.data import load_model, load_tokenizer
    from corda.inspection import STATS, TRUNCATION, truncation_text
    from corda.targets import resolve_targets, weight_of
    from corda.truncation import output_error, truncate_model

    run = invocation.folder
    paths = None if settings.stats is None else [settings.stats]
    candidates = _load_stats(paths)
    if len(candidates) > 1:
        raise UserError(f"--stats {settings.stats} holds {len(candidates)} parts; name one file")
    parts: list[Batches] = []
    if settings.data is not None:
        parts, tokenizer = _read(settings.data, settings.calibration, settings.model)
    else:
        tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, settings.device)
    report: dict[str, Any] = {"model": settings.model, "fingerprint": fingerprint(model)}
    _check_stats(paths, candidates, settings.model, report["fingerprint"])
    lora_config = _lora_config(AdapterSettings(model=settings.model, targets=settings.targets))
    for part in parts:
        candidates.append(_collect(model, part, lora_config, CordaInit(), "calibrating", invocation))
        candidates[0].save(run.own(STATS))
    stats = candidates[0] if candidates else None
    targets = list(resolve_targets(model, lora_config))
    before = {name: weight_of(model, name).clone() for name in targets}
    dropped = truncate_model(model, stats, settings.drop, targets=targets, method=settings.method, power=settings.power)
    layers: dict[str, dict[str, Any]] = {}
    for name, weight in before.items():
        error = output_error(weight, weight_of(model, name), stats.covariance(name)) if stats else None
        kept = min(weight.shape) - dropped[name]
        layers[name] = {"shape": list(weight.shape), "dropped": dropped[name], "kept": kept, "output_error": error}
    with run.replacing_folder("model") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    report |= {"method": settings.method, "power": settings.power, "drop": settings.drop, "layers": layers}
    run.write_json(TRUNCATION, report)
    sys.stdout.write(truncation_text(report))


def _compare(settings: CompareSettings, invocation: Invocation) -> int:
    from corda.comparison import Split, compare, table_rows
    from corda.data import calibration_batches, load_model, load_tokenizer, on_model

    tokenizer = load_tokenizer(settings.model)
    texts = [(settings.keep, settings.keep_text), (settings.learn, settings.learn_text)]
    parts = [calibration_batches(source, how, tokenizer, 4, disjoint=True) for source, how in texts]
    model = load_model(settings.model, settings.device)
    keep, learn = (
        Split(*(list(on_model(batches, model)) for batches in (a + b, validate, measure)))
        for a, b, validate, measure in parts
    )
    lora_config = _lora_config(settings)
    _with_ranks(model, lora_config, None)
    summary = compare(model, keep, learn, lora_config, settings, invocation.folder, quiet=invocation.quiet)
    sys.stdout.write(table(*table_rows(summary)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def _inspect(settings: InspectSettings, invocation: Invocation) -> None:
    from corda.inspection import describe

    sys.stdout.write(describe(Path(settings.path)))


def _demo(settings: DemoSettings, invocation: Invocation) -> int:
    from corda import demo

    sys.stdout.write(f"data: {demo.DATA}\n")
    sys.stdout.flush()
    return show_claims(demo.run(settings, invocation.folder, quiet=invocation.quiet), strict=invocation.strict)


app = App(
    "corda",
    "corda",
    "Context-oriented LoRA initialization: start an adapter from the weights and a few calibration samples.",
    (
        Verb("stats", StatsSettings, _stats, "Run calibration text through a model and save what its layers see."),
        Verb("init", InitSettings, _init, "Make the initial adapter and the residual model that it belongs to."),
        Verb("allocate", AllocateSettings, _allocate, "Give each layer its rank under one budget (experimental)."),
        Verb("verify", VerifySettings, _verify, "Check that an initialization starts at the base model.", claims=True),
        Verb("convert", ConvertSettings, _convert, "Turn a trained adapter into a plain LoRA of the untouched base."),
        Verb("truncate", TruncateSettings, _truncate, "Drop components of every layer and write the smaller model."),
        Verb("compare", CompareSettings, _compare, "Fine-tune from several starts on your texts.", claims=True),
        Verb(
            "inspect", InspectSettings, _inspect, "Show what a command wrote, or any LoRA, layer by layer.", out=False
        ),
        Verb("demo", DemoSettings, _demo, "Train a small Llama and show what the method does to it.", claims=True),
    ),
)
main = app.main
