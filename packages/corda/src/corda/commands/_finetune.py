"""Fine-tune one model from several starts under equal conditions: how soon is a target loss reached, and at what price?

An arm is a start: peft's plain LoRA, or the factors of a mode and power. Arms differ in A, B and the frozen weight;
data, batches, optimizer and evaluations are the caller's and the same for all. Nothing is printed or written here.

    torch.manual_seed(seed)  # a plain LoRA draws its A
    adapted = attach_arm("corda-kpm", copy.deepcopy(model), lora_config, keep=stats_of_what_is_to_be_kept)
    trajectory = finetune(adapted, batches, evaluate, FinetuneSettings(learning_rate=1e-3, steps=400, target_loss=1.7))
    trajectory.at(1.7)  # {"step": 212.4, "loss": 1.7, ...}, or None if it was not reached
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corda.attach import apply_corda
from corda.config import CordaInit
from corda.context import ContextStats
from corda.factors import build_factors
from tenfold import NonFiniteError, UserError
from tenfold.config import Count, Natural, NonNegative, Positive, Settings
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to start an adapter.

    Attributes:
        label: name in tables and figures.
        mode: mode of ``CordaInit``; None is peft's plain LoRA.
        power: power of ``CordaInit``.
        context: statistics that it takes: of what is to be kept, of what is to be learned, or none.
    """

    label: str
    mode: Literal["kpm", "ipm"] | None = None
    power: float = 0.0
    context: Literal["keep", "learn"] | None = None


ARMS = {
    "lora": Arm("LoRA"),
    "pissa": Arm("PiSSA", "ipm"),
    "milora": Arm("MiLoRA", "kpm"),
    "corda-kpm": Arm("CorDA-KPM", "kpm", 1.0, "keep"),
    "corda-ipm": Arm("CorDA-IPM", "ipm", 1.0, "learn"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Settings):
    """How an adapter is trained: AdamW, a learning rate that is constant after a linear warm-up.

    A schedule that ended at a given step would favor an arm that reaches the target near its end.

    Args:
        learning_rate: learning rate after the warm-up.
        steps: maximum number of steps.
        validate_every: steps between evaluations; there is one before the first step and one after the last.
        target_loss: loss that ends the training, at the first evaluation whose "loss" is no larger; None trains all steps.
        warm_up: number of steps until the learning rate is reached.
        weight_decay: weight decay of A and B (0 in the authors' code).
        max_grad_norm: norm to which gradients are scaled down (1 in Hugging Face's Trainer).
    """

    learning_rate: Positive
    steps: Count
    validate_every: Count = 10
    target_loss: float | None = None
    warm_up: Natural = 10
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What was measured along a training.

    Attributes:
        steps: numbers of steps after which it was measured, ascending from 0.
        metrics: name -> its values there; "loss" is the one that targets are about.
    """

    steps: list[int]
    metrics: dict[str, list[float]]

    def at(self, loss: float) -> dict[str, float] | None:
        """All metrics and "step" at the point where the loss first comes down to ``loss``; None if it never does.

        Values are interpolated between the two evaluations on either side, so that runs are compared at the same loss.
        """
        losses = self.metrics["loss"]
        end = next((i for i, value in enumerate(losses) if value <= loss), None)
        if end is None:
            return None
        start = max(end - 1, 0)
        share = (losses[start] - loss) / (losses[start] - losses[end]) if end else 1.0
        rows = {"step": [float(step) for step in self.steps], **self.metrics}
        return {name: values[start] + share * (values[end] - values[start]) for name, values in rows.items()}


def attach_arm(
    name: str,
    model: nn.Module,
    lora_config: "LoraConfig",
    *,
    keep: ContextStats | None = None,
    learn: ContextStats | None = None,
    init: CordaInit | None = None,
) -> "PeftModel":
    """Attach the adapter of an arm to the model, ready to be trained.

    Args:
        name: one of ``ARMS``.
        model: the plain base model; its weights are changed by every arm but ``lora``, so give a copy to each.
        lora_config: targets, rank and alpha, the same for all arms. Plain LoRA draws A from torch's global generator.
        keep: statistics of what is to be kept; for ``corda-kpm``.
        learn: statistics of what is to be learned; for ``corda-ipm``.
        init: settings whose mode and power are replaced by the arm's; default ``CordaInit()``.

    Raises:
        UserError: an unknown arm, or one without its statistics.
    """
    from peft import get_peft_model

    if name not in ARMS:
        raise UserError(f"unknown arm '{name}': {did_you_mean(name, ARMS)}")
    arm = ARMS[name]
    if arm.mode is None:
        plain = dataclasses.replace(lora_config, init_lora_weights=True)
        return get_peft_model(model, plain)
    stats = {"keep": keep, "learn": learn, None: None}[arm.context]
    if arm.context and stats is None:
        raise UserError(
            f"arm {name} needs the statistics of what is to be {'kept' if arm.context == 'keep' else 'learned'}"
        )
    # the statistics are there already, and accumulate="cross" would be refused beside power 0
    chosen = dataclasses.replace(init or CordaInit(), mode=arm.mode, power=arm.power, accumulate="auto")
    return apply_corda(model, build_factors(model, stats, lora_config, chosen), lora_config)


def finetune(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    settings: FinetuneSettings,
) -> Trajectory:
    """Train the parameters that require a gradient; step i takes ``batches[i % len(batches)]``.

    Args:
        model: called as ``model(**batch).loss``, which a transformers model has when the batch holds ``labels``.
        batches: on the model's device.
        evaluate: function that measures a model in evaluation mode; among its metrics is "loss" (of held-out task text).
        settings: learning rate, steps, target.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message gives step and learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps: list[int] = []
    metrics: dict[str, list[float]] = {}

    def measure(step: int) -> bool:
        model.eval()
        with torch.no_grad():
            found = evaluate(model)
        model.train()
        steps.append(step)
        for name, value in found.items():
            metrics.setdefault(name, []).append(value)
        return settings.target_loss is not None and found["loss"] <= settings.target_loss

    reached = measure(0)
    for step in range(settings.steps):
        if reached:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(settings.warm_up, 1))
        output: Any = model(**batches[step % len(batches)])
        if not math.isfinite(output.loss.item()):
            rate = settings.learning_rate
            raise NonFiniteError(
                f"fine-tuning: the loss is {output.loss.item()} at step {step}, learning rate {rate:g}"
            )
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        done = step + 1
        if done % settings.validate_every == 0 or done == settings.steps:
            reached = measure(done)
    return Trajectory(steps, metrics)
