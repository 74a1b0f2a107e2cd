"""A dense head (RetinaNet, FCOS, ATSS, GFL, RepPoints ...) as assistant: it sees the student's maps whole.

Letters: N images, D features of an activation, C channels of a neck, H and W cells of a level.
"""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import Tensor, nn

from head_kd.assistants import Assistant, Step, Terms, adapter, as_rows, fit, touch, width_of
from head_kd.config import AssistantSettings
from head_kd.losses import mimic_loss
from head_kd.signals import (
    capturing,
    dense_losses,
    detector_strides,
    head_signals,
    is_two_stage,
    neck_channels,
    num_classes,
    resolve,
)
from tenfold import UserError


class DenseAssistant(Assistant):
    """A dense head on the student's neck.

    It sees the student's maps of the strides that it is made for. A coarser one that the student lacks is made from the
    coarsest by taking every second cell, as FPN does for its last map.

    Args:
        settings: what it is and what is distilled.
        head: config of the head, without train_cfg.
        train_cfg: assigner and sampler, as the head takes them.
        test_cfg: settings of the head's detections.
        student: the detector on whose neck it stands.
        with_teacher: whether there are targets for AKD.

    Raises:
        UserError: the student lacks the maps or the signal that the settings ask for.

    Source: the dense assistants of the authors' development code; the coarser map is ours.
    """

    def __init__(
        self,
        settings: AssistantSettings,
        head: Mapping[str, Any],
        train_cfg: Any,
        test_cfg: Any,
        *,
        student: Any,
        with_teacher: bool = True,
    ) -> None:
        super().__init__(settings, neck_channels(student), int(head["in_channels"]))
        config = {**copy.deepcopy(dict(head)), "num_classes": num_classes(student), "in_channels": self.in_channels}
        if settings.per_anchor or settings.ckd_on == "positive" or settings.rois_per_image is not None:
            raise UserError("per_anchor, ckd_on and rois_per_image concern regions; a dense assistant has none")
        self.head = MODELS.build(ConfigDict({**config, "train_cfg": copy.deepcopy(train_cfg), "test_cfg": test_cfg}))
        self.akd_names = self.names(self.head)
        consumers = resolve(self.head, self.akd_names, "the assistant's dense head")
        widths = {name: width_of(m, name) for name, m in consumers.items()}
        if settings.akd_weight and with_teacher:
            for name, width in widths.items():
                self.akd[self._key(name)] = adapter(width, width)
        strides = detector_strides(student)
        own = [int(s[0]) if isinstance(s, tuple | list) else int(s) for s in self.head.prior_generator.strides]
        self.levels: list[int | None] = [strides.index(s) if s in strides else None for s in own]
        missing = [s for s, level in zip(own, self.levels, strict=True) if level is None]
        if self.levels[0] is None or any(s < max(strides) for s in missing):
            raise UserError(f"the student's neck has strides {strides}, which do not cover the dense head's {own}")
        if settings.ckd_weight:
            self._build_ckd(student)

    def _build_ckd(self, student: Any) -> None:
        if is_two_stage(student) or not head_signals(student.bbox_head):
            raise UserError(
                "ckd_weight with a dense assistant needs a one-stage student: no signal of a two-stage one matches"
            )
        target = self.settings.ckd_target or "cls_tower"
        name = self.settings.ckd_student or "cls_tower"
        if name not in head_signals(student.bbox_head):
            raise UserError(f"the student's head has no signal '{name}'")
        source = width_of(resolve(student.bbox_head, [name], "the student's head")[name], name)
        goal = width_of(resolve(self.head, [target], "the assistant's dense head")[target], target)
        self.ckd_names = (name, target)
        self.ckd = adapter(source, goal)

    @staticmethod
    def _key(name: str) -> str:
        """Name of the adapter of a signal, shared by all levels."""
        return name.replace(".", "_")

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The maps that the head is made for."""
        maps = self.maps(features)
        out: list[Tensor] = []
        for level in self.levels:
            out.append(maps[level] if level is not None else nn.functional.max_pool2d(out[-1], 1, stride=2))
        return out

    def forward(
        self, features: Sequence[Tensor], samples: Sequence[Any]
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Detection losses, and signal -> (N, D, H, W) for each level."""
        with capturing(resolve(self.head, self.captured, "the assistant's dense head")) as seen:
            losses = dense_losses(self.head, self.head(self.pyramid(features)), samples)
        return losses, seen

    def terms(self, step: Step, number: int) -> Terms:
        """Detection losses, AKD of each signal and CKD of the student's tower, both summed over levels.

        Args:
            step: what the step has computed so far.
            number: its place among the assistants, which the names of its losses hold.
        """
        found, signals = self(step.features, step.samples)
        losses = self.detection(found, step, number)
        terms: dict[str, Tensor] = {}
        targets: dict[str, list[Tensor]] | None = None
        if step.active and step.maps is not None and step.teacher is not None and self.imitated:
            targets = step.teacher.at_maps(step.maps, self.imitated)
        for name in self.akd_names if len(self.akd) else ():
            phi = self.akd[self._key(name)]
            value = touch(phi)
            if targets is not None:
                for own, target in zip(signals[name], targets[name], strict=True):
                    value = value + mimic_loss(phi(own), fit(target, own), normalize=self.settings.normalize)
                first = signals[name][0]
                step.observe(f"akd{number}.{name}", as_rows(first), as_rows(fit(targets[name][0], first)))
            terms[f"akd{number}.loss_{name}"] = self.settings.akd_weight * value
        if self.ckd is not None:
            value = touch(self.ckd)
            goal = targets[self.ckd_names[1]] if targets is not None else None
            if goal is None and step.active and step.teacher is None:
                goal = [t.detach() for t in signals[self.ckd_names[1]]]
            if goal is not None:
                value = value + self._ckd_term(step, number, goal)
            terms[f"ckd{number}.loss"] = self.settings.ckd_weight * value
        return losses, terms

    def _ckd_term(self, step: Step, number: int, goal: Sequence[Tensor]) -> Tensor:
        """MSE(psi(s), t), summed over the levels that student and head share."""
        assert self.ckd is not None
        student = step.signals[self.ckd_names[0]]
        pairs = [(student[level], target) for level, target in zip(self.levels, goal, strict=True) if level is not None]
        step.observe(f"ckd{number}", *(as_rows(m) for m in (pairs[0][0], fit(pairs[0][1], pairs[0][0]))))
        losses = [mimic_loss(self.ckd(s), fit(t, s), normalize=self.settings.normalize) for s, t in pairs]
        return sum(losses, torch.zeros(()))
