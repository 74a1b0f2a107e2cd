"""The callback for Lightning, for modules that hold a model wrapped by peft."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda.batches import Data
from corda.config import Attach, CordaInit
from corda.start import Start
from corda.streams import TokenChoice
from tenfold import UserError
from tenfold.errors import needs

needs("lightning", "lightning", "corda")

import lightning as L  # noqa: E402

if TYPE_CHECKING:
    from peft import PeftModel


class CordaCallback(L.Callback):
    """For ``lightning.Trainer``: CorDA on the adapter of a model that the LightningModule holds.

    It starts the adapter before the optimizers are made and saves the factors as ``corda_start.safetensors`` in the
    folder; a run resumed by ``ckpt_path`` reads them from there, and is refused on another base model. At the end of the
    fit it writes ``lora/`` into the folder: a plain LoRA for the untouched base model.

    Args:
        data: as for ``CordaTrainerCallback``.
        init: as for ``CordaTrainerCallback``.
        attach: as for ``CordaTrainerCallback``.
        memory_budget: as for ``CordaTrainerCallback``.
        tokens: as for ``CordaTrainerCallback``.
        model: name of the LightningModule's attribute that is the ``PeftModel``.
        folder: where factors and outcome are saved; default: the trainer's ``default_root_dir``.

    Raises:
        UserError: (in fit) as ``CordaTrainerCallback``, or there is no such attribute.
    """

    def __init__(
        self,
        data: Data | None,
        init: CordaInit | None = None,
        *,
        attach: Attach = "anchor",
        memory_budget: str | int | None = None,
        tokens: TokenChoice = "all",
        model: str = "model",
        folder: str | Path | None = None,
    ) -> None:
        self._start = Start(data, init, attach, memory_budget, tokens)
        self._model = model
        self._path = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the adapter; Lightning then loads a checkpoint over it."""
        if stage != "fit" or self._start.factors is not None:
            return
        wrapped, folder = self._wrapped(pl_module), self._folder(trainer)
        pl_module.to(trainer.strategy.root_device)  # where Lightning puts it a moment later; calibration is work
        if trainer.ckpt_path is None:
            self._start.begin(wrapped, folder, write=trainer.is_global_zero)
        else:
            self._start.restore(wrapped, folder, recorded=None, trained=False)

    def state_dict(self) -> dict[str, Any]:
        """What is recorded in every checkpoint: fingerprint, attach, and a digest of the factors."""
        return dict(self._start.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base model or another start."""
        self._start.check(state_dict)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the plain LoRA; the module keeps its form, since a later fit may go on from it."""
        self._start.end(self._wrapped(pl_module), self._folder(trainer), write=trainer.is_global_zero, finish=False)

    def _wrapped(self, module: L.LightningModule) -> "PeftModel":
        if not hasattr(module, self._model):
            raise UserError(f"{type(module).__name__} has no attribute '{self._model}' that could be the PeftModel")
        found: PeftModel = getattr(module, self._model)
        return found

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self._path or trainer.default_root_dir)
