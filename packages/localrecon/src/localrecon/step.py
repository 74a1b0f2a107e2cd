"""One training step, module by module: what ``local_step``, both trainers and the pipeline run."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from localrecon.boundary import Boundary, StepOptions, first_boundary
from localrecon.config import SGRConfig
from localrecon.inputs import Inputs, Labels, tensors_of
from localrecon.losses import terms_of
from localrecon.net import LocalNet
from localrecon.passes import NonFiniteLossError, Pass
from localrecon.stage import Stage
from tenfold import UserError


@dataclass(frozen=True)
class ModuleReport:
    """What happened in one module.

    Attributes:
        loss: local loss; NaN or infinite where float16 has overflowed.
        accuracy: accuracy of its head on the batch, in [0, 1]; None with a loss of the user's.
        reconciliation: R; None where reconciliation was off.
        cosine: cosine of g_in and its target, mean over samples; None where reconciliation was off.
        clipped: share of the samples whose shift was clipped; None but for shift.
        seconds: wall time.
    """

    loss: float
    accuracy: float | None
    reconciliation: float | None = None
    cosine: float | None = None
    clipped: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """What happened in a step.

    Attributes:
        modules: what happened in each module.
    """

    modules: tuple[ModuleReport, ...]

    @property
    def losses(self) -> list[float]:
        """Local losses; the last is the task's."""
        return [module.loss for module in self.modules]

    def metrics(self) -> dict[str, float]:
        """What a log shows: ``m1/loss``, ``m1/acc``, ..., and ``b1/cos``, ``b1/R``, ``b1/clipped`` of the boundaries."""
        found: dict[str, float] = {}
        for k, module in enumerate(self.modules, 1):
            found[f"m{k}/loss"] = module.loss
            if module.accuracy is not None:
                found[f"m{k}/acc"] = module.accuracy
            values = {"cos": module.cosine, "R": module.reconciliation, "clipped": module.clipped}
            found |= {f"b{k - 1}/{name}": value for name, value in values.items() if value is not None}
        return found


def local_step(
    net: LocalNet,
    inputs: Inputs,
    labels: Labels,
    optimizers: Sequence[torch.optim.Optimizer],
    sgr: SGRConfig | None = None,
    options: StepOptions | None = None,
    scalers: Sequence[torch.amp.GradScaler] | None = None,
) -> StepReport:
    """One step of local training: each module runs, is updated at once and lets go of everything, then the next.

    Args:
        net: in training mode.
        inputs: (B, ...), a tuple of such arguments, or a mapping of them by name.
        labels: (B,) int64 or (B, C) probabilities; for language models (B, T) int64, the next token; -100 does not count.
            With a loss of the user's, whatever that takes.
        optimizers: one per module, of ``net.parameters_of(k)``.
        sgr: the reconciliation; default ``SGRConfig()``; ``SGRConfig(lam=0)`` is plain local learning.
        options: step number, seed and the like; default ``StepOptions()``.
        scalers: one loss scale per module, for float16.

    Raises:
        NonFiniteLossError: loss or gradient of a module is NaN or infinite; it names module, step and block. That module
            is not updated; those before it have been, but for ``options.together``.
        NoSecondDerivativeError: estimator exact on an operation without second derivative.
        UserError: labels that do not fit, BatchNorm with one sample, fraction below 1 with BatchNorm.
        RuntimeError: the net is in evaluation mode.
    """
    sgr, options = sgr or SGRConfig(), options or StepOptions()
    if not net.training or not net.model.training:
        raise RuntimeError("the net is in evaluation mode: call net.train() before training it")
    if len(optimizers) != net.plan.k:
        raise UserError(f"{net.plan.k} modules need as many optimizers, got {len(optimizers)}")
    boundary = first_boundary(net, inputs, labels, options.accumulate)
    del inputs
    reports = []
    for k, stage in enumerate(net.segments):
        optimizer = None if options.together else optimizers[k]
        report = train_stage(stage, boundary, optimizer, sgr, options, scalers[k] if scalers else None)
        reports.append(report)
    if options.together:
        for stage in net.segments:
            if not scalers:
                _check_gradients(stage, options.step)
        for k, stage in enumerate(net.segments):
            _update(stage, optimizers[k], options, scalers[k] if scalers else None)
    return StepReport(tuple(reports))


