"""From a trained adapter to a plain LoRA of the untouched base model, and the check of a start.

Shapes: m outputs, n inputs, rank r; A (r, n), B (m, r), with A0 and B0 what they started from; A' (q, n), B' (m, q).
"""

import copy
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda.anchor import AnchoredLinear
from corda.attach import ADAPTER, _save, lora_layers
from corda.context import Batch
from corda.factors import FactorSet
from tenfold import NonFiniteError, UserError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one layer.

    Attributes:
        rank: q of the saved A' and B'.
        norm: |s (B A - B0 A0)|_F, what training changed.
        discarded: Frobenius norm of the part of it that the saved adapter lacks; 0 without recompression.
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
        """Of the change in all layers together."""
        return math.hypot(*(layer.norm for layer in self.layers.values()))

    @property
    def discarded(self) -> float:
        """Of the parts left out in all layers together."""
        return math.hypot(*(layer.discarded for layer in self.layers.values()))


def to_lora(
    wrapped: "PeftModel",
    factors: FactorSet,
    folder: str | os.PathLike[str],
    rank: int | None = None,
    tol: float | None = None,
) -> ConversionReport:
    """Save what training changed as a plain LoRA for the untouched base model.

        A' = [A - A0; A],  B' = [B0, B - B0],  so that  B' A' = B A - B0 A0

    Nothing cancels: an untrained adapter gives exactly zero. ``rank`` or ``tol`` recompress the 2r rows of A':
    with A'^T = Q_A R_A, B' = Q_B R_B and R_B R_A^T = U S V^T (2r x 2r), the best B' A' of rank q is
    (Q_B U_q S_q^1/2) (S_q^1/2 V_q^T Q_A^T), and |(S_q+1, ...)| is what it lacks. O((m + n) r^2), in fp64.

    Args:
        wrapped: the trained model of ``apply_corda`` or ``apply_anchor`` with these factors.
        factors: what it started from.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``, each whole or not at all, for
            ``PeftModel.from_pretrained(untouched, folder)``.
        rank: q, or as many as a layer has where that is less.
        tol: the smallest q of each layer (at least 1) whose discarded norm is at most ``tol`` times that of the change.

    Raises:
        UserError: both ``rank`` and ``tol``, a value out of range, factors that the model was not started from, or
            trained parts that a plain LoRA of these layers cannot hold (biases, DoRA, ``modules_to_save``).

    Source: the identity is ours; peft's own conversion stacks [A; A0] and [B, -B0], two large products that cancel.
    """
    if rank is not None and tol is not None:
        raise UserError("give either rank or tol, not both")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    if tol is not None and not 0 <= tol < 1:
        raise UserError(f"tol must be at least 0 and below 1, got {tol}")
    layers = lora_layers(wrapped)
    if set(layers) != set(factors.factors):
        raise UserError("the model's adapted layers are not those of the factors")
    _check_only_factors_trained(wrapped)
    tensors, report, scalings = {}, {}, {}
    for name, layer in layers.items():
        A, B = _change(name, layer, factors)
        left, singular, right = _thin_svd(A, B)
        kept = len(A)
        if rank is not None:
            kept = min(rank, len(singular))
        if tol is not None:
            kept = _smallest_rank(singular, tol)
        if kept < len(A):
            root = singular[:kept].sqrt()
            A, B = (root[:, None] * right[:kept]).to(A), (left[:, :kept] * root).to(B)
        scaling = scalings[name] = layer.scaling[ADAPTER]
        norm, discarded = (scaling * part.norm().item() for part in (singular, singular[kept:]))
        report[name] = ConvertedLayer(kept, norm, discarded)
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = A, B
    config: Any = copy.deepcopy(wrapped.peft_config[ADAPTER])
    _set_ranks(config, {name: layer.rank for name, layer in report.items()}, scalings)
    _save(config, tensors, folder)
    return ConversionReport(report)


def _check_only_factors_trained(wrapped: "PeftModel") -> None:
    config: Any = wrapped.peft_config[ADAPTER]
    others = {
        "modules_to_save": bool(config.modules_to_save),
        "trainable_token_indices": bool(config.trainable_token_indices),
        "bias": config.bias != "none",
        "lora_bias": config.lora_bias,
        "use_dora": config.use_dora,
    }
    found = [name for name, used in others.items() if used]
    if found:
        raise UserError(f"cannot convert an adapter with {', '.join(found)}: only A and B of its layers are written")


