"""From a trained adapter to a plain LoRA of the untouched base model.

Shapes: m outputs, n inputs, rank r; A (r, n), B (m, r), with A0 and B0 what they started from; A' (q, n), B' (m, q).
"""

import copy
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corda.adapters import ADAPTER, PREFIX, adapter_state, lora_layers, read_folder, save_adapter
from corda.anchor import AnchoredLinear, is_anchored
from corda.factors import FactorSet
from tenfold import UserError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one layer.

    Attributes:
        rank: q of the saved A' and B'.
        norm: |s (B A - B0 A0)|_F, the size of what training changed.
        discarded: Frobenius norm of the part that the saved adapter lacks; 0 without recompression.
    """

    rank: int
    norm: float
    discarded: float


@dataclass(frozen=True)
class ConversionReport:
    """What ``to_lora`` wrote, layer by layer."""

    layers: dict[str, ConvertedLayer]

    @property
    def norm(self) -> float:
        """Frobenius norm of the change in all layers together."""
        return math.hypot(*(layer.norm for layer in self.layers.values()))

    @property
    def discarded(self) -> float:
        """Frobenius norm of the discarded parts of all layers together."""
        return math.hypot(*(layer.discarded for layer in self.layers.values()))


def to_lora(
    wrapped: "PeftModel",
    factors: FactorSet | None,
    folder: str | os.PathLike[str],
    rank: int | None = None,
    tol: float | None = None,
) -> ConversionReport:
    """Save what training changed as a plain LoRA for the untouched base model.

        A' = [A - A0; A],  B' = [B0, B - B0],  so that  B' A' = B A - B0 A0

    Nothing cancels: an untrained adapter gives exactly zero. ``rank`` or ``tol`` recompresses the 2r rows of A':
    with A'^T = Q_A R_A, B' = Q_B R_B and R_B R_A^T = U S V^T (2r x 2r), the best B' A' of rank q is
    (Q_B U_q S_q^1/2) (S_q^1/2 V_q^T Q_A^T), and it lacks |(S_q+1, ...)|. Cost O((m + n) r^2), in fp64.

    Args:
        wrapped: the trained model of ``apply_corda`` or ``apply_anchor`` with these factors.
        factors: what it started from; None for an anchored model, which holds its start.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``, each whole or not at all, for
            ``PeftModel.from_pretrained(untouched, folder)``. Whatever else peft saves with an adapter (trained biases,
            ``modules_to_save``, ``trainable_token_indices``) is copied as it is.
        rank: q, or all components of a layer that has fewer.
        tol: for each layer, the smallest q (at least 1) whose discarded norm is at most ``tol`` times that of the change.

    Returns:
        What was kept of each layer.

    Raises:
        UserError: both ``rank`` and ``tol``, a value out of range, factors that the model was not started from, or a
            variant of LoRA (DoRA ...), whose change is not of low rank.

    Source: the identity is ours; peft's own conversion stacks [A; A0] and [B, -B0], two large products that cancel.
    """
    _check_size(rank, tol)
    layers = lora_layers(wrapped)
    if factors is None and not all(isinstance(layer, AnchoredLinear) for layer in layers.values()):
        raise UserError("a model that is not anchored needs the factors that it was started from")
    if factors is not None and set(layers) != set(factors.factors):
        raise UserError("the model's adapted layers are not those of the factors")
    config: Any = copy.deepcopy(wrapped.peft_config[ADAPTER])
    for name, layer in layers.items():
        if ADAPTER in layer.lora_variant:
            variant = type(layer.lora_variant[ADAPTER]).__name__
            raise UserError(f"cannot convert layer {name}, a {variant}: a plain LoRA cannot hold what it has learned")
    changes = ((name, *change_of(name, layer, factors), layer.scaling[ADAPTER]) for name, layer in layers.items())
    written = {f"{PREFIX}{name}.lora_{x}.{part}" for name in layers for x in "AB" for part in ("weight", "anchor")}
    others = {key: tensor for key, tensor in adapter_state(wrapped).items() if key not in written}
    return _save_changes(changes, config, folder, rank, tol, others)


def convert_adapter(
    trained: str | os.PathLike[str],
    initial: "str | os.PathLike[str] | FactorSet | None",
    folder: str | os.PathLike[str],
    rank: int | None = None,
    tol: float | None = None,
    base: str | None = None,
) -> ConversionReport:
    """``to_lora`` from folders: no model is loaded, the adapters are enough.

    Args:
        trained: folder of the trained adapter, as ``save_pretrained`` writes it.
        initial: folder of the adapter that it started from (``save_initial``), or the factors; may be None for an
            anchored adapter, which holds its start.
        folder: as for ``to_lora``.
        rank: as for ``to_lora``.
        tol: as for ``to_lora``.
        base: name of the untouched base model, for the written configuration; default: as in the trained adapter.

    Returns:
        What was kept of each layer.

    Raises:
        UserError: a folder without an adapter, adapters of other layers, shapes or scalings, or as for ``to_lora``.
    """
    _check_size(rank, tol)
    config, layers, scalings, others = read_adapter(trained)
    anchored = is_anchored(config)
    if initial is None and not anchored:
        raise UserError(f"the adapter in {trained} is not anchored: give what it started from")
    own = {name: _start_of(parts) for name, parts in layers.items()}
    starts, expected = own, scalings
    if isinstance(initial, FactorSet):
        starts = {name: (found.A, found.B) for name, found in initial.factors.items()}
        expected = {name: target.scaling for name, target in initial.targets.items()}
    elif initial is not None:
        _, tensors, expected, _ = read_adapter(initial)
        starts = {name: _start_of(parts) for name, parts in tensors.items()}
    wrong = f"{trained} was not started from {initial}"
    if set(starts) != set(layers):
        raise UserError(f"{wrong}: one of them has no layer {min(set(starts) ^ set(layers))}")
    for name, (A0, B0) in starts.items():
        A, B = own[name]
        if A0.shape != A.shape or B0.shape != B.shape or not math.isclose(expected[name], scalings[name]):
            raise UserError(f"{wrong}: layer {name} has another size or scaling")
        if anchored and not (torch.equal(A0.to(A), A) and torch.equal(B0.to(B), B)):
            raise UserError(f"{wrong}: layer {name} is anchored elsewhere")

    def changes() -> Iterator[tuple[str, Tensor, Tensor, float]]:
        for name, parts in layers.items():
            start = own[name] if anchored else starts[name]
            yield name, *_change(parts["lora_A.weight"], parts["lora_B.weight"], *start, anchored), scalings[name]

    if base is not None:
        config.base_model_name_or_path = base
    return _save_changes(changes(), config, folder, rank, tol, others)


def read_adapter(
    folder: str | os.PathLike[str],
) -> tuple[Any, dict[str, dict[str, Tensor]], dict[str, float], dict[str, Tensor]]:
    """Read a LoRA folder: peft's configuration, layer -> A and B (and anchors), layer -> scaling, other tensors.

    Raises:
        UserError: no adapter there, or one that is not a LoRA of linear layers.
    """
    from peft.utils.other import get_pattern_key

    config, tensors = read_folder(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key in sorted(tensors, key=lambda key: [int(part) if part.isdigit() else -1 for part in key.split(".")]):
        tensor = tensors[key]
        name, dot, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not dot or part == "B.bias":
            others[key] = tensor
        elif part in ("A.weight", "B.weight", "A.anchor", "B.anchor") and tensor.ndim == 2:
            layers.setdefault(name, {})["lora_" + part] = tensor
        else:
            raise UserError(f"{folder}: {key} belongs to no plain LoRA of a linear layer")
    scalings = {}
    for name, parts in layers.items():
        if not {"lora_A.weight", "lora_B.weight"} <= set(parts):
            raise UserError(f"{folder}: layer {name} lacks its A or B")
        rank = len(parts["lora_A.weight"])
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        scalings[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return config, layers, scalings, others


def _start_of(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A0 and B0 of a layer that was saved at its start, or of an anchored one saved at any time."""
    A, B = (parts.get(f"lora_{x}.anchor", parts[f"lora_{x}.weight"]) for x in "AB")
    return A, B


