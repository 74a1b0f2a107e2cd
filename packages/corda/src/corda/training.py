"""The callback for ``transformers.Trainer``: it starts the adapter when training begins, and converts it at the end."""

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from corda.batches import Data
from corda.config import Attach, CordaInit
from corda.start import Start
from corda.streams import TokenChoice
from tenfold import UserError


class CordaTrainerCallback(TrainerCallback):
    """For ``transformers.Trainer`` and what derives from it (TRL): CorDA on the adapter that the model comes with.

    When training begins, it calibrates on the base model, starts the adapter "default" in place and saves the factors as
    ``corda_start.safetensors`` in the output folder. A resumed run reads them from there, and refuses another base model
    than the one that the checkpoint was trained on. At the end the adapter becomes a plain LoRA of the untouched base model,
    of rank 2r: ``lora/`` in the output folder holds it, and so does what ``trainer.save_model()`` writes afterwards. (The
    checkpoints themselves hold A and B relative to the start, and say so in ``init_lora_weights``, which plain peft
    refuses.)

    Args:
        data: calibration batches, as for ``collect_context``; None with ``power=0``. Not the training loader itself, since
            iterating over it would advance its order.
        init: default ``CordaInit()``.
        attach: "anchor" leaves the base untouched: the start is exact to the bit, the base may be quantized, and trainers
            that switch the adapter off to get the reference model (DPO) find the base model under it. "residual" is the
            paper's way: W - s B A under the adapter, 2 r (m + n) fewer multiplications per token and layer.
        memory_budget: as for ``get_corda_model``.
        tokens: which tokens count, as for ``collect_context``.

    Raises:
        UserError: (in training) the model is not a fresh LoRA of peft or is one that no plain LoRA can hold (DoRA), weights
            are sharded (ZeRO-3, FSDP), or the checkpoint to resume belongs to another base model or another start.
    """

    def __init__(
        self,
        data: Data | None,
        init: CordaInit | None = None,
        *,
        attach: Attach = "anchor",
        memory_budget: str | int | None = None,
        tokens: TokenChoice = "all",
    ) -> None:
        self._start = Start(data, init, attach, memory_budget, tokens)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the adapter, or restore the base under it."""
        records: Any = (
            state.stateful_callbacks
        )  # by name; what is in it goes into trainer_state.json of every checkpoint
        if self._start.factors is None:
            folder, model = _folder(args), kwargs["model"]
            recorded = records.get("corda")
            if state.global_step == 0:
                self._start.begin(model, folder, write=state.is_world_process_zero)
            elif recorded is None:
                raise UserError("the checkpoint to resume was not made with CordaTrainerCallback")
            else:
                self._start.restore(model, folder, recorded=recorded, trained=True)
        records["corda"] = self._start.state

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the adapter a plain LoRA and write it; ``save_model`` then writes the same."""
        self._start.end(kwargs["model"], _folder(args), write=state.is_world_process_zero, finish=True)
        records: Any = state.stateful_callbacks
        records["corda"] = self._start.state


def _folder(args: TrainingArguments) -> Path:
    if args.output_dir is None:
        raise UserError("CordaTrainerCallback needs an output_dir")
    return Path(os.fspath(args.output_dir))