def _change(name: str, layer: Any, factors: FactorSet) -> tuple[Tensor, Tensor]:
    """A' (2r, n) and B' (m, 2r) of one layer, whatever way it is attached."""
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    A0, B0 = factors.factors[name].A.to(down.weight), factors.factors[name].B.to(up.weight)
    if A0.shape != down.weight.shape or B0.shape != up.weight.shape:
        raise UserError(f"layer {name} has another shape or rank than its factors")
    if not isinstance(layer, AnchoredLinear):
        A, B = down.weight.detach(), up.weight.detach()
        return torch.cat([A - A0, A]), torch.cat([B0, B - B0], dim=1)
    if not (torch.equal(A0, down.anchor) and torch.equal(B0, up.anchor)):
        raise UserError(f"layer {name} is anchored at other factors")
    D_A, D_B = down.weight.detach(), up.weight.detach()
    return torch.cat([D_A, A0 + D_A]), torch.cat([B0, D_B], dim=1)


def _thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B A = left @ diag(singular) @ right in fp64, through the small core; k = min(m, n, rows of A) components."""
    Q_A, R_A = torch.linalg.qr(A.double().T)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, singular, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, singular, Vh @ Q_A.T


def _smallest_rank(singular: Tensor, tol: float) -> int:
    """The least q >= 1 with |singular[q:]| <= tol |singular|."""
    tails = singular.flip(0).square().cumsum(0).flip(0).sqrt()  # tails[q] = |singular[q:]|
    return max(1, int((tails > tol * tails[0]).sum()))


def _set_ranks(config: Any, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> None:
    """Ranks as given and each layer's scaling as it was: alpha = s q, or s sqrt(q) with rsLoRA.

    Patterns name a layer in full: peft takes the first that matches the end of a name, hence the anchor.
    """
    alphas = {name: _whole(scalings[name] * (math.sqrt(q) if config.use_rslora else q)) for name, q in ranks.items()}
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(name)}": q for name, q in ranks.items() if q != config.r}
    config.alpha_pattern = {f"^{re.escape(name)}": a for name, a in alphas.items() if a != config.lora_alpha}


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha  # JSON then says 16, as people do


@dataclass(frozen=True)
class InitReport:
    """How far a model starts from its base, over all tokens that are not padding.

    Attributes:
        max_difference: largest absolute difference of logits.
        mean_difference: mean absolute difference of logits.
        kl: mean over tokens of KL(base || wrapped) of the softmax over the last dimension, in nats.
    """

    max_difference: float
    mean_difference: float
    kl: float


def verify_init(base: nn.Module, wrapped: nn.Module, batch: Batch) -> InitReport:
    """Compare the logits of an untouched base model and of the model that was just initialised.

    Both are run in evaluation mode and left in the mode that they were in.

    Args:
        base: the base model as it was (a copy from before ``apply_corda``, which changes the weights).
        wrapped: the initialised model.
        batch: keyword arguments of the models, or one tensor; tokens with ``attention_mask`` 0 do not count.

    Shapes: logits (..., classes), in ``output.logits`` or the output itself.

    Raises:
        UserError: ``base`` is the model inside ``wrapped``, or the logits differ in shape.
        NonFiniteError: NaN or infinity in the logits.
    """
    if any(module is base for module in wrapped.modules()):
        raise UserError("the base model is a part of the initialised one; give an untouched copy")
    before, after = _logits(base, batch), _logits(wrapped, batch)
    if before.shape != after.shape:
        raise UserError(
            f"the base model's logits are {tuple(before.shape)}, the initialised one's {tuple(after.shape)}"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None:
        before, after = before[mask.bool()], after[mask.bool()]
    for whose, logits in (("base", before), ("initialised", after)):
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"the {whose} model's logits hold NaN or infinity")
    difference = (after - before).abs()
    divergence = F.kl_div(F.log_softmax(after, -1), F.log_softmax(before, -1), reduction="none", log_target=True)
    return InitReport(difference.max().item(), difference.mean().item(), divergence.sum(-1).mean().item())


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    with _evaluating(model), torch.no_grad():
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits: Tensor = getattr(output, "logits", output)
    return logits.double()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
