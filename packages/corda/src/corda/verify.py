"""Whether an adapted model starts at its base model: logits and weights of both, compared."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda.adapters import ADAPTER, lora_layers
from corda.batches import Batch
from corda.config import Attach
from corda.convert import change_of
from corda.targets import UnsupportedLayerError, layer_weight, weight_of
from tenfold import NonFiniteError, UserError
from tenfold.modules import evaluating


@dataclass(frozen=True)
class LayerStart:
    """How far one layer's effective weight starts from W of the base; found without a forward pass.

    Attributes:
        attach: residual (effective is W' + s B A) or anchor (W + s (B A - B0 A0)).
        units: the largest entry of |W - effective|, in units of the last place of W or W', whichever is larger. The
            rounding of W' to its dtype makes half a unit; in fp64, where the check itself rounds, up to 2.
    """

    attach: Attach
    units: float

    @property
    def holds(self) -> bool:
        """Whether the layer starts at the base's weight: exactly if anchored, else up to rounding."""
        return self.units <= (0 if self.attach == "anchor" else 2)


@dataclass(frozen=True)
class InitReport:
    """How far a model starts from its base, over all tokens that are not padding.

    Attributes:
        max_difference: largest absolute difference of logits.
        mean_difference: mean absolute difference of logits.
        kl: mean over tokens of KL(base || wrapped) of the softmax over the last dimension, in nats.
        layers: layer -> how far its weight is; quantized layers that cannot be dequantized are missing.
    """

    max_difference: float
    mean_difference: float
    kl: float
    layers: dict[str, LayerStart] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """Names of the layers that do not start at the base's weights."""
        return [name for name, layer in self.layers.items() if not layer.holds]


def verify_init(base: nn.Module, wrapped: nn.Module, batch: Batch) -> InitReport:
    """Compare the logits and the layers' weights of an untouched base model and of the model that was just initialized.

    Both run in evaluation mode and are then put back into their own modes.

    Args:
        base: the untouched base model (a copy from before ``apply_corda``, which changes the weights).
        wrapped: the initialized model.
        batch: keyword arguments of the models, or one tensor; tokens with ``attention_mask`` 0 do not count.

    Shapes: logits (..., classes), in ``output.logits`` or the output itself.

    Raises:
        UserError: ``base`` is the model inside ``wrapped``, or logits or layers differ in shape.
        NonFiniteError: NaN or infinity in the logits.
    """
    if any(module is base for module in wrapped.modules()):
        raise UserError("the base model is a part of the initialized one; give an untouched copy")
    before, after = _logits(base, batch), _logits(wrapped, batch)
    if before.shape != after.shape:
        raise UserError(
            f"the base model's logits are {tuple(before.shape)}, the initialized one's {tuple(after.shape)}"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == before.shape[: mask.ndim]:  # not of a classifier's one output per row
        before, after = before[mask.bool()], after[mask.bool()]
    for whose, logits in (("base", before), ("initialized", after)):
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"the {whose} model's logits hold NaN or infinity")
    difference = (after - before).abs()
    divergence = F.kl_div(F.log_softmax(after, -1), F.log_softmax(before, -1), reduction="none", log_target=True)
    layers = {}
    for name, layer in lora_layers(wrapped).items():
        with suppress(UnsupportedLayerError):  # for lack of a weight to compare
            layers[name] = _layer_start(base, name, layer)
    return InitReport(difference.max().item(), difference.mean().item(), divergence.sum(-1).mean().item(), layers)


@torch.no_grad()
def _layer_start(base: nn.Module, name: str, layer: Any) -> LayerStart:
    W, frozen = weight_of(base, name), layer_weight(layer.get_base_layer(), name)
    if W.shape != frozen.shape:
        raise UserError(f"layer {name} is {tuple(W.shape)} in the base model, {tuple(frozen.shape)} in the other one")
    anchored = hasattr(layer.lora_A[ADAPTER], "anchor")
    A, B = change_of(name, layer, None) if anchored else (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    change = layer.scaling[ADAPTER] * (B.double() @ A.double())
    gap = (W.double() - frozen.double() - change).abs()
    kind = torch.finfo(W.dtype)
    top = torch.maximum(W.abs(), frozen.abs()).double().clamp_min(kind.tiny)
    unit = kind.eps * 2.0 ** (torch.frexp(top).exponent - 1)
    return LayerStart("anchor" if anchored else "residual", (gap / unit).max().item())


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    with evaluating(model):
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    logits: Tensor = getattr(output, "logits", output)
    return logits.double()
