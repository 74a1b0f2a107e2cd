"""Student, teacher and loss as one module: tensors in, loss out, for any training loop."""

from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor, nn

from pckd.config import METHODS, REFERENCE_EPOCHS, Losses
from pckd.losses import BaselineLoss, LossOutput, Objective, Outputs, PCKDLoss, with_terms
from pckd.tap import ClassifierTap, second_stage
from tenfold import UserError
from tenfold.errors import did_you_mean


class Distiller(nn.Module):
    """Trains a student by one of the methods; the teacher is frozen and is in no state dict.

    Args:
        student: any classifier; it is used as it is, and trained in place.
        teacher: any classifier of the same classes, or its tap, in evaluation mode for ever; None for method ce, or where
            its outputs are given in each step.
        method: ce, kd, dkd, fitnet, ckd, pckd or pckd-nokd.
        losses: settings of the methods.
        example: images (N, 3, H, W) as the student takes them; it is run on them, to measure and to check.
        teacher_example: the same as the teacher takes them, where it takes others.
        tap: path of the student's last linear layer, where it is not found.
        teacher_tap: path of the teacher's.
        teacher_dims: (classes, width of the feature) of a teacher whose outputs are given in each step.
        label_smoothing: share of the labels that is spread over all classes in the cross-entropy.

    Attributes:
        last_logits: (B, C) the student's logits of the upright views in the last step, for metrics.

    Raises:
        ValueError: student and teacher have different classes; the message names both.
        ClassifierNotFound: a last linear layer is not found.

    Example:
        >>> from torch.nn import Flatten, Linear, Sequential
        >>> student, teacher = (Sequential(Flatten(), Linear(12, d), Linear(d, 3)) for d in (4, 9))
        >>> images, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> distiller = Distiller(student, teacher, "kd", example=images)
        >>> loss = distiller(images, labels, epoch=1, epochs=240)
        >>> sorted(loss.terms)
        ['ce', 'kd']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        method: str = "pckd",
        losses: Losses | None = None,
        *,
        example: Tensor,
        teacher_example: Tensor | None = None,
        tap: str | None = None,
        teacher_tap: str | None = None,
        teacher_dims: tuple[int, int] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise UserError(f"unknown method '{method}': {did_you_mean(method, METHODS)}")
        losses = losses or Losses()
        shown_to_teacher = example if teacher_example is None else teacher_example
        student_hint = None
        if method == "fitnet":
            if teacher is None:
                raise UserError("method fitnet needs the teacher itself, not its cached outputs")
            student_hint = losses.fitnet.student or second_stage(student, example)
        self.method = method
        self.last_logits: Tensor | None = None
        self.student = ClassifierTap(student, tap, student_hint, example=example)
        self._teacher: tuple[ClassifierTap, ...] = ()  # in a tuple, so that it is no submodule
        shown = self.student.check(example)
        taught: Outputs | None = None
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            if not isinstance(teacher, ClassifierTap):
                teacher_hint = None
                if method == "fitnet":
                    teacher_hint = losses.fitnet.teacher or second_stage(teacher, shown_to_teacher)
                teacher = ClassifierTap(teacher, teacher_tap, teacher_hint, example=shown_to_teacher)
            self._teacher = (teacher,)
            taught = teacher.check(shown_to_teacher)
            teacher_dims = (teacher.num_classes, teacher.feature_dim)
        if teacher_dims is not None and teacher_dims[0] != self.student.num_classes:
            raise UserError(f"the teacher has {teacher_dims[0]} classes, the student {self.student.num_classes}")
        if method != "ce" and teacher_dims is None:
            raise UserError(f"method {method} needs a teacher")
        self.objective: Objective
        if method in {"pckd", "ckd", "pckd-nokd"}:
            assert teacher_dims is not None
            self.objective = PCKDLoss(self.student.feature_dim, teacher_dims[1], with_terms(losses.pckd, method))
        else:
            channels = None
            if method == "fitnet":
                if shown.hint is None or taught is None or taught.hint is None:
                    raise UserError("method fitnet needs a tap of the teacher with a 'hint'")
                channels = (shown.hint.shape[1], taught.hint.shape[1])
            self.objective = BaselineLoss(method, kd=losses.kd, dkd=losses.dkd, fitnet=losses.fitnet, channels=channels)
        self.objective.label_smoothing = label_smoothing

    @property
    def teacher(self) -> ClassifierTap | None:
        """The frozen teacher."""
        return self._teacher[0] if self._teacher else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for tap in self._teacher:
            tap._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the student and of the heads of the loss."""
        return (p for p in self.parameters() if p.requires_grad)

    @torch.no_grad()
    def teach(self, images: Tensor, views: int) -> Outputs | None:
        """The teacher's outputs for N rows, or for the upright ones where the loss needs no others."""
        teacher, rows = self.teacher, self.objective.teacher_rows
        if teacher is None or rows == "none":
            return None
        teacher.eval()
        return teacher(images if rows == "all" or views == 1 else images[::views])

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        epoch: int,
        epochs: int = REFERENCE_EPOCHS,
        *,
        teacher_images: Tensor | None = None,
        teacher_outputs: Outputs | None = None,
    ) -> LossOutput:
        """The loss of one batch.

        Args:
            images: (B V, 3, H, W), image-major, the first view of each image upright; or (B, V, 3, H, W).
            labels: (B,), or soft ones (B, C) where the method's terms take them.
            epoch: 1-based.
            epochs: of the whole training.
            teacher_images: the same, normalized for the teacher where it expects other statistics.
            teacher_outputs: take these instead of running the teacher.
        """
        if images.ndim == 5:
            images = images.flatten(0, 1)
        views = max(1, len(images) // max(len(labels), 1))
        out = self.student(images)
        self.last_logits = out.logits[::views].detach()
        if teacher_outputs is None:
            teacher_outputs = self.teach(images if teacher_images is None else teacher_images, views)
        loss: LossOutput = self.objective(out, teacher_outputs, labels, epoch, epochs)
        return loss
