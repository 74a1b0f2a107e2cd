"""Attach factors beside a base model that is never touched, not even by a rounding.

Instead of (W - s B0 A0) + s B A, where the first two are one weight, an anchored layer computes the same function as

    y = W x + s [ B0 (D_A x) + D_B ((A0 + D_A) x) ],    A = A0 + D_A,  B = B0 + D_B

with A0 and B0 frozen and D_A = D_B = 0 at the start. So it starts at the base model bit for bit, W may be quantized, and
other adapters of the same base stay usable. ("+ s B A - s B0 A0" would not work: (a + t) - t is not a in floating point.)
The gradients of D_A and D_B are those of A and B; weight decay, however, now pulls toward A0 and B0 instead of zero.
peft's ``add_weighted_adapter`` mixes A and B themselves, so it is refused: convert with ``to_lora`` first.

Shapes: m outputs, n inputs, rank r; W (m, n), A0 and D_A (r, n), B0 and D_B (m, r).
"""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from corda.adapters import ADAPTER, PREFIX, bring_back, lora_layers, read_folder
from corda.factors import FactorSet
from corda.fingerprints import check_same
from corda.targets import FLOATS, UnsupportedLayerError, is_quantized, resolve_targets, shape_of
from tenfold import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

MARK = "anchored_corda"
"""``init_lora_weights`` of a saved anchored adapter: plain peft, which cannot compute the formula above, refuses it."""


def apply_anchor(model: nn.Module, factors: FactorSet, lora_config: "LoraConfig") -> "PeftModel":
    """Wrap the model by peft with anchored layers: y = W x + s [ B0 (D_A x) + D_B ((A0 + D_A) x) ].

    Only the layer itself reads W, so it may be quantized, before or after the factors were built. The adapter is trained,
    saved and resumed by peft like any other; ``load_anchor`` reads what ``save_pretrained`` wrote, and ``to_lora`` makes
    it a plain LoRA.

    Args:
        model: the base model; targets as in ``linear_targets``, including quantized layers of any kind.
        factors: factors of this model, or of its unquantized form.
        lora_config: as for ``build_factors``.

    Returns:
        The ``PeftModel``; train it as any LoRA.

    Raises:
        UserError: the model already has an adapter, is not the one that the factors were made for, or the configuration
            has other targets or asks for ``use_dora`` or ``lora_bias``.
        UnsupportedLayerError: a target is not a linear layer.

    Source: the form is ours.
    """
    from peft import get_peft_model

    config = _dispatching(lora_config, model, factors.targets)
    targets = resolve_targets(model, config)
    if targets != factors.targets:
        raise UserError("the LoRA configuration targets other layers or ranks than the factors were built for")
    for name in targets:
        if shape_of(model.get_submodule(name), name) != factors.layers[name].shape:
            raise UserError(f"layer {name} has another shape than the factors were built for")
    factors.check_model(model, quantized=any(is_quantized(model.get_submodule(name)) for name in targets))
    wrapped = get_peft_model(model, config)
    bring_back(wrapped)
    for name, layer in lora_layers(wrapped).items():
        layer.anchor(ADAPTER, factors.factors[name].A, factors.factors[name].B)
    wrapped.peft_config[ADAPTER].init_lora_weights = mark_of(factors.fingerprint)
    return wrapped


def mark_of(fingerprint: str | None) -> Any:
    """The ``init_lora_weights`` of an adapter that is anchored to the model of this fingerprint."""
    return f"{MARK}:{fingerprint}" if fingerprint else MARK


def is_anchored(config: Any) -> bool:
    """Whether a configuration of peft is that of an anchored adapter."""
    return str(getattr(config, "init_lora_weights", "")).partition(":")[0] == MARK


