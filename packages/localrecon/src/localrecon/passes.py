"""One part of a batch through one module: the ordinary pass, and the two estimators of the reconciled gradient."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localrecon.boundary import Boundary, StepOptions
from localrecon.chain import Context
from localrecon.config import SGRConfig
from localrecon.inputs import Labels, rows_of, samples_in, tensors_of
from localrecon.losses import full_precision, terms_of
from localrecon.reconcile import clip_shift, direction, distance
from localrecon.stage import Stage, frozen_statistics, warn_of_clone, without_parameter_gradients
from tenfold import NonFiniteError, UserError
from tenfold.randomness import generator, keyed


class NonFiniteLossError(NonFiniteError):
    """The loss of a module is NaN or infinite.

    Attributes:
        module: number of the module, from 1 on.
        step: number of the step, from 0 on.
    """

    def __init__(self, message: str, *, module: int, step: int) -> None:
        super().__init__(message)
        self.module = module
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:  # it travels between processes
        return _rebuild, (str(self), self.module, self.step)


def _rebuild(message: str, module: int, step: int) -> NonFiniteLossError:
    return NonFiniteLossError(message, module=module, step=step)


class NoSecondDerivativeError(UserError, RuntimeError):
    """An operation has no second derivative, which the estimator "exact" needs."""


@dataclass
class Pass:
    """One part of the batch through one module."""

    stage: Stage
    boundary: Boundary
    part: int
    terms: int
    total: int
    sgr: SGRConfig
    options: StepOptions
    lam: float
    scaler: Any
    found: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        boundary, part = self.boundary, self.part
        self.x: Any = boundary.x[part]
        self.target = boundary.target[part]
        self.context, self.labels = boundary.context[part], boundary.labels[part]
        boundary.x[part] = boundary.target[part] = None
        self.weight = self.terms / self.total
        self.scale = float(self.scaler.get_scale()) if self.scaler is not None else 1.0
        self.device = tensors_of(self.labels)[0].device

    @contextlib.contextmanager
    def without_sync(self, *, last: bool) -> Iterator[None]:
        """Under DDP, average gradients over the ranks with the last part alone."""
        parallel = self.stage.__dict__.get("parallel")
        with contextlib.nullcontext() if last or parallel is None else parallel.no_sync():
            yield

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Keyed random states and mixed precision: the same in each pass over this part."""
        options = self.options
        key = (options.seed, self.stage.index, options.step, self.part)
        mixed = torch.autocast(self.device.type, options.dtype) if options.dtype else contextlib.nullcontext()
        with keyed(*key, device=self.device), mixed:
            yield

    def run(self) -> dict[str, float]:
        """Gradients of the parameters, the next boundary, and what is to be reported, weighted by this part's terms."""
        if self.lam and self.scaler is not None and not _finite(self.target):
            self.lam = 0.0  # the module before has overflowed: there is nothing to agree with in this step
        if not self.lam:
            self._plain()
        elif self.sgr.estimator == "exact":
            self._exact()
        else:
            self._shift()
        return {name: value * self.weight for name, value in self.found.items()}

    def _forward(
        self,
        x: Any,
        labels: Labels | None = None,
        context: Context = None,
        *,
        trains: bool,
        apart: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = self.stage.call if trains else self.stage
        labels = self.labels if labels is None else labels
        context = self.context if context is None else context
        try:
            with self.computing():
                out, loss, correct = call(x, context, labels, apart)
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error) or self.stage.clones_input:
                raise
            warn_of_clone(self.stage)
            return self._forward(x, labels, context, trains=trains, apart=apart)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"{self.stage.name}: BatchNorm cannot normalize one sample; give two or more in a batch (in each part, with"
                " accumulate)"
            ) from error
        if not isinstance(out, Tensor) or not out.is_floating_point():
            kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"{self.stage.name} gives {kind}: expected one tensor of real numbers at a boundary")
        value = float(loss.detach())
        if not math.isfinite(value) and self.scaler is None:
            where, step = _first_not_finite(self.stage, x, context), self.options.step
            message = f"{self.stage.name}: the loss is {value} at step {step}; {where}"
            raise NonFiniteLossError(message, module=self.stage.index + 1, step=step)
        if labels is self.labels and "loss" not in self.found:
            self.found["loss"] = value
            if self.stage.task != "custom":
                self.found["accuracy"] = float(correct) / max(1, self.terms)
        return out, loss, correct

    def _backward(self, loss: Tensor, parameters: list[nn.Parameter] | None = None) -> None:
        factor = self.weight * self.scale
        if not loss.requires_grad or (parameters is not None and not parameters):
            return  # nothing in this module is trained
        try:
            (loss if factor == 1 else loss * factor).backward(inputs=parameters)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _of_checkpoints(self.stage, error) from error

    def _hand_on(self, x: Tensor, gradient: Tensor | None) -> None:
        """The next boundary, without history.

        The gradient is in single precision (or double). So is the output under mixed precision, where the next module
        takes it; without, it stays in the model's own number format.
        """
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        self.boundary.x[self.part] = x.detach().to(wide if self.options.dtype else x.dtype)
        self.boundary.target[self.part] = None if gradient is None else gradient.detach().to(wide)

    def _plain(self) -> None:
        x, self.x, self.target = self.x, None, None
        out, loss, _ = self._forward(x, trains=True)
        del x
        if not self.stage.is_last:
            out.retain_grad()
        self._backward(loss)
        if not self.stage.is_last:
            assert out.grad is not None
            factor = self.total / self.scale
            gradient = full_precision(out.grad)
            self._hand_on(out, gradient if factor == 1 else gradient.mul_(factor))

    def _compare(self, g: Tensor, t: Tensor, terms: int) -> None:
        """What is reported of two opinions about one tensor."""
        cosine = F.cosine_similarity(g.flatten(1), t.flatten(1), dim=1).mean()
        self.found["cosine"] = float(cosine)
        self.found["reconciliation"] = float(distance(g, t, terms, self.sgr.dist))

    def _chosen(self) -> Tensor | None:
        """Indices of the samples that are reconciled; None is all."""
        count = samples_in(self.labels)
        chosen = max(1, round(self.sgr.fraction * count))
        if chosen == count:
            return None
        drawn = generator(self.options.seed, self.stage.index, self.options.step, self.part, 1)
        return torch.randperm(count, generator=drawn)[:chosen].sort().values.to(self.device)

    def _shift(self) -> None:
        assert self.target is not None
        chosen = self._chosen()
        context = self.context
        if chosen is None:
            x, t, labels, terms = self.x, self.target, self.labels, self.terms
            self.x = self.target = None
        else:
            x, t = self.x[chosen], self.target[chosen]
            labels = rows_of(self.labels, chosen, samples_in(self.labels))
            context = self.stage.chain.select(self.context, chosen)
            terms = terms_of(labels, self.stage.task)
        terms = max(1, terms)  # a part may hold no token that counts
        x, g_out, probed = self._probe(x, t, labels, context, terms)
        del t
        if chosen is not None:
            self._learn_mixed(x, g_out, probed, chosen)
            return
        if not self.stage.is_last:
            assert probed is not None
            self._hand_on(probed, g_out)
        del g_out
        with frozen_statistics(self.stage.norms):  # also backward, where checkpoints compute again
            _, loss, _ = self._forward(x, trains=True, apart=None if self.sgr.reg_to_head else probed)
            del x, probed, _
            self._backward(loss)

    def _learn_mixed(self, x: Tensor, g_out: Tensor | None, probed: Tensor | None, chosen: Tensor) -> None:
        """With a fraction: the chosen samples learn shifted and go on as probed, the others in one ordinary pass."""
        if not self.sgr.reg_to_head:
            raise UserError("fraction below 1 does not go with reg_to_head=False")
        whole, self.x, self.target = self.x.index_copy(0, chosen, x), None, None
        out, loss, _ = self._forward(whole, trains=True)
        last = self.stage.is_last
        if not last:
            out.retain_grad()
        self._backward(loss)
        if last:
            return
        assert out.grad is not None
        assert probed is not None
        assert g_out is not None
        gradient = full_precision(out.grad).mul_(self.total / self.scale)
        self._hand_on(
            out.detach().index_copy(0, chosen, probed), gradient.index_copy(0, chosen, g_out.to(gradient.dtype))
        )

    def _probe(
        self, x: Tensor, t: Tensor, labels: Labels, context: Context, terms: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Shifted input, per-sample gradient at the output, and the output; no gradient for any parameter."""
        leaf = x.detach().requires_grad_()
        last, scale = self.stage.is_last, self.scale
        with self.stage.probing(), without_parameter_gradients(self.stage.trained()):
            out, loss, _ = self._forward(leaf, labels, context, trains=False)
            asked = [leaf] if last else [leaf, out]
            try:
                grads = torch.autograd.grad(loss if scale == 1 else loss * scale, asked)
            except RuntimeError as error:
                raise _of_checkpoints(self.stage, error) from error
        detached = None if last and self.sgr.reg_to_head else out.detach()
        del out, loss
        g = full_precision(grads[0]).mul(terms / scale)
        g_out = None if last else full_precision(grads[1]).mul_(terms / scale)
        del grads
        if self.scaler is not None and not _finite(g):
            return x, g_out, detached  # an overflow: no shift in this step
        self._compare(g, t, terms)
        delta = direction(g, t, terms, self.sgr.dist).mul_(self.lam * self.terms / terms)
        del g
        if self.sgr.shift_clip is not None:
            delta, self.found["clipped"] = clip_shift(delta, x, self.sgr.shift_clip)
        return delta.add_(x).to(x.dtype), g_out, detached

    def _exact(self) -> None:
        assert self.target is not None
        chosen, t = self._chosen(), self.target
        leaf = self.x.detach().requires_grad_()
        self.x = self.target = None
        try:
            with _math_attention(self.sgr.math_attention):
                out, loss, _ = self._forward(leaf, trains=True)
                asked = [leaf] if self.stage.is_last else [leaf, out]
                with contextlib.ExitStack() as stack:
                    judged = loss
                    if not self.sgr.reg_to_head:  # also while differentiating, which makes the second graph
                        stack.enter_context(without_parameter_gradients(self.stage.head_parameters()))
                        stack.enter_context(frozen_statistics(self.stage.norms))
                        with self.computing():
                            judged, _ = self.stage.judge(out, self.context, self.labels)
                    grads = torch.autograd.grad(judged * self.scale, asked, create_graph=True)
                g = full_precision(grads[0]) * (self.terms / self.scale)
                terms = self.terms
                if chosen is not None:
                    g, t = g[chosen], t[chosen]
                    labels = rows_of(self.labels, chosen, samples_in(self.labels))
                    terms = terms_of(labels, self.stage.task)
                terms = max(1, terms)
                self._compare(g.detach(), t, terms)
                objective = loss + self.lam * distance(g, t, terms, self.sgr.dist)
                gradient = None if self.stage.is_last else grads[1].detach() * (self.terms / self.scale)
                del grads, g
                self._backward(objective, self.stage.trained())
        except RuntimeError as error:
            if "derivative for" not in str(error) and "double backward" not in str(error):
                raise _of_checkpoints(self.stage, error) from error
            raise NoSecondDerivativeError(
                f"{self.stage.name} has an operation without second derivative ({' '.join(str(error).split())[:120]}): use"
                ' estimator="shift", or for attention math_attention=True'
            ) from error
        if not self.stage.is_last:
            self._hand_on(out, gradient)


def _finite(value: Tensor | None) -> bool:
    return value is not None and bool(torch.isfinite(value).all())


def _of_checkpoints(stage: Stage, error: RuntimeError) -> Exception:
    """What reentrant checkpoints within a module raise, in our words; another error as it is."""
    if "use_reentrant" not in str(error) and "Checkpointing is not compatible" not in str(error):
        return error
    return UserError(
        f"{stage.name} uses reentrant activation checkpoints, which give no gradient of an input: checkpoint with"
        " use_reentrant=False (transformers: gradient_checkpointing_kwargs), or turn them off"
    )


@contextlib.contextmanager
def _math_attention(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@torch.no_grad()
def _first_not_finite(stage: Stage, x: Any, context: Context) -> str:
    """Which input, parameter or block it comes from."""
    if not all(bool(torch.isfinite(v).all()) for v in tensors_of(x) if v.is_floating_point()):
        return "its input is not finite already"
    sound = all(bool(torch.isfinite(p).all()) for p in stage.parameters())
    with frozen_statistics(stage.norms):
        for number, block in enumerate(stage.blocks, stage.first):
            x = stage.chain.run(number, number + 1, x, context)
            if not bool(torch.isfinite(x).all()):
                weights = "all its weights are finite" if sound else "a weight is not finite"
                return f"{weights}; the first output that is not finite is that of block {block.name}"
    return f"its blocks' outputs are finite, {'the head or the labels are not' if sound else 'a weight of its head is not'}"
