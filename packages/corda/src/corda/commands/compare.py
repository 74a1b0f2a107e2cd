"""`corda compare`: which start suits a model and its texts?

Adapters of every start are fine-tuned alike, and both texts are measured. All arms get the same batches, steps, seeds and
learning rates to choose from. Each arm's rate is the one with the lowest loss on validation text of what is to be learned, on
a seed of its own; the text that is reported chooses nothing.
"""

import concurrent.futures
import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda.collecting import collect_context
from corda.commands._calibrating import check_ranks, lora_config_of
from corda.commands._finetune import ARMS, FinetuneSettings, Trajectory, attach_arm, finetune
from corda.commands._models import check_name, load_model, load_tokenizer
from corda.config import CompareSettings, CordaInit
from corda.context import ContextStats
from corda.data import Batches, calibration_batches, on_model
from corda.records import read_records
from corda.targets import resolve_targets
from tenfold import NonFiniteError, executors
from tenfold.claims import Measured, Study, arm_rows
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.runs import Run
from tenfold.terminal import show_claims, table, track

TUNING_SEED = 100
METRICS = ("learned loss", "kept increase", "equal loss", "steps to equal loss", "kept increase at equal loss")


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Tune, fine-tune and measure every arm; 1 with ``--strict`` if a claim fails."""
    bench = Bench(settings, quiet=invocation.quiet)
    with executors.make(settings.executor) as executor:
        study = compare(bench, invocation.folder, executor)
    summary = study.finish()
    names = {name: arm.label for name, arm in ARMS.items()}
    sys.stdout.write(table(*arm_rows(study, settings.arms, METRICS, names)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


@dataclasses.dataclass(frozen=True)
class Split:
    """Batches of one text, on the model's device; no window is in two parts.

    Attributes:
        fit: batches that calibrate; of what is to be learned, they also train.
        validate: batches that choose learning rates.
        measure: batches that are reported.
    """

    fit: Batches
    validate: Batches
    measure: Batches


class Bench:
    """What the arms of a comparison share: the model, the texts, and their statistics.

    Another process that receives it makes its own from the settings, once.

    Args:
        settings: settings of the comparison.
        quiet: whether to show no progress.

    Raises:
        UserError: a text, a device or a model that cannot be used, or a rank above a layer's size.
    """

    def __init__(self, settings: CompareSettings, *, quiet: bool) -> None:
        self.settings = settings
        self.quiet = quiet
        self.init = CordaInit(**dataclasses.asdict(settings.init))
        check_name(settings.model)
        device = choose_device(settings.device)
        texts = (("keep", settings.keep, settings.keep_text), ("learn", settings.learn, settings.learn_text))
        records = [read_records(source, how, option=f"--{name}") for name, source, how in texts]
        tokenizer = load_tokenizer(settings.model)
        parts = [calibration_batches(found, found.calibration, tokenizer, 4, disjoint=True) for found in records]
        self.model: PreTrainedModel = load_model(settings.model, device)
        self.lora_config = lora_config_of(settings)
        check_ranks(self.model, self.lora_config)
        self.keep, self.learn = (
            Split(*(list(on_model(batches, self.model)) for batches in (a + b, validate, measure)))
            for a, b, validate, measure in parts
        )

    def __reduce__(self) -> tuple[Callable[..., "Bench"], tuple[CompareSettings]]:
        return _bench_of, (self.settings,)

    @cached_property
    def stats(self) -> dict[str, ContextStats]:
        """Statistics of the texts that calibrate an arm: of "keep", of "learn"."""
        contexts = {ARMS[arm].context for arm in self.settings.arms}
        targets = list(resolve_targets(self.model, self.lora_config))
        return {
            name: collect_context(
                self.model, track(split.fit, f"calibrating on what is to {name}", quiet=self.quiet), targets, self.init
            )
            for name, split in (("keep", self.keep), ("learn", self.learn))
            if name in contexts
        }

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The windows that train, as one padded batch."""
        fit = self.learn.fit
        return {key: torch.cat([_padded(b[key], fit) for b in fit]) for key in ("input_ids", "attention_mask")}

    def train(
        self, arm: str, rate: float, seed: int, evaluate: Callable[[nn.Module], Mapping[str, float]]
    ) -> Trajectory:
        """Fine-tune a copy of the model from an arm's start; batches are drawn by the seed, alike for all arms."""
        size, rows = len(self.learn.fit[0]["input_ids"]), self.rows
        order = torch.randperm(len(rows["input_ids"]), generator=torch.Generator().manual_seed(seed))
        batches = [_labeled({key: t[part] for key, t in rows.items()}) for part in order.split(size)]  # type: ignore[no-untyped-call]
        stats = self.stats  # before the seed: to collect them draws numbers, in the first training of a process alone
        torch.manual_seed(seed)
        adapted = attach_arm(arm, copy.deepcopy(self.model), self.lora_config, **stats, init=self.init)
        how = FinetuneSettings(
            learning_rate=rate, steps=self.settings.steps, validate_every=self.settings.validate_every
        )
        return finetune(adapted, batches, evaluate, how)


