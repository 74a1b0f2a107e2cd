"""Assistant heads on the student's neck: copies of the teacher's head that labels and the teacher train together.

Letters: M regions of a batch, D features of an activation, C channels of a neck.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from head_kd.config import AssistantSettings
from head_kd.losses import PerAnchorLinear
from head_kd.proposals import Proposals, Provenance
from head_kd.signals import box_heads, capturing, forward_stage, head_signals, resolve
from tenfold import UserError


@dataclasses.dataclass(frozen=True)
class Regions:
    """The regions of a batch that a RoI head works on: positives then negatives of each image, images in order.

    Attributes:
        sampling: mmdet's sampling result of each image.
        rois: (M, 5) image, x1, y1, x2, y2.
        positive: (M,) bool.
        provenance: of the M regions.
        index: (M,) row in the list of proposals that was sampled from; below 0 for ground truth that was added.
    """

    sampling: list[Any]
    rois: Tensor
    positive: Tensor
    provenance: Provenance
    index: Tensor

    @property
    def image(self) -> Tensor:
        """(M,) number of the image."""
        return self.rois[:, 0].long()


def collect_regions(
    sampling: Sequence[Any], proposals: Sequence[Proposals], ground_truth: Sequence[int], added: bool
) -> Regions:
    """Follow sampled rows back to the proposals that they were.

    A sampler's indices count ground truth first where it adds it as proposals, then the proposals.

    Args:
        sampling: result of each image.
        proposals: that were sampled from.
        ground_truth: number of boxes of each image.
        added: whether the sampler adds them.
    """
    rois, positive, provenance, index = [], [], [], []
    for number, (result, proposed, boxes) in enumerate(zip(sampling, proposals, ground_truth, strict=True)):
        offset = boxes if added else 0
        rows = torch.cat([result.pos_inds, result.neg_inds]) - offset
        known = Provenance.cat([proposed.provenance, Provenance.none(1, rows.device)])
        provenance.append(known[torch.where(rows < 0, len(proposed.provenance), rows)])
        index.append(rows)
        positive.append(torch.arange(len(rows), device=rows.device) < len(result.pos_inds))
        priors = result.priors
        rois.append(torch.cat([priors.new_full((len(priors), 1), number), priors], dim=1))
    return Regions(list(sampling), torch.cat(rois), torch.cat(positive), Provenance.cat(provenance), torch.cat(index))


def sample_regions(
    assigner: Any, sampler: Any, proposals: Sequence[Proposals], samples: Sequence[Any], features: Sequence[Tensor]
) -> Regions:
    """Assign proposals to ground truth and sample them, as mmdet's RoI heads do."""
    from mmengine.structures import InstanceData

    results, counts = [], []
    for i, (proposed, sample) in enumerate(zip(proposals, samples, strict=True)):
        instances = InstanceData(priors=proposed.boxes, scores=proposed.scores)
        truth = sample.gt_instances
        assigned = assigner.assign(instances, truth, sample.get("ignored_instances"))
        counts.append(len(truth.bboxes))
        results.append(sampler.sample(assigned, instances, truth, feats=[level[i][None] for level in features]))
    return collect_regions(results, proposals, counts, sampler.add_gt_as_proposals)


def width_of(consumer: nn.Module, owner: str) -> tuple[int, bool]:
    """Features D that a consumer takes, and whether it takes maps (N, D, H, W) instead of rows (M, D)."""
    module = getattr(consumer, "conv", consumer)
    if isinstance(module, nn.Linear):
        return module.in_features, False
    channels = getattr(module, "in_channels", None)
    if channels is None:
        raise UserError(
            f"{owner}: {type(consumer).__name__} does not say how many channels it takes; name another signal"
        )
    return int(channels), True


def adapter(source: tuple[int, bool], target: tuple[int, bool], *, bias: bool = True) -> nn.Module:
    """The trainable map phi between two signals: linear for rows, a 1x1 convolution for maps."""
    (d_in, maps), (d_out, _) = source, target
    return nn.Conv2d(d_in, d_out, 1, bias=bias) if maps else nn.Linear(d_in, d_out, bias=bias)


