"""Which start suits a model and its texts: adapters of every start are fine-tuned alike, and both texts are measured.

All arms get the same batches, steps, seeds and learning rates to choose from. Each arm's rate is the one with the least
loss on validation text of what is to be learned, on a seed of its own; the text that is reported chooses nothing.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda.collecting import collect_context
from corda.commands._calibrating import check_ranks, lora_config_of
from corda.commands._finetune import ARMS, FinetuneSettings, Trajectory, attach_arm, finetune
from corda.commands._models import load_model, load_tokenizer
from corda.config import CompareSettings
from corda.data import Batches, calibration_batches, on_model
from corda.records import read_records
from corda.targets import resolve_targets
from tenfold import NonFiniteError
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation, show_claims, table, track
from tenfold.runs import Run

if TYPE_CHECKING:
    from peft import LoraConfig

TUNING_SEED = 100


@dataclasses.dataclass(frozen=True)
class Split:
    """Batches of one text, on the model's device; no window is in two parts.

    Attributes:
        fit: calibrates; of what is to be learned, it also trains.
        validate: chooses learning rates.
        measure: is reported.
    """

    fit: Batches
    validate: Batches
    measure: Batches


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Compare; 1 with ``--strict`` if a claim does not hold."""
    texts = [(settings.keep, settings.keep_text), (settings.learn, settings.learn_text)]
    records = [read_records(source, how) for source, how in texts]
    tokenizer = load_tokenizer(settings.model)
    parts = [
        calibration_batches(found, how, tokenizer, 4, disjoint=True)
        for found, (_, how) in zip(records, texts, strict=True)
    ]
    model = load_model(settings.model, settings.device)
    keep, learn = (
        Split(*(list(on_model(batches, model)) for batches in (a + b, validate, measure)))
        for a, b, validate, measure in parts
    )
    lora_config = lora_config_of(settings)
    check_ranks(model, lora_config)
    summary = compare(model, keep, learn, lora_config, settings, invocation.folder, quiet=invocation.quiet)
    sys.stdout.write(table(*table_rows(summary)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def compare(
    model: nn.Module,
    keep: Split,
    learn: Split,
    lora_config: "LoraConfig",
    settings: CompareSettings,
    run: Run,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tune, fine-tune and measure every arm; returns the summary that it writes.

    Losses are nats per token. Arms are compared at the end, and at the lowest loss of what is to be learned that all arms of a
    seed have reached.

    Args:
        model: the base model; stays untouched, each arm gets a copy.
        keep: what is to be kept.
        learn: what is to be learned.
        lora_config: targets, rank and alpha of all arms.
        settings: arms, learning rates, seeds, steps.
        run: output folder; finished measurements are taken from there.
        quiet: no progress.

    Raises:
        NonFiniteError: an arm diverges with every learning rate.
    """
    targets = list(resolve_targets(model, lora_config))
    contexts = {ARMS[arm].context for arm in settings.arms}
    stats = {
        name: collect_context(
            model, track(split.fit, f"calibrating on what is to {name}", quiet=quiet), targets, settings.init
        )
        for name, split in (("keep", keep), ("learn", learn))
        if name in contexts
    }
    rows = {key: torch.cat([_padded(b[key], learn.fit) for b in learn.fit]) for key in ("input_ids", "attention_mask")}
    size = len(learn.fit[0]["input_ids"])

    def train(arm: str, rate: float, seed: int, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> Trajectory:
        order = torch.randperm(len(rows["input_ids"]), generator=torch.Generator().manual_seed(seed))
        batches = [_labeled({key: t[part] for key, t in rows.items()}) for part in order.split(size)]  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
        adapted = attach_arm(arm, copy.deepcopy(model), lora_config, **stats, init=settings.init)
        how = FinetuneSettings(learning_rate=rate, steps=settings.steps, eval_every=settings.eval_every)
        return finetune(adapted, batches, evaluate, how)

    def tune(arm: str, seed: int) -> dict[str, float]:
        found = {}
        trials = track(settings.learning_rates, f"{ARMS[arm].label}: tuning the learning rate", quiet=quiet)
        for rate in trials:
            try:
                trajectory = train(arm, rate, seed, lambda adapted: {"loss": mean_loss(adapted, learn.validate)})
                found[f"loss at {rate:g}"] = trajectory.metrics["loss"][-1]
            except NonFiniteError:
                continue
        if not found:
            raise NonFiniteError(f"arm {arm} diverges with every learning rate; lower --learning_rates")
        best = min(settings.learning_rates, key=lambda rate: found.get(f"loss at {rate:g}", float("inf")))
        return {"rate": best, **found}

    def measure(seed: int) -> dict[str, dict[str, float]]:
        def evaluate(adapted: nn.Module) -> dict[str, float]:
            return {"loss": mean_loss(adapted, learn.measure), "kept": mean_loss(adapted, keep.measure)}

        arms = track(settings.arms, f"seed {seed}: fine-tuning all arms", quiet=quiet)
        return at_equal_loss({arm: train(arm, rates[arm], seed, evaluate) for arm in arms})

    data = f"the user's: learned {settings.learn}, kept {settings.keep}"
    head: dict[str, Any] = {
        "package": "corda",
        "version": version("corda"),
        "command": "compare",
        "level": "full",
        "data": data,
    }
    tuning = Study(run, **head, seeds=[TUNING_SEED])
    tuning.over_arms({arm: lambda seed, arm=arm: tune(arm, seed) for arm in settings.arms})  # type: ignore[misc]
    rates: dict[str, float] = {arm: float(tuning.values((arm, "rate"))[0]) for arm in settings.arms}
    study = Study(run, **head, seeds=settings.seeds)
    study.over_seeds(measure)
    before = {name: mean_loss(model, split.measure) for name, split in (("learn", learn), ("keep", keep))}
    _decide(study, settings, rates, before)
    return study.finish()


def at_equal_loss(trajectories: Mapping[str, Trajectory]) -> dict[str, dict[str, float]]:
    """Of each arm, what it has learned and lost at its end, and where it first comes to the loss that all arms have reached."""
    target = max(min(trajectory.metrics["loss"]) for trajectory in trajectories.values())
    found = {}
    for arm, trajectory in trajectories.items():
        equal = trajectory.at(target)
        assert equal is not None, "some arm has not reached what all have reached"
        start, end = (trajectory.metrics["kept"][i] for i in (0, -1))
        found[arm] = {
            "learned loss": trajectory.metrics["loss"][-1],
            "kept increase": end - start,
            "equal loss": target,
            "steps to equal loss": equal["step"],
            "kept increase at equal loss": equal["kept"] - start,
        }
    return found


def _decide(study: Study, settings: CompareSettings, rates: Mapping[str, float], before: Mapping[str, float]) -> None:
    """The two promises of the method, on the user's own data; where all began, and how the rates were chosen."""
    arms = set(settings.arms)
    if {"lora", "corda-kpm"} <= arms:
        study.difference(
            "kpm_keeps_more",
            "what is to be kept suffers less under CorDA-KPM than under LoRA, where both have learned the same",
            ("lora", "kept increase at equal loss"),
            ("corda-kpm", "kept increase at equal loss"),
            required=">= 0",
            main=True,
        )
    if {"lora", "corda-ipm"} <= arms:
        study.ratio(
            "ipm_learns_faster",
            "steps to the same loss, CorDA-IPM / LoRA",
            ("corda-ipm", "steps to equal loss"),
            ("lora", "steps to equal loss"),
            required="<= 1",
        )
    study.note(
        f"loss before any training: {before['learn']:.4g} of what is to be learned, {before['keep']:.4g} of what is kept"
    )
    chosen = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    tried = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    study.note(f"learning rates of {tried}, chosen by validation text on seed {TUNING_SEED}: {chosen}")
    edge = [arm for arm, rate in rates.items() if rate in (min(settings.learning_rates), max(settings.learning_rates))]
    if edge and len(settings.learning_rates) > 1:
        study.note(f"at the edge of what was tried, so a wider range may do better: {', '.join(edge)}")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean over tokens of the loss of predicting the next one (nats).

    Raises:
        NonFiniteError: NaN or infinity.
    """
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for batch in batches:
        labeled = _labeled(batch)
        predicted = int((labeled["labels"][:, 1:] != -100).sum())
        if predicted:  # a mean over none would be NaN
            output: Any = model(**labeled)
            total += output.loss.double().cpu() * predicted
            count += predicted
    if not torch.isfinite(total):
        raise NonFiniteError("the loss of held-out text is NaN or infinite")
    return float(total / max(1, count))


def _labeled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _padded(tensor: Tensor, batches: Batches) -> Tensor:
    """Rows of one batch as long as the longest of all; the mask of what is added is 0."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    return nn.functional.pad(tensor, (0, longest - tensor.shape[1]))


def table_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table of the arms: mean over seeds and its 95 % interval."""
    metrics = list(next(iter(summary["arms"].values())))
    rows = [
        [ARMS[arm].label, *(interval(*mean_ci95(values[metric])) for metric in metrics)]
        for arm, values in summary["arms"].items()
    ]
    return ["arm", *metrics], rows
