"""The factors of all layers of a model, from its weights and the calibration statistics."""

import dataclasses
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from corda.algebra import STRIP
from corda.config import CordaInit
from corda.context import ContextStats, agreed
from corda.fingerprints import check_same, fingerprint
from corda.moments import CrossMoment, DampedCovariance
from corda.solvers import Factors, factorize
from corda.targets import Target, linears, rank_hint, resolve_targets, shape_of, weight_of
from tenfold import NonFiniteError, UserError, checkpoints
from tenfold.distributed import rank, world_size

if TYPE_CHECKING:
    from peft import LoraConfig

METHOD = "corda.factors"
TENSORS = ("A", "left", "lengths", "sigma")
"""Of ``Factors``."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        shape: (m, n) of the weight.
        group: the layer whose input statistics it shares; None without statistics (power 0).
        rank: r.
        scaling: LoRA's factor in front of B A.
        sigma_first: the largest adapted singular value of W C_d^p.
        sigma_last: the smallest adapted singular value.
        null: number of directions left out because the weight is rank-deficient.
        solver: how the singular vectors were found.
        precision: precision of the solve.
        iterations: iterations of the randomized solver.
        seconds: duration of the solve.
        output_energy: share of the layer's output energy in the adapted directions; None where it was not computed.
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
    output_energy: float | None = None


@dataclasses.dataclass(frozen=True)
class FactorSet:
    """Factors of every target of a model.

    Attributes:
        factors: layer -> its factors.
        targets: layer -> rank and scaling.
        layers: layer -> what was done.
        init: the settings.
        fingerprint: fingerprint of the model that the factors were made for.
    """

    factors: dict[str, Factors]
    targets: dict[str, Target]
    layers: dict[str, LayerReport]
    init: CordaInit
    fingerprint: str | None

    def check_model(self, model: nn.Module, *, quantized: bool = False) -> None:
        """Raise ``UserError`` unless the factors were made for this model, or with ``quantized`` for its unquantized form."""
        check_same("the factors were made", self.fingerprint, model, quantized=quantized)

    def report(self, energies: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Settings and layers as plain values for JSON.

        Args:
            energies: layer -> output energy, as ``output_energies`` finds it.
        """
        energies = energies or {}
        layers = {name: dataclasses.asdict(self.layers[name]) for name in self.layers}
        for name, layer in layers.items():
            layer["output_energy"] = energies.get(name, layer["output_energy"])
        return {"init": dataclasses.asdict(self.init), "fingerprint": self.fingerprint, "layers": layers}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors = {f"{name}.{part}": getattr(f, part) for name, f in self.factors.items() for part in TENSORS}
        config = {"targets": self.targets, "layers": self.layers, "init": self.init, "fingerprint": self.fingerprint}
        checkpoints.save(path, tensors, method=METHOD, config=config)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FactorSet":
        """Read what ``save`` wrote.

        Raises:
            UserError: no such file, or a file that is something else.
        """
        checkpoint = checkpoints.load(path, method=METHOD)
        config = checkpoint.config
        targets = {name: Target(**target) for name, target in config["targets"].items()}
        layers = {
            name: LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for name, layer in config["layers"].items()
        }
        factors = {
            name: Factors(
                **{part: checkpoint.tensors[f"{name}.{part}"] for part in TENSORS},
                solver=layer.solver,
                precision=layer.precision,
                null=layer.null,
                iterations=layer.iterations,
            )
            for name, layer in layers.items()
        }
        return cls(factors, targets, layers, CordaInit(**config["init"]), config["fingerprint"])


Progress = Callable[[Iterable[str]], Iterable[str]]
"""Yields the names that it is given, each when the work on it begins, like a progress bar."""