def _check_size(rank: int | None, tol: float | None) -> None:
    if rank is not None and tol is not None:
        raise UserError("give either rank or tol, not both")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    if tol is not None and not 0 <= tol < 1:
        raise UserError(f"tol must be at least 0 and below 1, got {tol}")


def _save_changes(
    changes: Iterable[tuple[str, Tensor, Tensor, float]],
    config: Any,
    folder: str | os.PathLike[str],
    rank: int | None,
    tol: float | None,
    others: Mapping[str, Tensor],
) -> ConversionReport:
    """Save A' and B' of each layer, given as (name, A', B', scaling) and recompressed on request, and other tensors."""
    tensors, report, scalings = dict(others), {}, {}
    for name, A, B, scaling in changes:
        left, singular, right = _thin_svd(A, B)
        kept = len(A)
        if rank is not None:
            kept = min(rank, len(singular))
        if tol is not None:
            kept = _smallest_rank(singular, tol)
        if kept < len(A):
            root = singular[:kept].sqrt()
            A, B = (root[:, None] * right[:kept]).to(A), (left[:, :kept] * root).to(B)
        scalings[name] = scaling
        norm, discarded = (scaling * part.norm().item() for part in (singular, singular[kept:]))
        report[name] = ConvertedLayer(kept, norm, discarded)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
    set_ranks(config, {name: layer.rank for name, layer in report.items()}, scalings)
    save_adapter(config, tensors, folder)
    return ConversionReport(report)