_BENCHES: dict[str, Bench] = {}
"""The bench of a worker process, by its settings."""


def _bench_of(settings: CompareSettings) -> Bench:
    if repr(settings) not in _BENCHES:
        _BENCHES.clear()
        _BENCHES[repr(settings)] = Bench(settings, quiet=True)
    return _BENCHES[repr(settings)]


def compare(bench: Bench, run: Run, executor: concurrent.futures.Executor | None = None) -> Study:
    """Tune and measure every arm, and decide the claims.

    Losses are nats per token. Arms are compared at the end, and at the lowest loss of what is to be learned that all arms of
    a seed have reached.

    Args:
        bench: what the arms share; the model stays untouched, each arm gets a copy.
        run: output folder; finished measurements are taken from there.
        executor: where arms are measured; None is here, one after another.

    Raises:
        NonFiniteError: an arm diverges with every learning rate.
    """
    settings = bench.settings
    data = f"the user's: learned {settings.learn}, kept {settings.keep}"
    tuning = Study(run, data=data, seeds=[TUNING_SEED])
    tuning.over_arms({f"tuning-{arm}": partial(tune, bench, arm) for arm in settings.arms}, executor)
    rates: dict[str, float] = {arm: float(tuning.values((f"tuning-{arm}", "rate"))[0]) for arm in settings.arms}
    study = Study(run, data=data, seeds=settings.seeds)
    study.over_arms({arm: partial(measure, bench, arm, rates[arm]) for arm in settings.arms}, executor)
    for seed in settings.seeds:
        trajectories: dict[str, Trajectory] = {arm: _trajectory(study.arrays(arm, seed)) for arm in settings.arms}
        for arm, found in at_equal_loss(trajectories).items():
            study.record(arm, found, seed)
    before = {
        name: mean_loss(bench.model, split.measure) for name, split in (("learn", bench.learn), ("keep", bench.keep))
    }
    _decide(study, settings, rates, before)
    return study


def tune(bench: Bench, arm: str, seed: int) -> dict[str, float]:
    """Loss of the validation text with each learning rate, and the rate where it is lowest.

    Raises:
        NonFiniteError: the arm diverges with every learning rate.
    """
    rates = bench.settings.learning_rates
    found = {}
    for rate in track(rates, f"{ARMS[arm].label}: tuning the learning rate", quiet=bench.quiet):
        try:
            trajectory = bench.train(
                arm, rate, seed, lambda adapted: {"loss": mean_loss(adapted, bench.learn.validate)}
            )
            found[f"loss at {rate:g}"] = trajectory.metrics["loss"][-1]
        except NonFiniteError:
            continue
    if not found:
        raise NonFiniteError(f"arm {arm} diverges with every learning rate; lower --learning_rates")
    best = min(rates, key=lambda rate: found.get(f"loss at {rate:g}", float("inf")))
    return {"rate": best, **found}


def measure(bench: Bench, arm: str, rate: float, seed: int) -> Measured:
    """What an arm has learned and lost at its end, with both losses along the way."""

    def evaluate(adapted: nn.Module) -> dict[str, float]:
        return {"loss": mean_loss(adapted, bench.learn.measure), "kept": mean_loss(adapted, bench.keep.measure)}

    trajectory = bench.train(arm, rate, seed, evaluate)
    loss, kept = (trajectory.metrics[name] for name in ("loss", "kept"))
    arrays = {"steps": np.array(trajectory.steps), "loss": np.array(loss), "kept": np.array(kept)}
    return Measured({"learned loss": loss[-1], "kept increase": kept[-1] - kept[0]}, arrays)


def _trajectory(arrays: Mapping[str, Any]) -> Trajectory:
    return Trajectory(arrays["steps"].tolist(), {name: arrays[name].tolist() for name in ("loss", "kept")})


def at_equal_loss(trajectories: Mapping[str, Trajectory]) -> dict[str, dict[str, float]]:
    """Where each arm first comes down to the lowest loss that all arms have reached, and what it has lost by then."""
    target = max(min(trajectory.metrics["loss"]) for trajectory in trajectories.values())
    found = {}
    for arm, trajectory in trajectories.items():
        equal = trajectory.at(target)
        assert equal is not None, "some arm has not reached what all have reached"
        found[arm] = {
            "equal loss": target,
            "steps to equal loss": equal["step"],
            "kept increase at equal loss": equal["kept"] - trajectory.metrics["kept"][0],
        }
    return found


def _decide(study: Study, settings: CompareSettings, rates: Mapping[str, float], before: Mapping[str, float]) -> None:
    """The two promises of the method on the user's own data; where all arms began, and how the rates were chosen."""
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
    """Rows of one batch, as long as the longest of all batches; the mask of what is added is 0."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    return nn.functional.pad(tensor, (0, longest - tensor.shape[1]))