_GATE_MEMORY = 0.99


def train_stage(
    stage: Stage,
    boundary: Boundary,
    optimizer: torch.optim.Optimizer | None,
    sgr: SGRConfig,
    options: StepOptions,
    scaler: torch.amp.GradScaler | None = None,
) -> ModuleReport:
    """Train one module on what the one before left in ``boundary``, and leave there what the next one starts from.

    Without an optimizer nothing is updated; gradients stay with ``options.together``, and are dropped otherwise.
    """
    start = time.perf_counter()
    lam = 0.0 if stage.index == 0 else sgr.strength(options.step, options.total_steps)
    if sgr.gate and lam and boundary.loss_average and stage.loss_average:
        lam *= min(1.0, stage.loss_average / boundary.loss_average) ** 2
    if lam and sgr.fraction < 1 and stage.norms:
        raise UserError(f"fraction {sgr.fraction} needs a model without BatchNorm, which {stage.name} has: use every")
    if scaler is not None:
        scaler.scale(
            torch.zeros((), device=tensors_of(boundary.labels[0])[0].device)
        )  # makes its state, which ``unscale_`` needs
    terms = [terms_of(labels, stage.task) for labels in boundary.labels]
    total = max(1, sum(terms))
    parts = len(terms)
    sums: dict[str, float] = {}
    for part in range(parts):
        once = Pass(stage, boundary, part, terms[part], total, sgr, options, lam, scaler)
        with once.without_sync(last=part == parts - 1):
            found = once.run()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    if sgr.gate:
        loss, average = sums["loss"], stage.loss_average
        if math.isfinite(loss):
            stage.loss_average = loss if average is None else _GATE_MEMORY * average + (1 - _GATE_MEMORY) * loss
        boundary.loss_average = stage.loss_average
    if optimizer is not None:
        _update(stage, optimizer, options, scaler)
    elif not options.together:
        drop_gradients(stage)
    return ModuleReport(
        sums["loss"],
        sums.get("accuracy"),
        sums.get("reconciliation"),
        sums.get("cosine"),
        sums.get("clipped"),
        time.perf_counter() - start,
    )


def _update(
    stage: Stage, optimizer: torch.optim.Optimizer, options: StepOptions, scaler: torch.amp.GradScaler | None
) -> None:
    """Clip, update, and let go of the module's gradients."""
    trained = [p for p in stage.trained() if p.grad is not None]
    if scaler is None:
        _check_gradients(stage, options.step)
    elif trained:
        scaler.unscale_(optimizer)
    if options.clip_norm is not None and trained:
        nn.utils.clip_grad_norm_(trained, options.clip_norm)
    if scaler is None:
        optimizer.step()
    elif trained:
        scaler.step(optimizer)  # does nothing after an overflow ...
        scaler.update()  # ... but to lower the scale
        if scaler.get_scale() < 1:
            raise NonFiniteLossError(
                f"{stage.name}: the gradient is not finite at step {options.step}, at any loss scale down to 1",
                module=stage.index + 1,
                step=options.step,
            )
    drop_gradients(stage)


def _check_gradients(stage: Stage, step: int) -> None:
    """Refuse to update a module by a gradient that is not finite.

    Raises:
        NonFiniteLossError: it names the first such parameter.
    """
    gradients = [p.grad for p in stage.parameters() if p.grad is not None and not p.grad.is_sparse]
    if not gradients or math.isfinite(float(nn.utils.get_total_norm(gradients))):
        return
    own = stage.chain.parameters_of(*stage.blocks, *([stage.chain.tail] if stage.is_last else []))
    named = [*own.items(), *((f"{n} of its head", p) for n, p in (stage.head or nn.Identity()).named_parameters())]
    name = next((name for name, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())), "")
    if not name:
        return  # the norm of large numbers alone is too large
    raise NonFiniteLossError(
        f"{stage.name}: the loss is finite at step {step}, but its gradient is not; first in {name}",
        module=stage.index + 1,
        step=step,
    )


def drop_gradients(stage: Stage) -> None:
    """Let go of a module's gradients."""
    for parameter in stage.parameters():
        parameter.grad = None
