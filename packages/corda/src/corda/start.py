"""Start an adapter inside a trainer: on a model that peft has wrapped already, with the optimizer's parameters kept.

Trainers that wrap the model themselves (TRL with ``peft_config``) leave no moment between peft and the optimizer. So the
callbacks take the freshly wrapped model at the start of the training, compute the factors on the base inside it, and write
them into the existing parameters. The start is kept beside the checkpoints, so that a run resumes on a fresh base and ends
as a plain LoRA for it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from corda.adapters import ADAPTER, adapter_state, lora_layers, save_adapter
from corda.algebra import STRIP
from corda.anchor import AnchoredLinear, apply_anchor, mark_of
from corda.attach import apply_corda
from corda.batches import Data
from corda.config import Attach, CordaInit
from corda.convert import change_of, set_ranks, to_lora
from corda.factors import FactorSet
from corda.fingerprints import fingerprint
from corda.one_call import calibrated_factors
from corda.streams import TokenChoice
from corda.targets import layer_weight
from tenfold import UserError, checkpoints
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

START = "corda_start.safetensors"
"""The factors that a run started from, beside its checkpoints."""
PLAIN = "lora"
"""Folder of the outcome, a plain LoRA of the untouched base."""
RESIDUAL_MARK = "residual_corda"
"""``init_lora_weights`` in checkpoints that need the residual model: plain peft refuses them instead of misreading them."""

FINISHED = "finished"
"""In place of ``attach`` in checkpoints of a training that goes on with the plain LoRA."""

Solve = Callable[[nn.Module, "LoraConfig"], FactorSet]


def start_in_place(wrapped: "PeftModel", solve: Solve, attach: Attach, *, fresh: bool) -> FactorSet:
    """Attach factors to a model that peft has wrapped already; optimizers that hold its parameters stay valid.

    Args:
        wrapped: a model with one plain LoRA, named "default".
        solve: function that finds the factors of the bare base model under a LoRA configuration.
        attach: "residual" (base weights become W - s B A) or "anchor" (base untouched).
        fresh: True starts an adapter whose B is still zero, as peft makes it; False keeps what was trained, and puts the
            base under it as it was then.

    Returns:
        The factors that were attached.

    Raises:
        UserError: not a LoRA of peft, one that was already started or trained, one that could not be converted at the end
            (DoRA), or weights that are sharded over ranks.
    """
    _check(wrapped, fresh)
    config: Any = wrapped.peft_config[ADAPTER]
    kept = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    base: Any = wrapped.base_model.unload()  # type: ignore[operator]
    factors = solve(base, config)
    attached = (apply_anchor if attach == "anchor" else apply_corda)(base, factors, config)
    with torch.no_grad():
        for name, parameter in kept.items():
            path, _, leaf = name.rpartition(".")
            owner = attached.get_submodule(path)
            if fresh:
                parameter.data = getattr(owner, leaf).data  # in its own dtype: a start that is rounded starts elsewhere
            setattr(owner, leaf, parameter)
    wrapped.base_model = attached.base_model  # the same modules, and the bookkeeping that belongs to them
    started: Any = wrapped.peft_config[ADAPTER]
    started.init_lora_weights = mark_of(factors.fingerprint) if attach == "anchor" else RESIDUAL_MARK
    return factors


@torch.no_grad()
def finish_in_place(wrapped: "PeftModel", factors: FactorSet) -> None:
    """Make a trained adapter a plain LoRA of the untouched base: A' and B' of ``to_lora`` in place of A and B.

    What the model computes stays, so that it can be evaluated and saved like any LoRA. A residual base gets back what the
    start took from it, W' + s B0 A0, which is W up to one rounding.

    Args:
        wrapped: the trained model.
        factors: what it was started from.
    """
    config: Any = wrapped.peft_config[ADAPTER]
    ranks, scalings = {}, {}
    for name, layer in lora_layers(wrapped).items():
        new = dict(zip("AB", change_of(name, layer, factors), strict=True))
        if not isinstance(layer, AnchoredLinear):
            W, start = layer_weight(layer.get_base_layer(), name), factors.factors[name]
            A0, B0 = start.A.to(W.device).double(), start.B.to(W.device).double()
            for first in range(0, len(W), STRIP):
                rows = slice(first, first + STRIP)
                W[rows] = W[rows].double() + layer.scaling[ADAPTER] * (B0[rows] @ A0)
        for x, parts in (("A", layer.lora_A), ("B", layer.lora_B)):
            old, value = parts[ADAPTER], new[x]
            plain = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
            plain.weight = nn.Parameter(value, requires_grad=old.weight.requires_grad)
            plain.bias = old.bias
            parts[ADAPTER] = plain
        ranks[name], scalings[name] = len(new["A"]), layer.scaling[ADAPTER]
        layer.r[ADAPTER] = ranks[name]
    set_ranks(config, ranks, scalings)
    for name, layer in lora_layers(wrapped).items():
        layer.lora_alpha[ADAPTER] = scalings[name] * (ranks[name] ** 0.5 if config.use_rslora else ranks[name])
    config.init_lora_weights = True


def _check(wrapped: nn.Module, fresh: bool) -> None:
    from peft import PeftModel

    if not isinstance(wrapped, PeftModel) or set(wrapped.peft_config) != {ADAPTER} or not lora_layers(wrapped):
        raise UserError(
            f"expected a model that peft has wrapped with one LoRA named '{ADAPTER}', got {type(wrapped).__name__}; "
            "wrap it by get_peft_model(model, LoraConfig(...)) or by the trainer's peft_config"
        )
    if any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in wrapped.parameters()):
        raise UserError(
            "the weights are sharded over ranks (ZeRO-3, FSDP); make the initial adapter beforehand by `corda init`"
        )
    for name, layer in lora_layers(wrapped).items():
        if ADAPTER in layer.lora_variant:
            variant = type(layer.lora_variant[ADAPTER]).__name__.removesuffix("Variant").removesuffix("LinearLinear")
            raise UserError(
                f"layer {name} is a {variant}, whose outcome no plain LoRA can hold: train without use_dora and the like, or "
                "make the initial adapter by `corda init`, which is trained on its residual model and not converted"
            )
    if fresh and any(
        ADAPTER in layer.lora_B and bool(layer.lora_B[ADAPTER].weight.any()) for layer in lora_layers(wrapped).values()
    ):
        raise UserError("the adapter has been started or trained already; give a LoRA with init_lora_weights=True")


class Start:
    """What both callbacks do: start or restore, remember the base, convert at the end.

    Args:
        data: as for ``get_corda_model``.
        init: as for ``get_corda_model``.
        attach: as for ``get_corda_model``.
        memory_budget: as for ``get_corda_model``.
        tokens: as for ``get_corda_model``.

    Raises:
        UserError: ``attach`` is none of the choices.
    """

    def __init__(
        self,
        data: Data | None,
        init: CordaInit | None,
        attach: Attach,
        memory_budget: str | int | None,
        tokens: TokenChoice = "all",
    ) -> None:
        if attach not in get_args(Attach):
            raise UserError(f"unknown attach '{attach}': {did_you_mean(attach, get_args(Attach))}")
        self.data = data
        self.init = init or CordaInit()
        self.attach = attach
        self.memory_budget = memory_budget
        self.tokens = tokens
        self.factors: FactorSet | None = None
        self.finished = False
        self.state: dict[str, str] = {}

    def begin(self, wrapped: "PeftModel", folder: Path, *, write: bool) -> None:
        """Calibrate, solve, attach, and with ``write`` keep the factors in the folder."""

        def solve(base: nn.Module, config: "LoraConfig") -> FactorSet:
            self.state = {"fingerprint": fingerprint(base)}
            return calibrated_factors(base, config, self.data, self.init, self.tokens, memory_budget=self.memory_budget)

        self.factors = start_in_place(wrapped, solve, self.attach, fresh=True)
        self.state |= {"attach": self.attach, "factors": _digest_of(self.factors)}
        if write:
            self.factors.save(folder / START)

    def restore(self, wrapped: "PeftModel", folder: Path, *, recorded: dict[str, str] | None, trained: bool) -> None:
        """Attach the factors of the folder under an adapter that was, or is about to be, loaded from a checkpoint.

        Args:
            wrapped: as for ``start_in_place``.
            folder: holds the factors.
            recorded: state of the checkpoint, to be checked; None where it is checked later.
            trained: whether the checkpoint has been loaded already.

        Raises:
            UserError: the folder's factors, or the base model, are not those of the checkpoint.
        """
        factors = FactorSet.load(folder / START)

        def solve(base: nn.Module, config: "LoraConfig") -> FactorSet:
            self.state = {"fingerprint": fingerprint(base), "attach": self.attach, "factors": _digest_of(factors)}
            if recorded is not None:
                self.check(recorded)
            return factors

        self.factors = start_in_place(wrapped, solve, self.attach, fresh=not trained)

    def check(self, recorded: dict[str, str]) -> None:
        """Raise ``UserError`` unless a checkpoint was made by a run like this one."""
        if recorded["attach"] == FINISHED:
            raise UserError(
                "the checkpoint to resume is of a second training, of a plain LoRA: resume it without the callback"
            )
        if recorded["fingerprint"] != self.state["fingerprint"]:
            raise UserError(
                f"the run to resume was made on another base model (fingerprint {recorded['fingerprint'][:12]}, "
                f"this one has {self.state['fingerprint'][:12]})"
            )
        if recorded["attach"] != self.attach:
            raise UserError(f"the run to resume has attach='{recorded['attach']}', not '{self.attach}'")
        if recorded["factors"] != self.state["factors"]:
            raise UserError(f"{START} belongs to another run than the checkpoint to resume")

    def end(self, wrapped: "PeftModel", folder: Path, *, write: bool, finish: bool) -> None:
        """Save the outcome as a plain LoRA of the untouched base.

        Args:
            wrapped: the trained model.
            folder: gets ``lora/``.
            write: whether this process writes it.
            finish: whether the model's own adapter becomes that LoRA, which a training that goes on then trains.
        """
        assert self.factors is not None
        if write and self.finished:
            save_adapter(wrapped.peft_config[ADAPTER], adapter_state(wrapped), folder / PLAIN)
        elif write:
            to_lora(wrapped, self.factors, folder / PLAIN)
        if finish and not self.finished:
            finish_in_place(wrapped, self.factors)
            self.finished = True
            self.state = {**self.state, "attach": FINISHED}


def _digest_of(factors: FactorSet) -> str:
    parts = {f"{name}.{part}": getattr(found, part) for name, found in factors.factors.items() for part in "AB"}
    return checkpoints.digest(parts)
