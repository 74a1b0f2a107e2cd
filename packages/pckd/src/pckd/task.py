"""A training task of timm: student, teacher and loss for timm's own training loop."""

from typing import Any, Self

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pckd.distiller import Distiller
from tenfold.errors import MissingExtraError

try:
    from timm.task import TrainingTask
except ImportError as error:
    raise MissingExtraError(
        'PCKDTask needs the training tasks of timm 1.0.27 or later: pip install -U "pckd[timm]"'
    ) from error


class PCKDTask(TrainingTask):
    """``task(input, target)`` gives a dict with loss, output, task_loss and kd_loss, as timm's training script takes it.

    What is trained is the distiller (student and heads of the loss); what is tested, averaged for checkpoints and saved is
    the student. Call ``set_epoch`` at the beginning of each epoch, 0-based as in timm's loop; the method's own epochs are
    1-based.

    Args:
        distiller: student, teacher and loss.
        epochs: number of epochs of the whole training.
        device: device of the task; default: the CPU.
        dtype: dtype of the task.
        verbose: as in timm's tasks.

    Example:
        >>> images, labels = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 0])
        >>> student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> task = PCKDTask(Distiller(student, None, "ce", example=images), epochs=10, verbose=False)
        >>> task.set_epoch(0)
        >>> task(images, labels)["output"].shape
        torch.Size([4, 3])
    """

    def __init__(
        self, distiller: Distiller, epochs: int, device: Any = None, dtype: Any = None, verbose: bool = True
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module: nn.Module = distiller
        self.epochs = epochs
        self.epoch = 0
        self.to(self.device)

    @property
    def distiller(self) -> Distiller:
        """The distiller, out of what a launcher or compiler has wrapped it in."""
        module: Any = self.trainable_module
        module = getattr(module, "module", module)
        found: Distiller = getattr(module, "_orig_mod", module)
        return found

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> Self:
        """Wrap what is trained for several processes; the teacher stays as it is."""
        self.trainable_module = DistributedDataParallel(self.distiller, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the student for testing; the training step reads its feature by hooks, and stays as it is."""
        import torch

        compiled: Any = torch.compile(self.distiller.student.model, backend=backend, mode=mode, **compile_kwargs)
        self.eval_model: nn.Module = compiled
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The student, or its average."""
        if module is None:
            attribute = "eval_model_ema" if ema else "eval_model"
            if hasattr(self, attribute):
                found: nn.Module = getattr(self, attribute)
                return found
            module = self.get_trainable_module(ema=ema)
        if module is None:
            return None
        while not isinstance(module, Distiller):
            module = module._orig_mod if hasattr(module, "_orig_mod") else module.module  # type: ignore[assignment]
        model: nn.Module = module.student.model
        return model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The heads of the loss, which belong to the training and not to the student."""
        return {"objective": self.distiller.objective.state_dict(), "epoch": self.epoch}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Take the heads of the loss from a checkpoint."""
        if state is not None:
            self.distiller.objective.load_state_dict(state["objective"], strict=strict)
            self.epoch = int(state["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """Number of the epoch that begins, from 0."""
        self.epoch = epoch

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images (B V, 3, H, W) or (B, V, 3, H, W) and labels (B,)."""
        loss = self.trainable_module(input, target, self.epoch + 1, self.epochs)
        ce = loss.terms["ce"]
        output = self.distiller.last_logits
        return {"loss": loss.total, "output": output, "task_loss": ce, "kd_loss": loss.total.detach() - ce}