def change_of(name: str, layer: Any, factors: FactorSet | None) -> tuple[Tensor, Tensor]:
    """A' (2r, n) and B' (m, 2r) of one layer, whatever way it is attached.

    Args:
        name: of the layer, for messages.
        layer: the LoRA layer of the wrapped model.
        factors: what it started from; None for an anchored layer, which holds its start.

    Raises:
        UserError: the layer has another shape than its factors, or is anchored at others.
    """
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    anchored = isinstance(layer, AnchoredLinear)
    A0, B0 = (down.anchor, up.anchor) if anchored else (factors.factors[name].A, factors.factors[name].B)  # type: ignore[union-attr]
    given = (A0, B0) if factors is None else (factors.factors[name].A, factors.factors[name].B)
    if given[0].shape != down.weight.shape or given[1].shape != up.weight.shape:
        raise UserError(f"layer {name} has another shape or rank than its factors")
    if anchored and factors is not None:
        found = factors.factors[name]
        if not (torch.equal(found.A.to(A0), A0) and torch.equal(found.B.to(B0), B0)):
            raise UserError(f"layer {name} is anchored at other factors")
    return _change(down.weight.detach(), up.weight.detach(), A0, B0, anchored)


def _change(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, anchored: bool) -> tuple[Tensor, Tensor]:
    """A' and B', in at least fp32: an adapter that was cast to bf16 differs from its start by less than bf16 can say.

    Args:
        A: A, or D_A of an anchored layer.
        B: B, or D_B.
        A0: what A started from, unrounded.
        B0: what B started from.
        anchored: whether A and B are changes.
    """
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in (A, B, A0, B0)), torch.float32)
    A, B, A0, B0 = (part.to(A.device, dtype) for part in (A, B, A0, B0))
    D_A, D_B, A = (A, B, A0 + A) if anchored else (A - A0, B - B0, A)
    return torch.cat([D_A, A]), torch.cat([B0, D_B], dim=1)


def _thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B A = left @ diag(singular) @ right in fp64, through the small core, with k = min(m, n, rows of A) components."""
    Q_A, R_A = torch.linalg.qr(A.double().T)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, singular, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, singular, Vh @ Q_A.T


def _smallest_rank(singular: Tensor, tol: float) -> int:
    """The least q >= 1 with |singular[q:]| <= tol |singular|."""
    tails = singular.flip(0).square().cumsum(0).flip(0).sqrt()  # tails[q] = |singular[q:]|
    return max(1, int((tails > tol * tails[0]).sum()))


def set_ranks(config: Any, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> None:
    """Set the given ranks and keep each layer's scaling: alpha = s q, or s sqrt(q) with rsLoRA.

    Patterns name a layer in full and are anchored by ``^``, since peft takes the first that matches the end of a name.
    """
    alphas = {name: _whole(scalings[name] * (math.sqrt(q) if config.use_rslora else q)) for name, q in ranks.items()}
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(name)}": q for name, q in ranks.items() if q != config.r}
    config.alpha_pattern = {f"^{re.escape(name)}": a for name, a in alphas.items() if a != config.lora_alpha}


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha  # JSON then says 16, as people do