class Assistant(nn.Module):
    """A head on the student's neck, with the adapters of its distillation terms; dropped after training.

    Args:
        settings: what it is and what is distilled.
        channels: C of the student's neck.
        wanted: C that the head takes.
    """

    def __init__(self, settings: AssistantSettings, channels: int, wanted: int) -> None:
        super().__init__()
        self.settings = settings
        if channels != wanted and settings.bridge == "off":
            wanted = channels
        self.in_channels = wanted
        self.bridge = nn.Conv2d(channels, wanted, 1) if channels != wanted else None
        self.akd = nn.ModuleDict()
        self.ckd: nn.Module | None = None
        self.ckd_names: tuple[str, str] = ("", "")
        self.head: Any = None

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps in fp32 (mmdet would cast regions to the maps' precision) and with the head's channels."""
        out = [m.float() for m in features]
        if self.bridge is not None:
            out = [self.bridge(m).float() for m in out]
        return out

    def transfer_from(self, teacher_head: nn.Module) -> list[str]:
        """Copy what fits of the teacher's head; returns the names of the tensors that did not."""
        own = self.head.state_dict()
        theirs = teacher_head.state_dict()
        fitting = {k: v for k, v in theirs.items() if k in own and own[k].shape == v.shape}
        self.head.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]

    def names(self, head: nn.Module) -> tuple[str, ...]:
        """The signals of its AKD terms."""
        known = tuple(head_signals(head))
        names = known if self.settings.akd is None else self.settings.akd
        if not names and (self.settings.akd_weight or self.settings.ckd_weight):
            raise UserError(
                f"the assistant's {type(head).__name__} has no signal of a known name: name module paths in akd"
            )
        return names


