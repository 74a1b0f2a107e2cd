"""The factors of all layers of a model, out of its weights and the calibration statistics."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda.config import CordaInit
from corda.context import ContextStats
from corda.solvers import DampedCovariance, Factors, factorize
from corda.targets import Target, linear, resolve_targets
from tenfold import NonFiniteError, UserError

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        shape: (m, n) of the weight.
        group: the layer whose input statistics it shares; None without statistics (power 0).
        rank: r.
        scaling: LoRA's factor in front of B A.
        sigma_first: the largest adapted singular value of W C_d^p.
        sigma_last: the smallest.
        null: directions left out because the weight is rank-deficient.
        solver: how the singular vectors were found.
        precision: of that solve.
        iterations: of the randomised solver.
        seconds: of that solve.
    """

    shape: tuple[int, int]
    group: str | None
    rank: int
    scaling: float
    sigma_first: float
    sigma_last: float
    null: int
    solver: str
    precision: str
    iterations: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class FactorSet:
    """Factors of every target of a model.

    Attributes:
        factors: layer -> ``Factors``.
        targets: layer -> rank and scaling.
        layers: layer -> what was done.
        init: the settings.
        fingerprint: of the model that the factors were made for; None for factors without statistics.
    """

    factors: dict[str, Factors]
    targets: dict[str, Target]
    layers: dict[str, LayerReport]
    init: CordaInit
    fingerprint: str | None

    def report(self, energies: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Settings and layers as plain values that JSON holds.

        Args:
            energies: of ``output_energies``, to be reported beside them.
        """
        energies = energies or {}
        layers = {name: dataclasses.asdict(self.layers[name]) for name in self.layers}
        for name, layer in layers.items():
            layer["output_energy"] = energies.get(name)
        return {"init": dataclasses.asdict(self.init), "fingerprint": self.fingerprint, "layers": layers}


def build_factors(
    model: nn.Module, stats: ContextStats | None, lora_config: "LoraConfig", init: CordaInit | None = None
) -> FactorSet:
    """Solve every layer that ``lora_config`` targets; layers of one input share its damped covariance.

    Args:
        model: the plain base model; stays untouched.
        stats: of this model; None with ``power=0``.
        lora_config: targets, ranks, alpha and their patterns, as peft resolves them.
        init: default ``CordaInit()``.

    Raises:
        UserError: a rank above its layer's size, a layer without statistics, statistics of another model, or a layer
            that is no linear one with floating-point weights of its own.
        NonFiniteError: NaN or infinity in a weight, with the layer's name.
    """
    init = init or CordaInit()
    targets = resolve_targets(model, lora_config)
    if init.power and stats is None:
        raise UserError(f"power {init.power} needs calibration statistics")
    if stats is not None:
        stats.check_model(model)
    factors, layers = {}, {}
    for name, context in _by_group(list(targets), stats, init):
        target, weight = targets[name], linear(model, name).weight.detach()
        start = time.perf_counter()
        try:
            found = factorize(weight, context, target.rank, init, scaling=target.scaling)
        except UserError as error:
            raise type(error)(f"layer {name}: {error}") from error
        seconds = time.perf_counter() - start
        factors[name] = found
        layers[name] = LayerReport(
            shape=(weight.shape[0], weight.shape[1]),
            group=stats.groups[name] if stats else None,
            rank=target.rank,
            scaling=target.scaling,
            sigma_first=found.sigma[0].item(),
            sigma_last=found.sigma[-1].item(),
            null=found.null,
            solver=found.solver,
            precision=found.precision,
            iterations=found.iterations,
            seconds=seconds,
        )
    ordered = list(targets)
    return FactorSet(
        {name: factors[name] for name in ordered},
        targets,
        {name: layers[name] for name in ordered},
        init,
        stats.fingerprint if stats else None,
    )


def _by_group(
    names: list[str], stats: ContextStats | None, init: CordaInit
) -> Iterator[tuple[str, DampedCovariance | None]]:
    """The layers, those of one input after another, with the covariance that they share (only one is alive at a time)."""
    if stats is None:
        yield from ((name, None) for name in names)
        return
    for group in dict.fromkeys([stats.group(name) for name in names]):  # says who has none, before any work is done
        members = [name for name in names if stats.groups[name] == group]
        try:
            shared = DampedCovariance(stats.covariance(members[0]), init.damping) if init.power else None
        except UserError as error:
            raise type(error)(f"layer {members[0]}: {error}") from error
        yield from ((name, shared) for name in members)


def output_energies(model: nn.Module, stats: ContextStats, factors: FactorSet) -> dict[str, float]:
    """For each layer of the plain base model, the share of its output energy that lies in the adapted directions.

        |U^T W X|^2 / |W X|^2    on the calibration text

    It takes a product W C a layer, which costs more than the randomised solver; so ``build_factors`` leaves it out.
    """
    return {
        name: output_energy(linear(model, name).weight.detach(), stats.covariance(name), found.left)
        for name, found in factors.factors.items()
    }


def output_energy(weight: Tensor, covariance: Tensor, left: Tensor) -> float:
    """|U^T W X|^2 / |W X|^2 = tr(U^T W C W^T U) / tr(W C W^T): the share of the output energy along U."""
    W = weight.double()
    WC = W @ covariance.to(W)
    U = left.double()
    part = ((U.T @ WC) * (U.T @ W)).sum()
    whole = (WC * W).sum()
    if not torch.isfinite(whole):
        raise NonFiniteError("the weight or the covariance holds NaN or infinity")
    return float(part / whole) if whole > 0 else 0.0
