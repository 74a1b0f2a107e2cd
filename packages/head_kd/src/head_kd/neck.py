"""Imitation of the teacher's neck by the student's, level by level: the plain alternative to assistants.

Letters: N images, C channels of a neck, H and W cells of a level.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from head_kd.assistants import Observer, adapter, as_rows, fit, touch
from head_kd.config import NeckMimic
from head_kd.losses import mimic_loss, pkd_loss
from head_kd.signals import detector_strides, neck_channels
from tenfold import UserError


class NeckImitation(nn.ModuleList):
    """PKD or FitNet on each pair of maps with equal strides, a 1x1 convolution before each where channels ask for it.

    Correlations (PKD) need no adapter between necks of equal width.

    Args:
        settings: kind and weight.
        student: the detector whose neck imitates.
        teacher: the detector whose neck is imitated.

    Shapes: maps (N, C, H, W) -> scalar.

    Raises:
        UserError: student and teacher have no stride in common.

    Source: PKD, NeurIPS 2022 (arXiv 2207.02039); FitNets, ICLR 2015 (arXiv 1412.6550), on the neck's maps.
    """

    def __init__(self, settings: NeckMimic, student: Any, teacher: Any) -> None:
        super().__init__()
        own, theirs = detector_strides(student), detector_strides(teacher)
        self.pairs = [(own.index(s), theirs.index(s)) for s in own if s in theirs]
        if not self.pairs:
            raise UserError(f"neck_mimic: student strides {own} and teacher strides {theirs} have none in common")
        self.settings = settings
        channels, wanted = neck_channels(student), neck_channels(teacher)
        if settings.kind != "pkd" or channels != wanted:
            self.extend(adapter((channels, True), (wanted, True)) for _ in self.pairs)

    def forward(self, features: Sequence[Tensor], maps: Sequence[Tensor], observe: Observer) -> Tensor:
        """The weighted loss, summed over levels.

        Args:
            features: the student's maps.
            maps: the teacher's maps.
            observe: takes each pair as rows, before the adapter.
        """
        kind, normalize = self.settings.kind, self.settings.normalize
        total = touch(self)
        for pair, (own, theirs) in enumerate(self.pairs):
            value = features[own].float()
            if len(self):
                value = self[pair](value)
            target = fit(maps[theirs], value)
            total = total + (
                pkd_loss(value, target) if kind == "pkd" else mimic_loss(value, target, normalize=normalize)
            )
            observe(f"neck.{own}", as_rows(features[own]), as_rows(target))
        return self.settings.weight * total
