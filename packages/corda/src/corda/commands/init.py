"""`corda init`: the initial adapter, and the residual model that it belongs to."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from corda.adapters import ADAPTER
from corda.anchor import apply_anchor
from corda.attach import apply_corda, residual_state, save_initial
from corda.commands._calibrating import check_ranks, collect, lora_config_of
from corda.commands._files import INITIAL, RANKS, REPORT, RESIDUAL, STATS, check_stats, load_stats, read_json
from corda.commands._models import base_name, load_model, load_tokenizer
from corda.commands._plus import select_and_allocate
from corda.commands._reports import init_text
from corda.config import InitSettings
from corda.data import Batches, calibration_batches, on_model
from corda.factors import FactorSet, build_factors, output_energies
from corda.fingerprints import fingerprint
from corda.records import read_records
from corda.streaming import stream_factors
from corda.targets import with_ranks
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.runs import Run
from tenfold.terminal import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(settings: InitSettings, invocation: Invocation) -> None:
    """Calibrate or take statistics, solve, attach, save."""
    out, base = invocation.folder, base_name(settings.model)
    device = choose_device(settings.device)
    candidates = load_stats(settings.stats)
    pairs = settings.task == "seq2seq"
    records = None
    if settings.data and settings.init.power:
        records = read_records(settings.data, settings.calibration, pairs=pairs)
    ranks = _read_ranks(settings.ranks)
    tokenizer = load_tokenizer(settings.model)
    parts: list[Batches] = []
    if records is not None:
        count = max(1, settings.candidates)
        parts = calibration_batches(records, settings.calibration, tokenizer, count, seed=settings.seed)
    scale: Any = candidates[0].scale if candidates else settings.init.scale
    settings = dataclasses.replace(settings, init=dataclasses.replace(settings.init, scale=scale))
    model = load_model(settings.model, device, settings.task)
    report: dict[str, Any] = {"model": settings.model, "task": settings.task, "attach": settings.attach}
    report["fingerprint"] = fingerprint(model)
    check_stats(settings.stats, candidates, settings.model, report["fingerprint"])
    lora_config = _with_ranks(model, lora_config_of(settings), ranks, settings.ranks)
    energies = None
    if settings.stream or settings.memory_budget is not None:
        factors = _streamed(model, parts[0], lora_config, settings, invocation)
    else:
        candidates += [
            collect(model, parts, number, lora_config, settings.init, quiet=invocation.quiet)
            for number in range(len(parts))
        ]
        stats, lora_config = select_and_allocate(model, candidates, lora_config, settings, report)
        if parts and stats is not None:
            stats.save(out.own(STATS))
        show = functools.partial(track, description="solving", quiet=invocation.quiet)
        factors = build_factors(model, stats, lora_config, settings.init, progress=show)
        energies = output_energies(model, stats, factors) if stats else None
    report = factors.report(energies) | report
    _attach(model, base, tokenizer, factors, lora_config, settings, report, out)
    out.write_json(REPORT, report)
    sys.stdout.write(init_text(report) + "\n" + _what_next(settings, out.path))


def _read_ranks(path: str | None) -> dict[str, int] | None:
    """The ranks of a file of `corda allocate`."""
    if path is None:
        return None
    file = Path(path) / RANKS if Path(path).is_dir() else Path(path)
    ranks = read_json(file).get("ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int for rank in ranks.values()):
        raise UserError(f"{file}, field ranks: expected a whole number for each layer")
    return ranks


def _with_ranks(
    model: "PreTrainedModel", lora_config: LoraConfig, ranks: dict[str, int] | None, path: str | None
) -> LoraConfig:
    """The configuration with the ranks of a file, checked against the layers' sizes before any text passes."""
    if ranks is None:
        check_ranks(model, lora_config)
        return lora_config
    try:
        return with_ranks(model, lora_config, ranks)
    except UserError as error:
        raise UserError(f"--ranks {path}: {error}") from error


def _streamed(
    model: "PreTrainedModel", batches: Batches, lora_config: LoraConfig, settings: InitSettings, invocation: Invocation
) -> FactorSet:
    data = list(on_model(batches, model))
    show = functools.partial(track, description="block by block", quiet=invocation.quiet)
    budget = settings.memory_budget
    return stream_factors(model, data, lora_config, settings.init, memory_budget=budget, energies=True, progress=show)


def _attach(
    model: "PreTrainedModel",
    base: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    factors: FactorSet,
    lora_config: LoraConfig,
    settings: InitSettings,
    report: dict[str, Any],
    out: Run,
) -> None:
    """Write the initial adapter and, on request, the residual model."""
    if settings.attach == "anchor":
        wrapped = apply_anchor(model, factors, lora_config)
        wrapped.peft_config[ADAPTER].base_model_name_or_path = base
        with out.replacing_folder(INITIAL) as folder:
            wrapped.save_pretrained(str(folder))
        return
    wrapped = apply_corda(model, factors, lora_config)
    report["residual_fingerprint"] = fingerprint(wrapped)
    wrapped.peft_config[ADAPTER].base_model_name_or_path = (
        str((out.path / RESIDUAL).resolve()) if settings.residual else base
    )
    with out.replacing_folder(INITIAL) as folder:
        save_initial(wrapped, folder)
    if settings.residual:
        with out.replacing_folder(RESIDUAL) as folder:
            inner: Any = wrapped.get_base_model()
            inner.save_pretrained(folder, state_dict=residual_state(wrapped))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)


def _what_next(settings: InitSettings, out: Path) -> str:
    adapter = out / INITIAL
    if settings.attach == "anchor":
        load = f"corda.load_anchor(model, '{adapter}', is_trainable=True)"
        return f"next: train {load}, save_pretrained(TRAINED), then corda convert --adapter TRAINED --out LORA\n"
    train = f"train {out / RESIDUAL} with the adapter {adapter}"
    if not settings.residual:
        train = f"train the adapter {adapter} on the base less s B A (the residual model, which was not written)"
    return f"next: {train}, then corda convert --adapter TRAINED --run {out} --out LORA\n"