def load_anchor(model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> "PeftModel":
    """Load an anchored model from the untouched base and a folder of ``save_pretrained``.

    Args:
        model: the base model that ``apply_anchor`` was given.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        is_trainable: whether D_A and D_B are to be trained further.

    Raises:
        UserError: the folder holds no anchored adapter, a damaged one, or one for another model.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config, tensors = _read(Path(folder))
    mark = config.init_lora_weights
    parts = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if ".lora_" in key}
    names = {key.removesuffix(".lora_A.anchor") for key in parts if key.endswith(".lora_A.anchor")}
    config = _dispatching(config, model, names)
    config.inference_mode = not is_trainable
    targets = resolve_targets(model, config)
    if set(targets) != names:
        raise UserError(f"the adapter in {folder} was made for another model: its layers differ")
    for name, target in targets.items():
        m, n = shape_of(model.get_submodule(name), name)
        for key, shape in (("lora_A", (target.rank, n)), ("lora_B", (m, target.rank))):
            for kind in ("anchor", "weight"):
                if f"{name}.{key}.{kind}" not in parts:
                    raise UserError(f"the adapter in {folder} lacks {key}.{kind} of layer {name}")
                if parts[f"{name}.{key}.{kind}"].shape != shape:
                    raise UserError(
                        f"the adapter in {folder} was made for another model: layer {name} has another shape"
                    )
    quantized = any(is_quantized(model.get_submodule(name)) for name in targets)
    check_same(f"the adapter in {folder} was made", mark.partition(":")[2] or None, model, quantized=quantized)
    wrapped = get_peft_model(model, config)
    bring_back(wrapped)
    for name, layer in lora_layers(wrapped).items():
        layer.anchor(ADAPTER, parts[f"{name}.lora_A.anchor"], parts[f"{name}.lora_B.anchor"])
    try:
        set_peft_model_state_dict(wrapped, tensors)
    except (KeyError, RuntimeError) as error:  # of what else was trained, modules_to_save for instance
        raise UserError(f"the adapter in {folder} does not fit the model: {error}") from error
    wrapped.peft_config[ADAPTER].init_lora_weights = mark
    return wrapped


def _read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    config, tensors = read_folder(folder)
    found = getattr(config, "init_lora_weights", None)
    if found == "corda":
        raise UserError(
            f"{folder} holds an adapter that peft started by CorDA: it belongs to the residual model, and loads on that one "
            "by PeftModel.from_pretrained once init_lora_weights is true in its adapter_config.json"
        )
    if not is_anchored(config):
        raise UserError(f"{folder} holds no anchored adapter; load it by PeftModel.from_pretrained")
    return config, tensors


def _dispatching(lora_config: "LoraConfig", model: nn.Module, names: Iterable[str]) -> Any:
    """A copy of the configuration by which peft makes an ``AnchoredLinear`` of each named layer, whatever its type."""
    for option in ("use_dora", "lora_bias"):  # a saved lora_bias is refused by peft together with our mark
        if getattr(lora_config, option):
            raise UserError(f"an anchored adapter cannot be combined with {option}; attach the residual (apply_corda)")
    config: Any = copy.deepcopy(lora_config)
    config.init_lora_weights = True
    modules = dict(model.named_modules())
    found = [name for name in names if name in modules]
    for name in found:
        shape_of(modules[name], name)
    config._register_custom_module({type(modules[name]): AnchoredLinear for name in found})
    return config


class _AnchoredA(nn.Linear):
    """x -> [D_A x, (A0 + D_A) x]: (..., n) -> (..., 2r). ``weight`` is D_A, the buffer ``anchor`` is A0."""

    anchor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(x, self.weight)
        return torch.cat([change, F.linear(x, self.anchor) + change], dim=-1)


class _AnchoredB(nn.Linear):
    """[u, v] -> B0 u + D_B v: (..., 2r) -> (..., m). ``weight`` is D_B, the buffer ``anchor`` is B0."""

    anchor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return F.linear(u, self.anchor) + super().forward(v)


class AnchoredLinear(lora.Linear):
    """peft's LoRA layer around a linear one, with a start (A0, B0) that is subtracted without being computed.

        y = W x + s [ B0 (D_A x) + D_B ((A0 + D_A) x) ],    merged:  W + s [ B0 D_A + D_B (A0 + D_A) ]

    Until ``anchor`` is called for an adapter, that adapter is a plain LoRA, so others may be added. D_A and D_B are
    ``lora_A[adapter].weight`` and ``lora_B[adapter].weight``, where peft and optimizers look for parameters; A0 and B0
    are buffers beside them and are saved in the same files.

    Shapes: x (..., n) -> y (..., m).
    Source: ours; peft makes it through ``LoraConfig._register_custom_module``.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        m, n = shape_of(module, "")
        return (n, m)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only: peft's variants compute with A and B themselves."""
        return {(): None}

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Initialize an adapter as peft does, unless it would be anchored, which only ``apply_anchor`` makes.

        Raises:
            UserError: peft is mixing an anchored adapter (``add_weighted_adapter``), or loading a second one.
        """
        if str(init_lora_weights).startswith(MARK):
            raise UserError("an anchored adapter cannot be mixed or loaded beside others; convert it by to_lora first")
        super().reset_lora_parameters(adapter_name, init_lora_weights)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def anchor(self, adapter: str, A0: Tensor, B0: Tensor) -> None:
        """Start ``adapter`` at A0 (r, n) and B0 (m, r), kept in the dtype of its parameters; D_A and D_B become zero."""
        for parts, kind, start in ((self.lora_A, _AnchoredA, A0), (self.lora_B, _AnchoredB, B0)):
            plain: Any = parts[adapter]
            if plain.weight.dtype not in FLOATS:  # older versions of peft take over the one byte of an fp8 base
                plain.float()
            part = kind(plain.in_features, plain.out_features, device="meta")
            part.weight, part.bias = plain.weight, plain.bias
            part.register_buffer("anchor", torch.empty_like(plain.weight, requires_grad=False).copy_(start))
            nn.init.zeros_(part.weight)
            parts[adapter] = part

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (B A - B0 A0) without the cancellation, in the layout of the base layer's weight."""
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        if isinstance(down, _AnchoredA):
            product = up.anchor @ down.weight + up.weight @ (down.anchor + down.weight)
        else:
            product = up.weight @ down.weight
        change: Tensor = self.scaling[adapter] * product
        return change.T if isinstance(self.get_base_layer(), Conv1D) else change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- W + s (B A - B0 A0).

        Raises:
            UnsupportedLayerError: W is quantized.
        """
        if is_quantized(self.get_base_layer()):
            kind = type(self.get_base_layer()).__name__
            raise UnsupportedLayerError(
                f"cannot merge into the quantized weight of a {kind}; save it by to_lora instead"
            )
        super().merge(safe_merge, adapter_names)