class RoIAssistant(Assistant):
    """An R-CNN or cascade head as assistant.

    Args:
        settings: see ``AssistantSettings``.
        head: config of the RoI head, without train_cfg.
        train_cfg: assigner and sampler (a list of them for a cascade).
        test_cfg: of the R-CNN stage.
        channels: of the student's neck.
        strides: of the student's neck.
        num_classes: of the data; the teacher's may differ.
        student_signal: D and whether maps, of the student head's signal; None without CKD.
        num_anchors: of the student's head, for ``per_anchor``.
        with_teacher: whether there are targets for AKD.
        shared_sample: a two-stage student's regions are used; CKD then pairs rows.
    """

    def __init__(
        self,
        settings: AssistantSettings,
        head: Mapping[str, Any],
        train_cfg: Any,
        test_cfg: Any,
        *,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        student_signal: tuple[int, bool] | None = None,
        num_anchors: int = 1,
        with_teacher: bool = True,
        shared_sample: bool = False,
    ) -> None:
        from mmdet.registry import MODELS, TASK_UTILS
        from mmengine.config import ConfigDict

        config = ConfigDict(copy.deepcopy(dict(head)))
        for mask in ("mask_roi_extractor", "mask_head"):  # instance masks are no part of this
            config.pop(mask, None)
        extractors = config["bbox_roi_extractor"]
        first = extractors[0] if isinstance(extractors, list) else extractors
        super().__init__(settings, channels, int(first["out_channels"]))
        wanted = len(first["featmap_strides"])
        if len(strides) < wanted:
            raise UserError(
                f"the student's neck has {len(strides)} maps (strides {list(strides)}), the assistant's RoI extractor"
                f" wants {wanted}: give a head with fewer featmap_strides"
            )
        own = [int(stride) for stride in strides[:wanted]]
        for extractor in extractors if isinstance(extractors, list) else [extractors]:
            if settings.align_strides:
                factor = own[0] / extractor["featmap_strides"][0]
                extractor["finest_scale"] = extractor.get("finest_scale", 56) * factor
            extractor["featmap_strides"] = own
            extractor["out_channels"] = self.in_channels
        boxes = config["bbox_head"]
        for box_head in boxes if isinstance(boxes, list) else [boxes]:
            box_head["num_classes"] = num_classes
            box_head["in_channels"] = self.in_channels
        train_cfg = ConfigDict(stages=copy.deepcopy(train_cfg)).stages
        stages = train_cfg if isinstance(train_cfg, list) else [train_cfg]
        if settings.rois_per_image is not None:
            for stage in stages:
                stage["sampler"]["num"] = settings.rois_per_image
        self.head = MODELS.build(ConfigDict({**config, "train_cfg": train_cfg, "test_cfg": test_cfg}))
        self.shared_sample = shared_sample
        self.num_stages = len(box_heads(self.head))
        sampler = {**stages[0]["sampler"], "add_gt_as_proposals": False}
        self._cache_sampler = TASK_UTILS.build(sampler, default_args={"context": self.head})
        if settings.per_anchor and shared_sample:
            raise UserError("per_anchor needs a one-stage student")
        self.akd_names = self.names(box_heads(self.head)[0])
        signal_widths = {}
        if settings.akd_weight or settings.ckd_weight:
            consumers = resolve(box_heads(self.head)[0], self.akd_names, "the assistant's box head")
            signal_widths = {name: (width_of(m, name)[0], False) for name, m in consumers.items()}
        if settings.akd_weight and with_teacher:
            for stage in range(self.num_stages):
                for name, width in signal_widths.items():
                    self.akd[f"s{stage}_{name}".replace(".", "_")] = adapter(width, width)
        if settings.ckd_weight and student_signal is not None:
            target = settings.ckd_target or self.akd_names[-1]
            width = width_of(resolve(box_heads(self.head)[0], [target], "the assistant's box head")[target], target)
            self.ckd_names = (settings.ckd_student or "", target)
            if settings.per_anchor:
                self.ckd = PerAnchorLinear(num_anchors, student_signal[0], width[0])
            else:  # the authors' cascade pair has no bias here
                self.ckd = adapter((student_signal[0], False), (width[0], False), bias=not shared_sample)

    def adapter_of(self, stage: int, name: str) -> nn.Module:
        """phi of one AKD term."""
        return self.akd[f"s{stage}_{name}".replace(".", "_")]

    def sample(
        self, proposals: Sequence[Proposals], samples: Sequence[Any], features: Sequence[Tensor], *, cached: bool
    ) -> Regions:
        """Regions for its first stage; cached boxes hold the ground truth already, so none is added to them."""
        assigner, sampler = self.head.bbox_assigner, self.head.bbox_sampler
        if isinstance(assigner, list):
            assigner, sampler = assigner[0], sampler[0]
        return sample_regions(assigner, self._cache_sampler if cached else sampler, proposals, samples, features)

    def forward(
        self, features: Sequence[Tensor], regions: Regions, samples: Sequence[Any]
    ) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """Detection losses, regions and activations of each stage.

        Returns:
            losses by mmdet's names, rois (M, 5) of each stage, and for each stage signal -> (M, D).
        """
        names = sorted({*self.akd_names, self.ckd_names[1]} - {""}) if len(self.akd) or self.ckd is not None else []
        maps = self.maps(features)
        heads = box_heads(self.head)
        losses: dict[str, Tensor] = {}
        rois, signals = [regions.rois], []
        if self.num_stages == 1 and not isinstance(self.head.bbox_head, nn.ModuleList):
            with capturing(resolve(heads[0], names, "the assistant's box head")) as seen:
                losses = dict(self.head.bbox_loss(maps, regions.sampling)["loss_bbox"])
            return losses, rois, [{name: values[0].flatten(1) for name, values in seen.items()}]
        metas = [sample.metainfo for sample in samples]
        sampling = regions.sampling
        results: Any = []
        for stage in range(self.num_stages):
            self.head.current_stage = stage
            if stage:
                refined = [
                    Proposals(
                        r.bboxes, r.bboxes.new_zeros(len(r.bboxes)), Provenance.none(len(r.bboxes), r.bboxes.device)
                    )
                    for r in results
                ]
                later = sample_regions(
                    self.head.bbox_assigner[stage], self.head.bbox_sampler[stage], refined, samples, maps
                )
                sampling = later.sampling
                rois.append(later.rois)
            with capturing(resolve(heads[stage], names, "the assistant's box head")) as seen:
                done = self.head.bbox_loss(stage, maps, sampling)
            signals.append({name: values[0].flatten(1) for name, values in seen.items()})
            weight = self.head.stage_loss_weights[stage]
            losses |= {f"s{stage}.{k}": v * weight if "loss" in k else v for k, v in done["loss_bbox"].items()}
            if stage < self.num_stages - 1:
                with torch.no_grad():
                    box_head: Any = heads[stage]
                    results = box_head.refine_bboxes(sampling, done, metas)
                if results is None:
                    break
        return losses, rois, signals

    def at_rois(
        self, features: Sequence[Tensor], rois: Tensor, names: Sequence[str], stage: int = 0
    ) -> dict[str, Tensor]:
        """Its activations (M, D) at given regions, without losses."""
        with capturing(resolve(box_heads(self.head)[stage], names, "the assistant's box head")) as seen:
            forward_stage(self.head, stage, self.maps(features), rois)
        return {name: values[0].flatten(1) for name, values in seen.items()}