def build_factors(
    model: nn.Module,
    stats: ContextStats | None,
    lora_config: "LoraConfig",
    init: CordaInit | None = None,
    *,
    progress: Progress = iter,
) -> FactorSet:
    """Solve every layer that ``lora_config`` targets; layers of one input share its damped covariance.

    In a process group of several ranks, all of them must call it, with the same statistics (``ContextStats.reduce``). The
    layers of one input are then solved by one rank, and all ranks receive its factors, so that replicas start identical.

    Args:
        model: the plain base model; stays untouched.
        stats: of this model; None with ``power=0``.
        lora_config: targets, ranks, alpha and their patterns, as peft resolves them.
        init: default ``CordaInit()``.
        progress: wraps the names of what this rank solves (one for all layers of an input), such as ``tqdm``.

    Raises:
        UserError: a rank above its layer's size, a layer without statistics, statistics of another model, a layer
            that is not a linear one with floating-point weights of its own, or processes with different statistics; an
            error on one rank is raised on all of them.
        NonFiniteError: NaN or infinity in a weight, with the layer's name.
    """
    init = init or CordaInit()

    def checked() -> dict[str, Target]:
        if init.power and stats is None:
            raise UserError(f"power {init.power} needs calibration statistics")
        if stats is not None:
            stats.check_model(model)
        found = resolve_targets(model, lora_config)
        for name, layer in linears(model, found).items():
            rank, size = found[name].rank, min(shape_of(layer, name))
            if rank > size:
                raise UserError(f"layer {name}: {rank_hint(rank, size, name)}")
        return found

    targets = agreed(checked)
    solved = solve_layers(model, targets, stats, init, progress=progress)
    return FactorSet(
        {name: factors for name, (factors, _) in solved.items()},
        targets,
        {name: layer for name, (_, layer) in solved.items()},
        init,
        stats.fingerprint if stats else fingerprint(model),
    )


Solved = dict[str, tuple[Factors, LayerReport]]


def solve_layers(
    model: nn.Module,
    targets: Mapping[str, Target],
    stats: ContextStats | None,
    init: CordaInit,
    *,
    spend: bool = False,
    energies: bool = False,
    progress: Progress = iter,
) -> Solved:
    """``build_factors`` for some layers of a model; the statistics may cover more.

    Args:
        model: the plain base model.
        targets: the layers.
        stats: statistics of these layers; None with ``power=0``.
        init: the settings.
        spend: True frees the statistics' memory layer by layer: they are empty afterwards.
        energies: True also reports output energies.
        progress: as for ``build_factors``.
    """
    groups = agreed(lambda: {name: stats.group(name) if stats else name for name in targets})
    if world_size() > 1:
        _check_equal(stats, dict(targets), init)
    owners = _owners(model, groups)
    if stats and spend:
        for group in [group for group in stats.moments if owners.get(group) != rank()]:
            del stats.moments[group]
        stats = stats.as_means()

    def solve() -> Solved:
        found: Solved = {}
        for group in progress([group for group, owner in owners.items() if owner == rank()]):
            members = {name: targets[name] for name in targets if groups[name] == group}
            found |= _solve_group(model, members, stats, init, energies=energies)
            if stats and spend:
                del stats.moments[group]
        return found

    solved = agreed(solve)
    if world_size() > 1:
        solved = _exchanged(model, solved, {name: owners[group] for name, group in groups.items()})
    return {name: solved[name] for name in targets}


def _solve_group(
    model: nn.Module, targets: Mapping[str, Target], stats: ContextStats | None, init: CordaInit, *, energies: bool
) -> Solved:
    """Solve the layers of one input."""
    solved = {}
    shared: Tensor | DampedCovariance | CrossMoment | None = None
    for name, target in targets.items():
        W = weight_of(model, name)
        try:
            if stats is not None and init.power and shared is None:
                shared = stats.moment(name)
                shared = DampedCovariance(shared, init.damping) if isinstance(shared, Tensor) else shared
            start = time.perf_counter()
            found = factorize(W, shared, target.rank, init, scaling=target.scaling)
            seconds = time.perf_counter() - start
            energy = output_energy(W, stats.moment(name), found.left) if stats and energies else None
        except UserError as error:
            raise type(error)(f"layer {name}: {error}") from error
        solved[name] = (
            found,
            LayerReport(
                shape=(W.shape[0], W.shape[1]),
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
                output_energy=energy,
            ),
        )
    return solved


