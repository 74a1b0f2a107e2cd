"""``HEADDetector``: a detector that trains with assistants and a teacher, and is a plain student in all else."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from torch import Tensor, nn

from head_kd.assistants import (
    Assistant,
    DenseAssistant,
    Regions,
    RoIAssistant,
    adapter,
    dense_losses,
    sample_regions,
    width_of,
)
from head_kd.cache import TargetCache
from head_kd.checkpoints import read_weights, resolve_config
from head_kd.config import AssistantSettings, Balance, NeckMimic, ProposalSettings, Schedule, from_mapping
from head_kd.losses import PerAnchorLinear, mimic_loss, pkd_loss, ramp
from head_kd.proposals import Proposals, Provenance, center_locations, dense_proposals, gather_at
from head_kd.signals import (
    DenseDecoder,
    box_heads,
    capturing,
    dense_decoder,
    detector_strides,
    head_signals,
    is_two_stage,
    resolve,
)
from head_kd.teacher import Renormalize, TeacherView, load_all
from tenfold import NonFiniteError, UserError

Observer = Callable[[str, Tensor, Tensor], None]
"""Called with the name of a pair of signals, what imitates and what is imitated: (M, D) rows, both before the adapter."""


def touch(*modules: nn.Module | None) -> Tensor:
    """0 that depends on every parameter, so that one that a batch does not use still has a (zero) gradient."""
    parameters = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    return sum((p.sum() * 0 for p in parameters), torch.zeros(()))


class Extras(nn.Module):
    """What only training needs; its keys in a checkpoint begin with ``head_kd.``."""

    step: Tensor
    norms: Tensor
    factors: Tensor

    def __init__(self, assistants: Sequence[Assistant], neck: nn.ModuleList, terms: int) -> None:
        super().__init__()
        self.assistants = nn.ModuleList(assistants)
        self.neck = neck
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("norms", torch.zeros(terms + 1, dtype=torch.float64))
        self.register_buffer("factors", torch.ones(terms, dtype=torch.float64))


@MODELS.register_module()
class HEADDetector(BaseDetector):  # type: ignore[misc]
    """HEAD and TF-HEAD: a student detector with assistant heads on its neck while it trains.

        L = L_gt^S + sum_j ( L_gt^{A_j} + w sum_k lambda_A MSE(phi_k(a_k), t_k) + w lambda_C MSE(psi(s), t) )

    with a_k, t_k the activations of assistant and teacher at the same regions, s the feature of the student's head at
    the cell that a region comes from, and w the schedule. Without a teacher (TF-HEAD), t in the last term is the
    assistant's own activation, and the middle term is absent.

    The student's modules are registered under their own names, the rest under ``head_kd.*``; the teacher is outside of
    parameters, checkpoints and ``train()``. So each checkpoint is one of the plain student with some keys more, and
    ``predict``, ``forward`` and their cost are the student's.

    Args:
        student: config of the student's model.
        assistants: a dict of ``AssistantSettings`` each; without ``head`` the teacher's head is taken.
        teacher: ``dict(config=..., checkpoint=...)``, optionally ``reuse_features`` and ``cache`` (a folder of
            ``TargetCache``: the teacher's head is copied from the checkpoint, but no teacher is built or run); or a
            ``TeacherView``.
        neck_mimic: ``NeckMimic`` settings.
        schedule: ``Schedule`` settings.
        proposals: ``ProposalSettings``, of a one-stage student.
        balance: ``Balance`` settings; None keeps the weights as given.
        rois: student or teacher, whose proposals are the regions.
        seed: of the assistants' initialization and sampling, which draw from streams of their own.
        data_preprocessor: default: the student's.

    Raises:
        UserError: a signal or setting that this pair does not have.
    """

    student: Any
    teacher: TeacherView | None
    _cached_head: nn.Module | None
    head_kd: Extras

    def __init__(
        self,
        student: Mapping[str, Any],
        assistants: Sequence[Mapping[str, Any] | AssistantSettings] = (),
        teacher: Mapping[str, Any] | TeacherView | None = None,
        neck_mimic: Mapping[str, Any] | NeckMimic | None = None,
        schedule: Mapping[str, Any] | Schedule | None = None,
        proposals: Mapping[str, Any] | ProposalSettings | None = None,
        balance: Mapping[str, Any] | Balance | None = None,
        rois: str = "student",
        seed: int = 0,
        data_preprocessor: Any = None,
    ) -> None:
        from mmengine.config import ConfigDict

        config = ConfigDict(copy.deepcopy(dict(student)))
        if data_preprocessor is not None and "data_preprocessor" not in config:
            config["data_preprocessor"] = data_preprocessor
        plain = MODELS.build(config)
        super().__init__(data_preprocessor=plain.data_preprocessor)
        for name, child in plain.named_children():
            if name != "data_preprocessor":
                self.add_module(name, child)
        for name, parameter in plain._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in plain._buffers.items():
            self.register_buffer(name, buffer)
        self.__dict__["student"] = plain  # a plain attribute: no second name for its parameters
        self.schedule = from_mapping(Schedule, schedule, "schedule")
        self.proposal_settings = from_mapping(ProposalSettings, proposals, "proposals")
        self.balance = None if balance is None else from_mapping(Balance, balance, "balance")
        self.seed = int(seed)
        self.observer: Observer | None = None
        self._now: int | None = None
        self.untransferred: dict[str, list[str]] = {}
        self.__dict__["teacher"] = None
        self.cache: TargetCache | None = None
        self._teacher_config: Any = None
        self.__dict__["_cached_head"] = None  # the teacher's RoI head where a cache stands for the rest of it
        self._init_teacher(teacher)
        if rois not in ("student", "teacher"):
            raise UserError(f"rois is '{rois}', expected student or teacher")
        if rois == "teacher" and (self.teacher is None or getattr(self.teacher.detector, "rpn_head", None) is None):
            raise UserError("rois='teacher' needs a teacher with an RPN")
        self.rois = rois
        self.strides = detector_strides(plain)
        settings = [from_mapping(AssistantSettings, a, "assistant") for a in assistants]
        mimic = None if neck_mimic is None else from_mapping(NeckMimic, neck_mimic, "neck_mimic")
        with torch.random.fork_rng(devices=[]):  # so that the student starts as it would alone
            torch.manual_seed(self.seed)
            built = [self._build_assistant(s) for s in settings]
            neck = self._build_neck(mimic)
        self.neck_mimic = mimic
        self._decoder: DenseDecoder | None = None
        if not is_two_stage(plain) and any(isinstance(a, RoIAssistant) for a in built):
            self._decoder = dense_decoder(plain.bbox_head)
        self.head_kd = Extras(built, neck, self._count_terms(built, mimic))

    # ------------------------------------------------------------------ building

    def _init_teacher(self, teacher: Mapping[str, Any] | TeacherView | None) -> None:
        if teacher is None:
            return
        if isinstance(teacher, TeacherView):
            self.__dict__["teacher"] = teacher
        else:
            known = {"config", "checkpoint", "reuse_features", "cache"}
            if unknown := set(teacher) - known:
                raise UserError(f"teacher: unknown setting '{min(unknown)}', known: {', '.join(sorted(known))}")
            if teacher.get("config") is None or teacher.get("checkpoint") is None:
                raise UserError("teacher: config and checkpoint are both needed")
            self._teacher_config = resolve_config(teacher["config"])
            if teacher.get("cache") is not None:
                self.cache = TargetCache.open(teacher["cache"])
                self.__dict__["_cached_head"] = self._head_alone(teacher["checkpoint"])
            else:
                self.__dict__["teacher"] = TeacherView.load(
                    self._teacher_config, teacher["checkpoint"], reuse_features=bool(teacher.get("reuse_features"))
                )
        if self.teacher is not None:
            self.teacher.renormalize = Renormalize(self.data_preprocessor, self.teacher.detector.data_preprocessor)

    def _head_alone(self, checkpoint: Any) -> nn.Module:
        """The teacher's RoI head with its weights, without the rest of the teacher."""
        model = copy.deepcopy(self._teacher_config.model)
        if "roi_head" not in model:
            raise UserError("teacher: a cache holds the activations of a RoI head, which this teacher does not have")
        weights = read_weights(checkpoint)
        self.cache.check_teacher(weights.state_dict)  # type: ignore[union-attr]
        with torch.random.fork_rng(devices=[]):
            head: nn.Module = MODELS.build(
                {**copy.deepcopy(model.roi_head), "test_cfg": model.test_cfg.rcnn, "train_cfg": None}
            )
        prefix = "roi_head."
        load_all(
            head, {k.removeprefix(prefix): v for k, v in weights.state_dict.items() if k.startswith(prefix)}, checkpoint
        )
        return head.requires_grad_(False)

    @property
    def _teacher_head(self) -> nn.Module | None:
        if self.teacher is None:
            return self._cached_head
        detector = self.teacher.detector
        return detector.roi_head if is_two_stage(detector) else detector.bbox_head

    def _teacher_parts(self) -> tuple[Any, Any, Any, str]:
        """Head config, train_cfg, test_cfg and kind of the teacher's head."""
        if self._teacher_config is None:
            raise UserError(
                "an assistant without `head` needs teacher=dict(config=..., checkpoint=...) to copy it from"
            )
        model = self._teacher_config.model
        if "roi_head" in model:
            return model.roi_head, (model.get("train_cfg") or {}).get("rcnn"), model.test_cfg.rcnn, "roi"
        return model.bbox_head, model.get("train_cfg"), model.get("test_cfg"), "dense"

    def _build_assistant(self, settings: AssistantSettings) -> Assistant:
        head, train_cfg, test_cfg = settings.head, settings.train_cfg, None
        if head is None:
            head, own_train, test_cfg, kind = self._teacher_parts()
            if kind != settings.kind:
                raise UserError(f"the teacher's head is of kind {kind}, the assistant's settings say {settings.kind}")
            train_cfg = settings.train_cfg or own_train
        if train_cfg is None and settings.kind == "roi":
            raise UserError(
                "the assistant's head has no train_cfg (assigner and sampler): give it, or a teacher config that trains"
            )
        student = self.student
        with_teacher = self.teacher is not None or self.cache is not None
        if settings.akd_weight and not with_teacher:
            raise UserError("akd_weight needs a teacher: set it to 0 for assistants on labels only and for TF-HEAD")
        channels = self._neck_channels()
        common: dict[str, Any] = {
            "channels": channels,
            "strides": self.strides,
            "num_classes": self.num_classes,
            "with_teacher": with_teacher,
        }
        two_stage = is_two_stage(student)
        if settings.kind == "dense":
            signals = {} if two_stage else self._student_signals()
            return DenseAssistant(settings, head, train_cfg, test_cfg, student_signals=signals, **common)
        signal, shared = None, False
        if two_stage:
            from mmdet.models.roi_heads import StandardRoIHead

            shared = isinstance(student.roi_head, StandardRoIHead)
            if settings.ckd_weight and not shared:
                raise UserError(
                    f"ckd_weight needs the student's regions, and its {type(student.roi_head).__name__} does not give them:"
                    " set it to 0"
                )
        if settings.ckd_weight:
            box_head = box_heads(student.roi_head)[0] if two_stage else student.bbox_head
            name = settings.ckd_student or (list(head_signals(box_head)) or [""])[-1 if two_stage else 0]
            settings = dataclasses.replace(settings, ckd_student=name)
            signal = width_of(resolve(box_head, [name], "the student's head")[name], name)
        anchors = 1 if two_stage else int(student.bbox_head.num_base_priors)
        return RoIAssistant(
            settings,
            head,
            train_cfg,
            test_cfg,
            student_signal=signal,
            num_anchors=anchors,
            shared_sample=shared,
            **common,
        )

    def _build_neck(self, mimic: NeckMimic | None) -> nn.ModuleList:
        """One 1x1 convolution for each pair of levels with equal strides."""
        self._neck_pairs: list[tuple[int, int]] = []
        if mimic is None:
            return nn.ModuleList()
        if self.teacher is None:
            raise UserError("neck_mimic needs a teacher that runs")
        theirs = detector_strides(self.teacher.detector)
        self._neck_pairs = [(self.strides.index(s), theirs.index(s)) for s in self.strides if s in theirs]
        if not self._neck_pairs:
            raise UserError(
                f"neck_mimic: student strides {self.strides} and teacher strides {theirs} have none in common"
            )
        own, wanted = self._neck_channels(), _neck_channels(self.teacher.detector)
        if mimic.kind == "pkd" and own == wanted:
            return nn.ModuleList()  # correlations need no adapter
        return nn.ModuleList(adapter((own, True), (wanted, True)) for _ in self._neck_pairs)

    def _neck_channels(self) -> int:
        return _neck_channels(self.student)

    def _student_signals(self) -> dict[str, tuple[int, bool]]:
        head = self.student.bbox_head
        names = list(head_signals(head))
        return {name: width_of(m, name) for name, m in resolve(head, names, "the student's head").items()}

    @staticmethod
    def _count_terms(assistants: Sequence[Assistant], mimic: NeckMimic | None) -> int:
        return sum(len(a.akd) + (a.ckd is not None) for a in assistants) + (mimic is not None)

    @property
    def num_classes(self) -> int:
        """Classes of the student's head."""
        head: Any = box_heads(self.student.roi_head)[0] if is_two_stage(self.student) else self.student.bbox_head
        return int(head.num_classes)

    # ------------------------------------------------------------------ life of the module

    def _apply(self, fn: Any, recurse: bool = True) -> "HEADDetector":
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher.apply(fn)
        if self._cached_head is not None:
            self._cached_head._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> "HEADDetector":
        """Train or evaluate the student; the teacher stays in eval mode."""
        super().train(mode)
        self.student.train(mode)
        if self.teacher is not None:
            self.teacher.detector.eval()
        return self

    def init_weights(self) -> None:
        """Initialize the student as it would be alone, then the assistants, then copy the teacher's heads into them."""
        self.student.init_weights()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for assistant in self.assistants:
                assistant.head.init_weights()
        self.transfer()
        self._is_init = True

    def transfer(self) -> None:
        """Copy the teacher's head into each assistant that asks for it; what does not fit is in ``untransferred``."""
        if self._teacher_head is None:
            return
        for number, assistant in enumerate(self.assistants):
            wanted = assistant.settings.transfer and assistant.settings.head is None
            same = type(assistant.head) is type(self._teacher_head)
            if wanted or (assistant.settings.transfer and same):
                self.untransferred[f"assistant{number}"] = assistant.transfer_from(self._teacher_head)

    @property
    def assistants(self) -> list[Assistant]:
        """The assistant heads."""
        return list(self.head_kd.assistants)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ what a detector does

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        """The student's feature maps."""
        return self.student.extract_feat(batch_inputs)

    def predict(self, batch_inputs: Tensor, batch_data_samples: Any, rescale: bool = True) -> Any:
        """The student's detections."""
        return self.student.predict(batch_inputs, batch_data_samples, rescale=rescale)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> Any:
        return self.student._forward(batch_inputs, batch_data_samples)

    @property
    def step(self) -> int:
        """Training steps so far; saved with the model."""
        return int(self.head_kd.step) if self._now is None else self._now

    def weight(self) -> float:
        """w of the current step."""
        s = self.schedule
        return ramp(self.step, warmup=s.warmup, start=s.start, stop=s.stop)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Tensor]:
        """Losses of a batch by name; those with "loss" in their name are summed by mmengine, the rest is logged.

        Raises:
            NonFiniteError: a loss is NaN or infinite; the message names it and the step.
        """
        self._now = int(self.head_kd.step)  # read once: on a GPU each reading waits for it
        try:
            return self._loss(batch_inputs, batch_data_samples)
        finally:
            self._now = None

    def _loss(self, batch: Tensor, samples: list[Any]) -> dict[str, Tensor]:
        features = list(self.student.extract_feat(batch))
        losses, terms = self._losses(batch, features, samples)
        if self.balance is not None and self.training and terms:
            self._measure(losses, terms, features)
        w = self.weight()
        for number, (name, value) in enumerate(terms.items()):
            factor = self.head_kd.factors[number].to(value.dtype) if self.balance is not None else 1.0
            losses[name] = value * factor * w
        self._check_finite(losses)
        if self.training:
            self.head_kd.step += 1
        return losses

    def _check_finite(self, losses: Mapping[str, Any]) -> None:
        parts = {
            name: torch.stack(
                [v.detach().float().sum() for v in (value if isinstance(value, list | tuple) else [value])]
            ).sum()
            for name, value in losses.items()
            if "loss" in name
        }
        if bool(torch.isfinite(torch.stack(list(parts.values()))).all()):
            return
        name = next(name for name, value in parts.items() if not bool(torch.isfinite(value)))
        raise NonFiniteError(f"{name} is not finite at step {self.step}: lower the learning rate or its weight")

    def _losses(
        self, batch: Tensor, features: list[Tensor], samples: list[Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Detection losses of student and assistants, and the distillation terms without schedule and balance."""
        losses: dict[str, Any] = {}
        terms: dict[str, Tensor] = {}
        active = self.weight() > 0 or not self._stopped
        wanted = sorted({a.ckd_names[0] for a in self.assistants if a.ckd is not None and active})
        needs_rois = any(isinstance(a, RoIAssistant) for a in self.assistants)
        seen: dict[str, list[Tensor]] = {}
        proposals: list[Proposals] = []
        shared: Regions | None = None
        if is_two_stage(self.student):
            losses, proposals, shared, seen = self._two_stage(features, samples, wanted)
        else:
            head = self.student.bbox_head
            with capturing(resolve(head, wanted, "the student's head")) as seen:
                outputs = head(tuple(features))
            losses = dense_losses(head, outputs, samples)
            if needs_rois and self.cache is None and self.rois == "student":
                proposals = self._propose(outputs, samples)
        if not self.assistants and not self._neck_pairs:
            return losses, terms
        maps = self._teacher_maps(batch, samples) if active or self.rois == "teacher" else None
        if self.rois == "teacher" and needs_rois:
            proposals = self._teacher_proposals(maps, samples)
        for number, assistant in enumerate(self.assistants):
            if isinstance(assistant, RoIAssistant):
                found, more = self._roi_assistant(
                    number, assistant, features, samples, proposals, shared, seen, maps, active
                )
            else:
                assert isinstance(assistant, DenseAssistant)
                found, more = self._dense_assistant(number, assistant, features, samples, seen, maps, active)
            losses |= found
            terms |= more
        if self.neck_mimic is not None:
            terms["neck.loss_mimic"] = self._neck_loss(features, maps) if maps is not None else touch(self.head_kd.neck)
        return losses, terms

    @property
    def _stopped(self) -> bool:
        return self.schedule.stop is not None and self.step >= self.schedule.stop

    def _teacher_maps(self, batch: Tensor, samples: Sequence[Any]) -> list[Tensor] | None:
        uses = (
            self.rois == "teacher"
            or bool(self._neck_pairs)
            or any(len(a.akd) or a.ckd is not None for a in self.assistants)
        )
        return self.teacher.features(batch, samples) if self.teacher is not None and uses else None

    # ------------------------------------------------------------------ the student's part

    def _two_stage(
        self, features: list[Tensor], samples: list[Any], wanted: Sequence[str]
    ) -> tuple[dict[str, Any], list[Proposals], Regions | None, dict[str, list[Tensor]]]:
        """RPN and RoI head of the student, step by step as in mmdet, so that regions and activations are seen."""
        from mmdet.models.roi_heads import StandardRoIHead

        student = self.student
        if getattr(student.roi_head, "with_mask", False):
            raise UserError("instance masks are not supported: take a student without mask head")
        settings = student.train_cfg.get("rpn_proposal", student.test_cfg.rpn)
        rpn_samples = copy.deepcopy(samples)
        for sample in rpn_samples:
            sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
        rpn_losses, results = student.rpn_head.loss_and_predict(tuple(features), rpn_samples, proposal_cfg=settings)
        losses = {(f"rpn_{k}" if "loss" in k and "rpn" not in k else k): v for k, v in rpn_losses.items()}
        proposals = [
            Proposals(r.bboxes.detach(), r.scores.detach(), Provenance.none(len(r.bboxes), r.bboxes.device))
            for r in results
        ]
        if not isinstance(student.roi_head, StandardRoIHead):
            return losses | student.roi_head.loss(tuple(features), results, samples), proposals, None, {}
        head = student.roi_head
        regions = sample_regions(head.bbox_assigner, head.bbox_sampler, proposals, samples, features)
        with capturing(resolve(head.bbox_head, wanted, "the student's box head")) as seen:
            losses |= head.bbox_loss(tuple(features), regions.sampling)["loss_bbox"]
        return losses, proposals, regions, seen

    def _propose(self, outputs: Any, samples: Sequence[Any]) -> list[Proposals]:
        decoder = self._decoder
        assert decoder is not None
        logits, predictions = [t.detach() for t in outputs[0]], [t.detach() for t in outputs[1]]
        sizes = [tuple(t.shape[2:]) for t in logits]
        return dense_proposals(
            logits,
            predictions,
            decoder.priors(sizes, logits[0].device),
            decoder.decode,
            [s.metainfo["img_shape"][:2] for s in samples],
            **dataclasses.asdict(self.proposal_settings),
        )

    @torch.no_grad()
    def _teacher_proposals(self, maps: list[Tensor] | None, samples: list[Any]) -> list[Proposals]:
        assert self.teacher is not None
        found = self.teacher.detector.rpn_head.predict(maps, samples, rescale=False)
        return [Proposals(r.bboxes, r.scores, Provenance.none(len(r.bboxes), r.bboxes.device)) for r in found]

    # ------------------------------------------------------------------ assistants

    def _roi_assistant(
        self,
        number: int,
        assistant: RoIAssistant,
        features: list[Tensor],
        samples: list[Any],
        proposals: list[Proposals],
        shared: Regions | None,
        seen: Mapping[str, list[Tensor]],
        maps: list[Tensor] | None,
        active: bool,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = assistant.settings
        cached: list[dict[str, Tensor]] | None = None
        if self.cache is not None:
            proposals, cached = self.cache.regions(samples, features[0].device)
        if shared is not None and cached is None:
            regions = shared
        else:
            with torch.random.fork_rng(devices=[]):  # the samplers draw from the CPU's stream
                torch.manual_seed(self._stream(number))
                regions = assistant.sample(proposals, samples, features, cached=cached is not None)
        runs = (
            settings.detection_weight > 0
            or len(assistant.akd) > 0
            or (assistant.ckd is not None and maps is None and cached is None)
        )
        losses: dict[str, Any] = {}
        terms: dict[str, Tensor] = {}
        rois, signals = [regions.rois], [{}]  # type: list[Tensor], list[dict[str, Tensor]]
        if runs:
            found, rois, signals = assistant(features, regions, samples)
            factor = settings.detection_weight * (self.weight() if settings.ramp_detection else 1.0)
            losses = {f"assist{number}.{k}": v * factor if "loss" in k else v for k, v in found.items()}
            losses[f"assist{number}.loss_unused"] = touch(assistant.head, assistant.bridge)
        targets = self._targets(assistant, regions, rois, maps, cached) if active else []
        for stage in range(assistant.num_stages if len(assistant.akd) else 0):
            for name in assistant.akd_names:
                phi = assistant.adapter_of(stage, name)
                key = f"akd{number}.loss_s{stage}_{name}" if assistant.num_stages > 1 else f"akd{number}.loss_{name}"
                value = touch(phi)
                if stage < len(targets) and stage < len(signals):
                    own, target = signals[stage][name], targets[stage][name]
                    self._observe(f"akd{number}.{name}" + (f".s{stage}" if stage else ""), own, target)
                    value = value + mimic_loss(phi(own), target, normalize=settings.normalize)
                terms[key] = settings.akd_weight * value
        if assistant.ckd is not None:
            value = touch(assistant.ckd)
            goal: Tensor | None = None
            if targets:
                goal = targets[0][assistant.ckd_names[1]]
            elif active and signals[0] and self.teacher is None and self.cache is None:
                goal = signals[0][assistant.ckd_names[1]].detach()
            if goal is not None:
                value = value + self._ckd(assistant, regions, seen, features, goal, number)
            terms[f"ckd{number}.loss"] = settings.ckd_weight * value
        return losses, terms

    def _targets(
        self,
        assistant: RoIAssistant,
        regions: Regions,
        rois: Sequence[Tensor],
        maps: list[Tensor] | None,
        cached: list[dict[str, Tensor]] | None,
    ) -> list[dict[str, Tensor]]:
        """The teacher's activations at the regions of each stage."""
        if not len(assistant.akd) and assistant.ckd is None:
            return []
        names = sorted({*(assistant.akd_names if len(assistant.akd) else ()), assistant.ckd_names[1]} - {""})
        if cached is not None:
            image = regions.image
            return [
                {
                    name: torch.cat([c[name][regions.index[image == i]] for i, c in enumerate(cached)]).float()
                    for name in names
                }
            ]
        if maps is None or self.teacher is None:
            return []
        stages = min(len(rois), len(box_heads(self.teacher.detector.roi_head)))
        return [self.teacher.at_rois(maps, rois[stage], names, stage) for stage in range(stages)]

    def _ckd(
        self,
        assistant: RoIAssistant,
        regions: Regions,
        seen: Mapping[str, list[Tensor]],
        features: Sequence[Tensor],
        target: Tensor,
        number: int,
    ) -> Tensor:
        settings, psi = assistant.settings, assistant.ckd
        assert psi is not None
        signal = seen[settings.ckd_student or ""]
        keep = regions.positive if settings.ckd_on == "positive" else torch.ones_like(regions.positive)
        if is_two_stage(self.student):
            rows = keep.nonzero().squeeze(1)
            own = signal[0].flatten(1)[rows]
            self._observe(f"ckd{number}", own, target[rows])
            return mimic_loss(psi(own), target[rows], normalize=settings.normalize)
        where = regions.provenance
        if settings.match == "center" or self.cache is not None or self.rois == "teacher":
            where = center_locations(regions.rois[:, 1:], self.strides, [tuple(m.shape[2:]) for m in features])  # type: ignore[misc]
        rows = (keep & (where.level >= 0)).nonzero().squeeze(1)
        where = where[rows]
        own = gather_at(signal, regions.image[rows], where)
        self._observe(f"ckd{number}", own, target[rows])
        predicted = psi(own, where.anchor) if isinstance(psi, PerAnchorLinear) else psi(own)
        return mimic_loss(predicted, target[rows], normalize=settings.normalize)

    def _dense_assistant(
        self,
        number: int,
        assistant: DenseAssistant,
        features: list[Tensor],
        samples: list[Any],
        seen: Mapping[str, list[Tensor]],
        maps: list[Tensor] | None,
        active: bool,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = assistant.settings
        losses: dict[str, Any] = {}
        terms: dict[str, Tensor] = {}
        found, signals = assistant(features, samples)
        factor = settings.detection_weight * (self.weight() if settings.ramp_detection else 1.0)
        for key, value in found.items():
            many = isinstance(value, list | tuple)
            losses[f"assist{number}.{key}"] = [v * factor for v in value] if many else value * factor
        losses[f"assist{number}.loss_unused"] = touch(assistant.head, assistant.bridge)
        targets: dict[str, list[Tensor]] | None = None
        if active and maps is not None and self.teacher is not None:
            names = sorted({*(assistant.akd_names if len(assistant.akd) else ()), assistant.ckd_names[1]} - {""})
            targets = self.teacher.at_maps(maps, names) if names else None
        for name in assistant.akd_names if len(assistant.akd) else ():
            phi = assistant.adapter_of(name)
            value = touch(phi)
            if targets is not None:
                for own, target in zip(signals[name], targets[name], strict=True):
                    value = value + mimic_loss(phi(own), _fit(target, own), normalize=settings.normalize)
                self._observe(
                    f"akd{number}.{name}", _rows(signals[name][0]), _rows(_fit(targets[name][0], signals[name][0]))
                )
            terms[f"akd{number}.loss_{name}"] = settings.akd_weight * value
        if assistant.ckd is not None:
            value = touch(assistant.ckd)
            goal = targets[assistant.ckd_names[1]] if targets is not None else None
            if goal is None and active and self.teacher is None:
                goal = [t.detach() for t in signals[assistant.ckd_names[1]]]
            if goal is not None:
                student = seen[assistant.ckd_names[0]]
                for level, target in zip(assistant.levels, goal, strict=True):
                    if level is not None:
                        own = student[level]
                        value = value + mimic_loss(assistant.ckd(own), _fit(target, own), normalize=settings.normalize)
                first = assistant.levels[0]
                assert first is not None
                self._observe(f"ckd{number}", _rows(student[first]), _rows(_fit(goal[0], student[first])))
            terms[f"ckd{number}.loss"] = settings.ckd_weight * value
        return losses, terms

    def _neck_loss(self, features: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        mimic = self.neck_mimic
        assert mimic is not None
        total = touch(self.head_kd.neck)
        for pair, (own, theirs) in enumerate(self._neck_pairs):
            value = features[own].float()
            if len(self.head_kd.neck):
                value = self.head_kd.neck[pair](value)
            target = _fit(maps[theirs], value)
            total = total + (
                pkd_loss(value, target) if mimic.kind == "pkd" else mimic_loss(value, target, normalize=mimic.normalize)
            )
            self._observe(f"neck.{own}", _rows(features[own]), _rows(target))
        return mimic.weight * total

    def _observe(self, name: str, own: Tensor, target: Tensor) -> None:
        if self.observer is not None:
            self.observer(name, own.detach(), target.detach())

    def _stream(self, number: int) -> int:
        """Seed of an assistant's sampler: its own for each step and process."""
        from mmengine.dist import get_rank

        return hash((self.seed, self.step, get_rank(), number)) % 2**63

    # ------------------------------------------------------------------ balance

    def gradient_norms(
        self, losses: Mapping[str, Any], terms: Mapping[str, Tensor], features: Sequence[Tensor]
    ) -> Tensor:
        """Norm of the gradient at the student's maps: of the student's detection loss first, then of each term."""
        detection = sum(
            torch.as_tensor(v).mean() if isinstance(v, Tensor) else sum(x.mean() for x in v)
            for k, v in losses.items()
            if "loss" in k and not k.startswith(("assist", "akd", "ckd", "neck"))
        )
        norms = []
        for value in (detection, *terms.values()):
            if not isinstance(value, Tensor) or not value.requires_grad:
                norms.append(torch.zeros((), dtype=torch.float64))
                continue
            grads = torch.autograd.grad(value, features, retain_graph=True, allow_unused=True)
            norms.append(
                torch.stack([g.double().square().sum().cpu() for g in grads if g is not None] or [torch.zeros(())])
                .sum()
                .sqrt()
            )
        return torch.stack(norms)

    def _measure(self, losses: Mapping[str, Any], terms: Mapping[str, Tensor], features: Sequence[Tensor]) -> None:
        """Average the norms over the first iterations, then freeze factors that give each term its share."""
        balance = self.balance
        assert balance is not None
        if self.step >= balance.iterations:
            return
        self.head_kd.norms += self.gradient_norms(losses, terms, features).to(self.head_kd.norms.device)
        norms = self.head_kd.norms
        from mmengine.dist import all_reduce

        total = norms.clone()
        all_reduce(total)
        share = balance.ratio / max(1, len(terms))
        known = total[1:] > 0
        self.head_kd.factors.copy_(
            torch.where(known, share * total[0] / total[1:].clamp_min(1e-30), torch.ones_like(total[1:]))
        )


def _fit(target: Tensor, own: Tensor) -> Tensor:
    """A map resized where the teacher's has another size (odd image sizes, other paddings)."""
    if target.shape[2:] == own.shape[2:]:
        return target
    return nn.functional.interpolate(target, own.shape[2:], mode="bilinear")


def _rows(feature_map: Tensor) -> Tensor:
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


def _neck_channels(detector: Any) -> int:
    neck = getattr(detector, "neck", None)
    channels = getattr(neck, "out_channels", None)
    if channels is None:
        head = getattr(detector, "bbox_head", None) or detector.rpn_head
        channels = getattr(head, "in_channels", None)
    if not isinstance(channels, int):
        raise UserError(f"{type(detector).__name__}: its neck does not say how many channels it gives")
    return channels
