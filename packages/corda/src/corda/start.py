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

from corda.adapters import ADAPTER, lora_layers
from corda.anchor import MARK, apply_anchor
from corda.attach import apply_corda
from corda.batches import Data
from corda.config import Attach, CordaInit
from corda.context import fingerprint
from corda.convert import to_lora
from corda.factors import FactorSet
from corda.one_call import calibrated_factors
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
        UserError: not a LoRA of peft, one that was already started or trained, or weights that are sharded over ranks.
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
                parameter.copy_(getattr(owner, leaf))
            setattr(owner, leaf, parameter)
    wrapped.base_model = attached.base_model  # the same modules, and the bookkeeping that belongs to them
    started: Any = wrapped.peft_config[ADAPTER]
    started.init_lora_weights = MARK if attach == "anchor" else RESIDUAL_MARK
    return factors


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
    if fresh and any(bool(layer.lora_B[ADAPTER].weight.any()) for layer in lora_layers(wrapped).values()):
        raise UserError("the adapter has been started or trained already; give a LoRA with init_lora_weights=True")


class Start:
    """What both callbacks do: start or restore, remember the base, convert at the end.

    Args:
        data: as for ``get_corda_model``.
        init: as for ``get_corda_model``.
        attach: as for ``get_corda_model``.
        memory_budget: as for ``get_corda_model``.

    Raises:
        UserError: ``attach`` is none of the choices.
    """

    def __init__(
        self, data: Data | None, init: CordaInit | None, attach: Attach, memory_budget: str | int | None
    ) -> None:
        if attach not in get_args(Attach):
            raise UserError(f"unknown attach '{attach}': {did_you_mean(attach, get_args(Attach))}")
        self.data = data
        self.init = init or CordaInit()
        self.attach = attach
        self.memory_budget = memory_budget
        self.factors: FactorSet | None = None
        self.state: dict[str, str] = {}

    def begin(self, wrapped: "PeftModel", folder: Path, *, write: bool) -> None:
        """Calibrate, solve, attach, and with ``write`` keep the factors in the folder."""

        def solve(base: nn.Module, config: "LoraConfig") -> FactorSet:
            self.state = {"fingerprint": fingerprint(base)}
            return calibrated_factors(base, config, self.data, self.init, memory_budget=self.memory_budget)

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
        if recorded["fingerprint"] != self.state["fingerprint"]:
            raise UserError(
                f"the run to resume was made on another base model (fingerprint {recorded['fingerprint'][:12]}, "
                f"this one has {self.state['fingerprint'][:12]})"
            )
        if recorded["attach"] != self.attach:
            raise UserError(f"the run to resume has attach='{recorded['attach']}', not '{self.attach}'")
        if recorded["factors"] != self.state["factors"]:
            raise UserError(f"{START} belongs to another run than the checkpoint to resume")

    def end(self, wrapped: "PeftModel", folder: Path) -> None:
        """Write the outcome as a plain LoRA of the untouched base."""
        assert self.factors is not None
        to_lora(wrapped, self.factors, folder / PLAIN)


def _digest_of(factors: FactorSet) -> str:
    parts = {f"{name}.{part}": getattr(found, part) for name, found in factors.factors.items() for part in "AB"}
    return checkpoints.digest(parts)