def _check_equal(stats: ContextStats | None, targets: dict[str, Target], init: CordaInit) -> None:
    """Raise ``UserError`` on every rank unless all hold the same statistics."""
    held: list[Any] = [targets, init]
    if stats:
        held += [stats.fingerprint, stats.groups, stats.tokens, stats.samples, stats.traces]
        held.append({group: moment.diagonal().sum().item() for group, moment in stats.moments.items()})
    others: list[Any] = [None] * world_size()
    dist.all_gather_object(others, held)
    if any(other != held for other in others):
        raise UserError(
            "the ranks hold different statistics, layers or settings; add the statistics up by reduce() first"
        )


def _owners(model: nn.Module, groups: Mapping[str, str]) -> dict[str, int]:
    """Group -> the rank that solves it: the most expensive groups first, each to the rank with the least work so far."""
    if world_size() == 1:
        return dict.fromkeys(groups.values(), 0)
    costs: Counter[str] = Counter()
    for name, group in groups.items():
        m, n = shape_of(model.get_submodule(name), name)
        costs[group] += m * n * min(m, n) + n**3
    loads = [0] * world_size()
    owners = dict.fromkeys(groups.values(), 0)
    for group in sorted(owners, key=lambda group: -costs[group]):
        owners[group] = loads.index(min(loads))
        loads[owners[group]] += costs[group]
    return owners


def _exchanged(model: nn.Module, solved: Solved, owners: Mapping[str, int]) -> Solved:
    """What all ranks have solved, sent to each of them."""
    parts = {
        name: (dataclasses.replace(found, **dict.fromkeys(TENSORS, None)), found.A.dtype, layer)  # type: ignore[arg-type]
        for name, (found, layer) in solved.items()
    }
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, parts)
    everything: Solved = {}
    for name, owner in owners.items():
        found, dtype, layer = gathered[owner][name]
        (m, n), r = layer.shape, layer.rank
        module = model.get_submodule(name)
        device = next(itertools.chain(module.parameters(), module.buffers())).device
        tensors = {}
        for part, shape in zip(TENSORS, ((r, n), (m, r), (r,), (r,)), strict=True):
            own = getattr(solved[name][0], part) if owner == rank() else torch.empty(shape, dtype=dtype, device=device)
            tensors[part] = own.contiguous()
            dist.broadcast(tensors[part], owner)
        everything[name] = dataclasses.replace(found, **tensors), layer
    return everything


def output_energies(model: nn.Module, stats: ContextStats, factors: FactorSet) -> dict[str, float]:
    """Share of each layer's output energy that lies in the adapted directions.

        |U^T W X|^2 / |W X|^2    on the calibration text

    It takes a product W C per layer, which costs more than the randomized solver, so ``build_factors`` does not compute it.

    Args:
        model: the plain base model.
        stats: statistics of this model.
        factors: factors of this model.

    Raises:
        UserError: a layer without statistics.
        NonFiniteError: NaN or infinity in a weight or a covariance.
    """
    return {
        name: output_energy(weight_of(model, name), stats.moment(name), found.left)
        for name, found in factors.factors.items()
    }


def output_energy(weight: Tensor, covariance: Tensor | CrossMoment, left: Tensor) -> float:
    """|U^T W X|^2 / |W X|^2 = tr(U^T W C W^T U) / tr(W C W^T): the share of the output energy along U.

    Args:
        weight: W (m, n).
        covariance: C (n, n), undamped, or the cross moment W C.
        left: U (m, r), orthonormal.

    Raises:
        NonFiniteError: NaN or infinity in the weight or the covariance.
    """
    U = left.double()
    UWC = UW = torch.zeros((), dtype=torch.float64, device=U.device)
    whole = UW
    for start in range(0, len(weight), STRIP):  # of rows: no second copy of W, and none of W C
        rows = slice(start, start + STRIP)
        W = weight[rows].double()
        WC = covariance.product[rows].to(W) if isinstance(covariance, CrossMoment) else W @ covariance.to(W)
        UWC, UW, whole = UWC + U[rows].T @ WC, UW + U[rows].T @ W, whole + (WC * W).sum()
    if not torch.isfinite(whole):
        raise NonFiniteError("the weight or the covariance holds NaN or infinity")
    return float((UWC * UW).sum() / whole) if whole > 0 else 0.0