class DenseAssistant(Assistant):
    """A dense head (RetinaNet, FCOS, ATSS, GFL, RepPoints ...) as assistant.

    It sees the student's maps of the strides that it is made for. A coarser one that the student lacks is made from the
    coarsest by taking every second cell, as FPN does for its last map.

    Args:
        settings: see ``AssistantSettings``.
        head: config of the head, without train_cfg.
        train_cfg: as the head takes it.
        test_cfg: as the head takes it.
        channels: of the student's neck.
        strides: of the student's neck.
        num_classes: of the data.
        student_signals: signal -> D and whether maps, of the student's dense head; empty for a two-stage student.
        with_teacher: whether there are targets for AKD.
    """

    def __init__(
        self,
        settings: AssistantSettings,
        head: Mapping[str, Any],
        train_cfg: Any,
        test_cfg: Any,
        *,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        student_signals: Mapping[str, tuple[int, bool]],
        with_teacher: bool = True,
    ) -> None:
        from mmdet.registry import MODELS
        from mmengine.config import ConfigDict

        super().__init__(settings, channels, int(head["in_channels"]))
        config = {**copy.deepcopy(dict(head)), "num_classes": num_classes, "in_channels": self.in_channels}
        if settings.per_anchor or settings.ckd_on == "positive" or settings.rois_per_image is not None:
            raise UserError("per_anchor, ckd_on and rois_per_image concern regions; a dense assistant has none")
        self.head = MODELS.build(ConfigDict({**config, "train_cfg": copy.deepcopy(train_cfg), "test_cfg": test_cfg}))
        self.akd_names = self.names(self.head)
        consumers = resolve(self.head, self.akd_names, "the assistant's dense head")
        widths = {name: width_of(m, name) for name, m in consumers.items()}
        if settings.akd_weight and with_teacher:
            for name, width in widths.items():
                self.akd[name.replace(".", "_")] = adapter(width, width)
        own = [int(s[0]) if isinstance(s, tuple | list) else int(s) for s in self.head.prior_generator.strides]
        self.levels: list[int | None] = [list(strides).index(s) if s in strides else None for s in own]
        missing = [s for s, level in zip(own, self.levels, strict=True) if level is None]
        if self.levels[0] is None or any(s < max(strides) for s in missing):
            raise UserError(
                f"the student's neck has strides {list(strides)}, which do not cover the dense head's {own}"
            )
        if settings.ckd_weight:
            if not student_signals:
                raise UserError(
                    "ckd_weight with a dense assistant needs a one-stage student: no signal of a two-stage one matches"
                )
            target = settings.ckd_target or "cls_tower"
            student = settings.ckd_student or "cls_tower"
            if student not in student_signals:
                raise UserError(f"the student's head has no signal '{student}'")
            target_width = width_of(resolve(self.head, [target], "the assistant's dense head")[target], target)
            self.ckd_names = (student, target)
            self.ckd = adapter(student_signals[student], target_width)

    def adapter_of(self, name: str) -> nn.Module:
        """phi of one AKD term, shared by all levels."""
        return self.akd[name.replace(".", "_")]

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
        names = sorted({*self.akd_names, self.ckd_names[1]} - {""}) if len(self.akd) or self.ckd is not None else []
        with capturing(resolve(self.head, names, "the assistant's dense head")) as seen:
            losses = dense_losses(self.head, self.head(self.pyramid(features)), samples)
        return losses, seen


def dense_losses(head: Any, outputs: Any, samples: Sequence[Any]) -> dict[str, Tensor]:
    """A dense head's losses out of outputs that are there already."""
    from mmdet.models.utils import unpack_gt_instances

    truth, ignored, metas = unpack_gt_instances(list(samples))
    return dict(head.loss_by_feat(*outputs, truth, metas, ignored))
