"""An R-CNN or cascade head as assistant: it sees the student's maps at regions, the teacher's head at the same ones.

Letters: M regions of a batch, K boxes of an image, D features of an activation, C channels of a neck.
"""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import ConfigDict
from torch import Tensor, nn

from head_kd.assistants import Assistant, Step, Terms, adapter, touch, width_of
from head_kd.config import AssistantSettings
from head_kd.losses import PerAnchorLinear, mimic_loss
from head_kd.proposals import Proposals, Provenance, center_locations, gather_at
from head_kd.regions import Regions, sample_regions
from head_kd.signals import (
    box_heads,
    capturing,
    detector_strides,
    forward_stage,
    gives_regions,
    head_signals,
    is_two_stage,
    neck_channels,
    num_classes,
    resolve,
)
from tenfold import UserError
from tenfold.randomness import keyed


class RoIAssistant(Assistant):
    """A RoI head on the student's neck.

    Args:
        settings: what it is and what is distilled.
        head: config of the RoI head, without train_cfg.
        train_cfg: assigner and sampler (a list of them for a cascade).
        test_cfg: settings of the R-CNN stage's detections.
        student: the detector on whose neck it stands.
        with_teacher: whether there are targets for AKD.

    Raises:
        UserError: the student lacks the maps, the signal or the regions that the settings ask for.

    Source: Wang et al., ECCV 2022 (AKD: imitation between the assistant and the teacher's head; CKD: of the teacher's head by
    the student's); layers, weights and the adapters' biases as in the authors' code.
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
        self_sampling = is_two_stage(student) and gives_regions(student)
        ckd_student, ckd_width = _student_signal(settings, student)
        config = ConfigDict(copy.deepcopy(dict(head)))
        for mask in ("mask_roi_extractor", "mask_head"):  # instance masks are no part of this
            config.pop(mask, None)
        extractors = _listed(config["bbox_roi_extractor"])
        super().__init__(settings, neck_channels(student), int(extractors[0]["out_channels"]))
        self.shared_sample = self_sampling
        self._fit_to_neck(extractors, detector_strides(student))
        for box_head in _listed(config["bbox_head"]):
            box_head["num_classes"] = num_classes(student)
            box_head["in_channels"] = self.in_channels
        train_cfg = ConfigDict(stages=copy.deepcopy(train_cfg)).stages
        stages = _listed(train_cfg)
        if settings.rois_per_image is not None:
            for stage in stages:
                stage["sampler"]["num"] = settings.rois_per_image
        self.head = MODELS.build(ConfigDict({**config, "train_cfg": train_cfg, "test_cfg": test_cfg}))
        self.num_stages = len(box_heads(self.head))
        sampler = {**stages[0]["sampler"], "add_gt_as_proposals": False}
        self._cache_sampler = TASK_UTILS.build(sampler, default_args={"context": self.head})
        if settings.per_anchor and self.shared_sample:
            raise UserError("per_anchor needs a one-stage student")
        first = box_heads(self.head)[0]
        self.akd_names = self.names(first)
        if settings.akd_weight or settings.ckd_weight:
            consumers = resolve(first, self.akd_names, "the assistant's box head")
            widths = {name: (width_of(module, name)[0], False) for name, module in consumers.items()}
            if settings.akd_weight and with_teacher:
                for stage_number in range(self.num_stages):
                    for name, width in widths.items():
                        self.akd[self._key(stage_number, name)] = adapter(width, width)
        if settings.ckd_weight:
            target = settings.ckd_target or self.akd_names[-1]
            goal = width_of(resolve(first, [target], "the assistant's box head")[target], target)[0]
            self.ckd_names = (ckd_student, target)
            if settings.per_anchor:
                self.ckd = PerAnchorLinear(int(student.bbox_head.num_base_priors), ckd_width, goal)
            else:  # the authors' cascade pair has no bias here
                self.ckd = adapter((ckd_width, False), (goal, False), bias=not self.shared_sample)

    def _fit_to_neck(self, extractors: list[Any], strides: list[int]) -> None:
        """Let the configs of RoI extractors take the first of the student's maps, all where it has fewer."""
        own = strides[: len(extractors[0]["featmap_strides"])]
        for extractor in extractors:
            if self.settings.align_strides:
                factor = own[0] / extractor["featmap_strides"][0]
                extractor["finest_scale"] = extractor.get("finest_scale", 56) * factor
            extractor["featmap_strides"] = own
            extractor["out_channels"] = self.in_channels

    @staticmethod
    def _key(stage: int, name: str) -> str:
        return f"s{stage}_{name}".replace(".", "_")

    def sample(
        self, proposals: Sequence[Proposals], samples: Sequence[Any], features: Sequence[Tensor], *, cached: bool
    ) -> Regions:
        """Regions for its first stage; cached boxes hold the ground truth already, so none is added to them."""
        assigner, sampler = _listed(self.head.bbox_assigner)[0], _listed(self.head.bbox_sampler)[0]
        return sample_regions(assigner, self._cache_sampler if cached else sampler, proposals, samples, features)

    def forward(
        self, features: Sequence[Tensor], regions: Regions, samples: Sequence[Any]
    ) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """Detection losses, regions and activations of each stage.

        Returns:
            losses by mmdet's names, rois (M, 5) of each stage, and for each stage signal -> (M, D).
        """
        maps = self.maps(features)
        if isinstance(self.head.bbox_head, nn.ModuleList):
            return self._cascade(maps, regions, samples)
        with capturing(resolve(self.head.bbox_head, self.captured, "the assistant's box head")) as seen:
            losses = dict(self.head.bbox_loss(maps, regions.sampling)["loss_bbox"])
        return losses, [regions.rois], [{name: values[0].flatten(1) for name, values in seen.items()}]

    def _cascade(
        self, maps: list[Tensor], regions: Regions, samples: Sequence[Any]
    ) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """The stages one after the other: each samples from the boxes that the one before has refined."""
        metas = [sample.metainfo for sample in samples]
        heads = box_heads(self.head)
        losses: dict[str, Tensor] = {}
        rois, signals = [regions.rois], []
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
            with capturing(resolve(heads[stage], self.captured, "the assistant's box head")) as seen:
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

    def terms(self, step: Step, number: int) -> Terms:
        """Detection losses at its regions, AKD of each stage and signal, and CKD of the student's head.

        Args:
            step: what the step has computed so far.
            number: its place among the assistants, which the names of its losses hold.
        """
        regions = self._regions(step, number)
        losses: dict[str, Any] = {}
        rois, signals = [regions.rois], [{}]  # type: list[Tensor], list[dict[str, Tensor]]
        teaches_itself = self.ckd is not None and step.maps is None and step.targets is None
        if self.settings.detection_weight > 0 or len(self.akd) > 0 or teaches_itself:
            found, rois, signals = self(step.features, regions, step.samples)
            losses = self.detection(found, step, number)
        targets = self._targets(step, regions, rois) if step.active else []
        terms = self._akd_terms(step, number, signals, targets)
        if self.ckd is not None:
            value = touch(self.ckd)
            goal: Tensor | None = None
            if targets:
                goal = targets[0][self.ckd_names[1]]
            elif step.active and signals[0] and step.teacher is None and step.targets is None:
                goal = signals[0][self.ckd_names[1]].detach()
            if goal is not None:
                value = value + self._ckd_term(step, number, regions, goal)
            terms[f"ckd{number}.loss"] = self.settings.ckd_weight * value
        return losses, terms

    def _regions(self, step: Step, number: int) -> Regions:
        if step.regions is not None and step.targets is None:
            return step.regions
        with keyed(*step.key, number):  # the samplers draw from the CPU's stream
            return self.sample(step.proposals, step.samples, step.features, cached=step.targets is not None)

    def _targets(self, step: Step, regions: Regions, rois: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The teacher's activations at the regions of each stage."""
        if not self.imitates:
            return []
        if step.targets is not None:
            rows = [regions.index[regions.image == i] for i in range(len(step.targets))]
            cached = list(zip(step.targets, rows, strict=True))
            return [{name: torch.cat([found[name][r] for found, r in cached]).float() for name in self.imitated}]
        if step.maps is None or step.teacher is None:
            return []
        stages = min(len(rois), len(box_heads(step.teacher.detector.roi_head)))
        return [step.teacher.at_rois(step.maps, rois[stage], self.imitated, stage) for stage in range(stages)]

    def _akd_terms(
        self, step: Step, number: int, signals: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """lambda_A MSE(phi(a), t) of each stage and signal; 0 where there is no target."""
        terms = {}
        for stage in range(self.num_stages if len(self.akd) else 0):
            for name in self.akd_names:
                phi = self.akd[self._key(stage, name)]
                key = f"akd{number}.loss_s{stage}_{name}" if self.num_stages > 1 else f"akd{number}.loss_{name}"
                value = touch(phi)
                if stage < len(targets) and stage < len(signals):
                    own, target = signals[stage][name], targets[stage][name]
                    step.observe(f"akd{number}.{name}" + (f".s{stage}" if stage else ""), own, target)
                    value = value + mimic_loss(phi(own), target, normalize=self.settings.normalize)
                terms[key] = self.settings.akd_weight * value
        return terms

    def _ckd_term(self, step: Step, number: int, regions: Regions, target: Tensor) -> Tensor:
        """MSE(psi(s), t): of a two-stage student at its own regions, of a one-stage one at the cells of regions."""
        psi = self.ckd
        assert psi is not None
        signal = step.signals[self.ckd_names[0]]
        keep = regions.positive if self.settings.ckd_on == "positive" else torch.ones_like(regions.positive)
        if self.shared_sample:
            rows = keep.nonzero().squeeze(1)
            own = signal[0].flatten(1)[rows]
            predicted = psi(own)
        else:
            where = regions.provenance
            if self.settings.match == "center" or not step.located:
                sizes = [(m.shape[2], m.shape[3]) for m in step.features]
                where = center_locations(regions.rois[:, 1:], step.strides, sizes)
            rows = (keep & (where.level >= 0)).nonzero().squeeze(1)
            where = where[rows]
            own = gather_at(signal, regions.image[rows], where)
            predicted = psi(own, where.anchor) if isinstance(psi, PerAnchorLinear) else psi(own)
        step.observe(f"ckd{number}", own, target[rows])
        return mimic_loss(predicted, target[rows], normalize=self.settings.normalize)


def _listed(value: Any) -> list[Any]:
    """A cascade's list as it is, what an R-CNN has one of as a list of one."""
    return value if isinstance(value, list) else [value]


def _student_signal(settings: AssistantSettings, student: Any) -> tuple[str, int]:
    """Name and features D of the student head's signal that CKD reads; nothing where there is no CKD."""
    if not settings.ckd_weight:
        return "", 0
    two_stage = is_two_stage(student)
    if two_stage and not gives_regions(student):
        raise UserError(
            f"ckd_weight needs the student's regions, and its {type(student.roi_head).__name__} does not give them:"
            " set it to 0"
        )
    head: Any = box_heads(student.roi_head)[0] if two_stage else student.bbox_head
    name = settings.ckd_student or (list(head_signals(head)) or [""])[-1 if two_stage else 0]
    return name, width_of(resolve(head, [name], "the student's head")[name], name)[0]
