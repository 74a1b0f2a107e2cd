"""CorDA++: which calibration sample each layer's covariance comes from, and how many ranks each layer gets. Experimental.

Experimental because its equations are second-hand: of the paper (Yang et al., "Dynamic Context-oriented Decomposition for
Task-aware Low-rank Adaptation with Less Forgetting and Faster Convergence", arXiv 2506.13187) only the abstract and
summaries were read; Eq. 7 to 10 follow an independent transcription, and neither its pool size nor its tables are known.

From the paper: compactness pi, the selection score, the allocation score, the greedy loop and its two stopping rules. Ours:
the damping and normalization of C before pi, the pooled sum as candidate 0, the choice by group, ties, at least rank 1 for
every layer, the loop as one sort, and the allocations by energy and uniform.

Symbols as in ``corda.solvers``: W (m, n), C (n, n), C_d = C + lambda I, M = W C_d^p, k = min(m, n), sigma_1 >= ... >= sigma_k
the singular values of M.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from corda.config import MODES, CordaInit
from corda.context import ContextStats
from corda.moments import DampedCovariance
from corda.spectra import as_damped, extreme_eigenvalues, pi_of, spectrum
from corda.targets import check_same_layers, resolve_targets, weight_of
from tenfold import NonFiniteError, UserError
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig

Mode = Literal["kpm", "ipm"]
Per = Literal["layer", "group"]
T = TypeVar("T")
TIE = 1e-9
"""Selection scores that differ by no more than this, or this share, are a tie: eigenvalues of c I carry c's rounding."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which candidate each layer takes. Experimental.

    Attributes:
        indices: layer -> index of its candidate.
        scores: layer -> score of every candidate; the lowest one wins (by group: the lowest sum over its layers).
        compactness: layer -> pi of the candidate that it takes.
    """

    indices: dict[str, int]
    scores: dict[str, list[float]]
    compactness: dict[str, float]


def select_covariances(
    weights: Mapping[str, Tensor],
    candidates: Mapping[str, Sequence[Tensor | DampedCovariance]],
    *,
    groups: Mapping[str, str] | None = None,
    per: Per = "layer",
    power: float = 1.0,
    damping: float = CordaInit.damping,
) -> Selection:
    """Dynamic covariance selection: each layer takes the candidate with the lowest score. Experimental.

        score(C_i) = log pi(C_i) * sum_j sigma_j / sigma_1,      sigma of W C_i^p                                 (Eq. 7, 8)

    The two factors pull against each other. The second one, nuclear over spectral norm, is between 1 and k and falls as W C
    concentrates on few directions; log pi rises as the eigenvalues of C spread, but only as a logarithm. So of two candidates
    with the same pi, the one that concentrates W C more wins, and of two that both leave directions unused (where damping
    sets sigma_min), the one that uses fewer. But the score is not monotone: for W = I and n = 16, eigenvalues from 0.5 to 1.5
    score 24 and lose against equal ones, which score 22; powers of 0.3 score 10.

    From the paper: the score, its minimum, each layer by itself. Ours: damped and normalized C (see ``compactness``), ties
    (within ``TIE``) to the lower index, and ``per="group"``, the lowest sum of scores over the layers of one input.

    Args:
        weights: layer -> W (m, n).
        candidates: layer -> its covariances (n, n); layers of one input may share the objects, which saves time.
        groups: layer -> group; needed by ``per="group"``.
        per: "layer" chooses for each layer, "group" for all layers of a group together.
        power: p; the paper's is 1.
        damping: delta for plain covariances.

    Raises:
        UserError: layers differ between the arguments, a layer has no candidate, layers of one group differ in the number of
            candidates, or a weight is zero (with the layer's name).
        NonFiniteError: NaN or infinity, with the layer's name.

    Source: arXiv 2506.13187, second-hand.
    """
    if per not in ("layer", "group"):
        raise UserError(f"unknown per '{per}': {did_you_mean(str(per), ('layer', 'group'))}")
    if per == "group":
        if groups is None:
            raise UserError("choosing per group needs the groups")
        check_same_layers("weights", weights, "groups", groups)
    check_same_layers("weights", weights, "candidates", candidates)
    known: dict[int, tuple[DampedCovariance, tuple[float, float]]] = {}
    pis: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for name, weight in weights.items():
        if not candidates[name]:
            raise UserError(f"layer {name}: no candidate covariance")
        pis[name], scores[name] = [], []
        for candidate in candidates[name]:
            try:
                if id(candidate) not in known:
                    context = as_damped(candidate, damping)
                    known[id(candidate)] = context, extreme_eigenvalues(context)
                context, extremes = known[id(candidate)]
                sigma = spectrum(weight, context, power)
                if not sigma[0] > 0:
                    raise UserError("its weight is zero")
            except UserError as error:
                raise type(error)(f"layer {name}: {error}") from error
            pis[name].append(pi_of(extremes, weight.shape[0]))
            scores[name].append(math.log(pis[name][-1]) * (sigma.sum() / sigma[0]).item())
    indices = {}
    for name in weights:
        if per == "group":
            assert groups is not None
            members = [scores[other] for other in weights if groups[other] == groups[name]]
            if len({len(values) for values in members}) > 1:
                raise UserError(f"layer {name}: layers of its group have other numbers of candidates")
            indices[name] = _least([sum(values) for values in zip(*members, strict=True)])
        else:
            indices[name] = _least(scores[name])
    return Selection(indices, scores, {name: pis[name][index] for name, index in indices.items()})


def _least(scores: Sequence[float]) -> int:
    """Index of the lowest score; the first one of a tie."""
    best = min(scores)
    return next(i for i, score in enumerate(scores) if math.isclose(score, best, rel_tol=TIE, abs_tol=TIE))


@dataclasses.dataclass(frozen=True)
class ContextSelection:
    """Statistics in which each layer's covariance is that of its candidate. Experimental.

    Attributes:
        stats: statistics like any other: ``build_factors(model, selection.stats, ...)``.
        selection: indices and scores; index 0 is the pooled sum, i the i-th candidate counted from 1.
    """

    stats: ContextStats
    selection: Selection


def select_context(
    model: nn.Module,
    lora_config: "LoraConfig",
    candidates: Sequence[ContextStats],
    init: CordaInit | None = None,
    *,
    per: Per = "layer",
) -> ContextSelection:
    """``select_covariances`` for all layers that ``lora_config`` targets. Experimental.

    Args:
        model: the plain base model; stays untouched.
        lora_config: its targets are used, not its ranks.
        candidates: at least two, from ``collect_context`` on separate parts of the data. Their sum is candidate 0 (ours),
            so that a layer for which no part is better than the whole keeps the whole. The paper's number is unknown; ours
            is 4, for 256 windows in all.
        init: ``power`` and ``damping`` are used; default ``CordaInit()``.
        per: "layer", or "group": layers of one input then keep one covariance, and later share the work on it.

    Raises:
        UserError: fewer than two candidates, candidates of another model or of different layers or scales, ``power=0``,
            which has no covariance, or as for ``select_covariances``.
    """
    init = init or CordaInit()
    if init.power == 0:
        raise UserError("power 0 has no covariance to choose")
    if len(candidates) < 2:
        raise UserError(f"expected at least two candidates to choose from, got {len(candidates)}")
    targets = list(resolve_targets(model, lora_config))
    pooled = reduce(add, candidates)  # its layers share a sum where they do in all candidates
    pooled.check_model(model)
    pool = [pooled, *candidates]
    leaders = dict.fromkeys([pooled.group(name) for name in targets])
    found = Selection({}, {}, {})
    for leader in leaders:  # one group's matrices at a time
        members = [name for name in targets if pooled.groups[name] == leader]
        weights = {name: weight_of(model, name) for name in members}
        shared = [DampedCovariance(stats.covariance(leader), init.damping) for stats in pool]
        part = select_covariances(
            weights,
            dict.fromkeys(members, shared),
            groups=dict.fromkeys(members, leader),
            per=per,
            power=init.power,
        )
        found.indices.update(part.indices)
        found.scores.update(part.scores)
        found.compactness.update(part.compactness)
    selection = Selection(
        _ordered(found.indices, targets), _ordered(found.scores, targets), _ordered(found.compactness, targets)
    )
    return ContextSelection(_merged(pool, pooled.groups, selection.indices), selection)


def _merged(pool: Sequence[ContextStats], groups: Mapping[str, str], indices: Mapping[str, int]) -> ContextStats:
    """Statistics that hold the sums of each layer's candidate; layers of one input and one candidate share them."""
    leaders: dict[tuple[str, int], str] = {}
    for name, index in indices.items():
        leaders.setdefault((groups[name], index), name)
    sources = {name: (pool[index], pool[index].group(name)) for (_, index), name in leaders.items()}
    return dataclasses.replace(
        pool[0],
        moments={name: stats.moments[group] for name, (stats, group) in sources.items()},
        tokens={name: stats.tokens[group] for name, (stats, group) in sources.items()},
        samples={name: stats.samples[group] for name, (stats, group) in sources.items()},
        groups={name: leaders[groups[name], index] for name, index in indices.items()},
    )


def _ordered(by_layer: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    return {name: by_layer[name] for name in names}


def uniform_budget(shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Parameters of adapters that all have rank R: sum (m + n) R.

    Raises:
        UserError: no layer, or a rank that a layer cannot have.
    """
    _check_rank(shapes, rank)
    return rank * _per_rank(shapes)


def _per_rank(shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(m + n for m, n in shapes.values())


def _check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    if not shapes:
        raise UserError("no layer to give ranks to")
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if not 1 <= rank <= min(shape):
        raise UserError(f"rank {rank} for all layers: expected 1 to {min(shape)}, the size of layer {name}")


def allocate_uniform(shapes: Mapping[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """The same rank for every layer, the largest that the budget allows: floor(budget / sum (m + n)).

    Raises:
        UserError: the budget is too small for rank 1, or gives a rank that the smallest layer cannot have.
    """
    rank = budget // max(1, _per_rank(shapes))
    try:
        _check_rank(shapes, rank)
    except UserError as error:
        raise UserError(f"budget {budget} gives {error}") from error
    return dict.fromkeys(shapes, rank)


def allocate_ranks(
    spectra: Mapping[str, Tensor],
    pis: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    mode: Mode,
) -> dict[str, int]:
    """Dynamic rank allocation: ranks by layer under one budget of parameters for all. Experimental.

        rho_l = 1 at first;  score_l = log pi_l * sigma_(k - rho_l + 1) / sum_(j = 1 .. k - rho_l) sigma_j        (Eq. 9, 10)
        repeatedly:  rho_l += 1 for the layer with the lowest score
        kpm:  rank rho_l,      until sum (m + n) rho_l > budget         (above it by at most one step)
        ipm:  rank k - rho_l,  until sum (m + n) (k - rho_l) < budget   (below it by at most one step)

    So kpm gives larger adapters to layers whose spectrum is concentrated, and ipm smaller ones. Since pi >= 1, the scores of
    a layer ascend with rho, and the loop is one stable sort of the scores of all layers. Where the budget is met exactly,
    the loop takes one more step, as the stopping rules say.

    From the paper: scores, loop and stopping rules. Ours: of equal scores, the earlier layer; in ipm, every layer keeps at
    least rank 1, since peft has no rank 0 (kpm starts there anyway). Null directions of a rank-deficient weight count as its
    smallest components, as in the paper; ``factorize`` leaves them out by default, and raises an error where too few
    directions are left for the rank.

    Args:
        spectra: layer -> sigma (k,), descending, k = min(m, n). Their order settles ties.
        pis: layer -> compactness of its normalized covariance.
        shapes: layer -> (m, n).
        budget: parameters of all adapters, such as ``uniform_budget(shapes, 128)``.
        mode: kpm or ipm.

    Returns:
        Layer -> rank, in the order of ``spectra``.

    Raises:
        UserError: a budget that no ranks cross, layers or sizes that do not match, or a value out of its range.
        NonFiniteError: NaN or infinity in a spectrum or a compactness.

    Source: arXiv 2506.13187, second-hand.
    """
    check_same_layers("spectra", spectra, "pis", pis)
    values = _checked_components(spectra, shapes, "singular values")
    scores = []
    for (name, sigma), pi in zip(values.items(), (pis[name] for name in values), strict=True):
        if not math.isfinite(pi):
            raise NonFiniteError(f"layer {name}: its compactness is NaN or infinity")
        if pi < 1:
            raise UserError(f"layer {name}: compactness {pi:.3g}, expected 1 or more, as of a normalized covariance")
        if (sigma.diff() > 0).any():
            raise UserError(f"layer {name}: its singular values do not descend")
        scores.append(math.log(pi) * sigma.flip(0)[:-1] / sigma.cumsum(0).flip(0)[1:])
    return _allocate(scores, shapes, list(values), budget, mode)


def allocate_by_energy(
    energies: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int, mode: Mode
) -> dict[str, int]:
    """``allocate_ranks`` with each component's exact share of its layer's output energy for its score. Experimental.

        score_l = e_(k - rho_l + 1) / sum_(j = 1 .. k) e_j

    Ours, since the paper's bound exceeds the true change by orders of magnitude. Components leave a layer in the order of
    their singular values, the order in which ``factorize`` adapts them, even where their energies do not ascend.

    Args:
        energies: layer -> its ``component_energies`` (k,).
        shapes: as for ``allocate_ranks``.
        budget: as for ``allocate_ranks``.
        mode: as for ``allocate_ranks``.

    Returns:
        Layer -> rank, in the order of ``energies``.

    Raises:
        UserError: as for ``allocate_ranks``.
        NonFiniteError: NaN or infinity in an energy.
    """
    values = _checked_components(energies, shapes, "energies")
    scores = [e.flip(0)[:-1] / e.sum() for e in values.values()]
    return _allocate(scores, shapes, list(values), budget, mode)


def _checked_components(
    components: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], what: str
) -> dict[str, Tensor]:
    """Values of the components of all layers, checked, in fp64 on the CPU."""
    if not components:
        raise UserError("no layer to give ranks to")
    check_same_layers(what, components, "shapes", shapes)
    checked = {name: part.detach().to("cpu", torch.float64) for name, part in components.items()}
    for name, part in checked.items():
        if part.shape != (min(shapes[name]),):
            raise UserError(
                f"layer {name}: {what} of shape {tuple(part.shape)}, expected ({min(shapes[name])},)"
                f" of a {shapes[name][0]} x {shapes[name][1]} layer"
            )
        if not torch.isfinite(part).all():
            raise NonFiniteError(f"layer {name}: its {what} hold NaN or infinity")
        if (part < 0).any() or not (part > 0).any():
            raise UserError(f"layer {name}: its {what} must be 0 or more, and not all 0")
    return checked


def _allocate(
    scores: Sequence[Tensor], shapes: Mapping[str, tuple[int, int]], names: Sequence[str], budget: int, mode: Mode
) -> dict[str, int]:
    """Ranks after the greedy loop, from the scores (k - 1,) of every layer's steps rho -> rho + 1.

    Repeatedly taking the lowest head of several queues is a stable sort by each queue's running maximum: what stands
    behind a larger score leaves right after it. For ascending scores the running maximum is the scores themselves.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}': {did_you_mean(str(mode), MODES)}")
    sizes = torch.tensor([min(shapes[name]) for name in names])
    costs = torch.tensor([sum(shapes[name]) for name in names])
    if mode == "ipm":
        if (sizes < 2).any():
            raise UserError(f"layer {names[int(sizes.argmin())]} has one component only: mode ipm leaves it no rank")
        scores = [part[:-1] for part in scores]
    steps = torch.tensor([len(part) for part in scores])
    start = int((costs * (sizes - 1 if mode == "ipm" else 1)).sum())
    room = int((costs * steps).sum())
    low, high = (start, start + room - 1) if mode == "kpm" else (start - room + 1, start)
    if not low <= budget <= high:
        what = "small" if budget < low else "large"
        raise UserError(
            f"budget {budget} is too {what} for {len(names)} layers in mode {mode}: expected {low} to {high} parameters"
        )
    peaks = torch.cat([part.cummax(0).values if len(part) else part for part in scores])
    order = peaks.argsort(stable=True)
    layers = torch.arange(len(names)).repeat_interleave(steps)[order]
    spent = costs[layers].cumsum(0)
    taken = int(torch.searchsorted(spent, abs(budget - start), right=True)) + 1
    filtered = 1 + layers[:taken].bincount(minlength=len(names))
    ranks = filtered if mode == "kpm" else sizes - filtered
    return dict(zip(names, ranks.tolist(), strict=True))
