"""``HEADDetector``: a detector that trains with assistants and a teacher, and is a plain student in all else."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.dist import all_reduce, get_rank
from torch import Tensor, nn

from head_kd.assistants import Assistant, Observer, Step, Terms, touch
from head_kd.balance import gradient_norms, shared_factors
from head_kd.cache import TargetCache
from head_kd.checkpoints import read_weights
from head_kd.config import AssistantSettings, Balance, NeckMimic, ProposalSettings, Schedule, from_mapping
from head_kd.configs import resolve_config
from head_kd.decoders import DenseDecoder, dense_decoder
from head_kd.dense_assistant import DenseAssistant
from head_kd.losses import ramp
from head_kd.neck import NeckImitation
from head_kd.proposals import Proposals
from head_kd.roi_assistant import RoIAssistant
from head_kd.signals import detector_strides, is_two_stage
from head_kd.student import StudentPass, one_stage, two_stage, unlocated
from head_kd.teacher import Renormalize, TeacherView, head_config, load_roi_head, normalization
from tenfold import NonFiniteError, UserError


class Extras(nn.Module):
    """What only training needs; its keys in a checkpoint begin with ``head_kd.``."""

    step: Tensor
    norms: Tensor
    factors: Tensor

    def __init__(self, assistants: Sequence[Assistant], neck: NeckImitation | None) -> None:
        super().__init__()
        self.assistants = nn.ModuleList(assistants)
        self.neck = neck
        terms = sum(len(a.akd) + (a.ckd is not None) for a in assistants) + (neck is not None)
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
        assistants: ``AssistantSettings``, or a dict of them each; without ``head`` the teacher's head is taken.
        teacher: ``dict(config=..., checkpoint=...)``, optionally ``reuse_features`` and ``cache`` (a folder of
            ``TargetCache``: the teacher's head is copied from the checkpoint, but no teacher is built or run); or a
            ``TeacherView``.
        neck_mimic: ``NeckMimic`` settings.
        schedule: ``Schedule`` settings.
        proposals: ``ProposalSettings`` of a one-stage student.
        balance: ``Balance`` settings; None keeps the weights as given.
        rois: student or teacher, whose proposals are the regions.
        seed: seed of the assistants' initialization and sampling, which draw from streams of their own.
        data_preprocessor: default: the student's.

    Raises:
        UserError: a signal or setting that this pair does not have.

    Source: Wang et al., ECCV 2022, and the authors' released code.

    Example:
        >>> import head_kd.ops_fallback
        >>> from head_kd import pair, small
        >>> from mmdet.registry import MODELS
        >>> from mmdet.utils import register_all_modules
        >>> from mmengine.config import Config
        >>> register_all_modules()
        >>> cfg = pair(Config({"model": small.retinanet()}), Config({"model": small.faster_rcnn()}), method="assist")
        >>> sorted({name.split(".")[0] for name, _ in MODELS.build(cfg.model).named_children()})
        ['backbone', 'bbox_head', 'data_preprocessor', 'head_kd', 'neck']
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
        with torch.random.fork_rng(devices=[]):  # so that the student starts as it would alone
            torch.manual_seed(self.seed)
            built = [self._build_assistant(s) for s in settings]
            neck = None if neck_mimic is None else self._build_neck(from_mapping(NeckMimic, neck_mimic, "neck_mimic"))
        self._takes_regions = any(isinstance(a, RoIAssistant) for a in built)
        self._decoder: DenseDecoder | None = None
        if self._takes_regions and not is_two_stage(plain):
            self._decoder = dense_decoder(plain.bbox_head)
        self.head_kd = Extras(built, neck)

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
            self._teacher_config, checkpoint = resolve_config(teacher["config"]), teacher["checkpoint"]
            if teacher.get("cache") is not None:
                self.cache = TargetCache.open(teacher["cache"])
                weights = read_weights(checkpoint)
                preprocessor = MODELS.build(
                    self._teacher_config.model.get("data_preprocessor") or {"type": "DetDataPreprocessor"}
                )
                self.cache.check_teacher(weights.state_dict, normalization(preprocessor))
                self.__dict__["_cached_head"] = load_roi_head(self._teacher_config, weights, checkpoint)
            else:
                self.__dict__["teacher"] = TeacherView.load(
                    self._teacher_config, checkpoint, reuse_features=bool(teacher.get("reuse_features"))
                )
        if self.teacher is not None:
            self.teacher.renormalize = Renormalize(self.data_preprocessor, self.teacher.detector.data_preprocessor)

    @property
    def _teacher_head(self) -> nn.Module | None:
        if self.teacher is None:
            return self._cached_head
        detector = self.teacher.detector
        return detector.roi_head if is_two_stage(detector) else detector.bbox_head

    def _build_assistant(self, settings: AssistantSettings) -> Assistant:
        head, train_cfg, test_cfg = settings.head, settings.train_cfg, None
        if head is None:
            if self._teacher_config is None:
                raise UserError(
                    "an assistant without `head` needs teacher=dict(config=..., checkpoint=...) to copy it from"
                )
            theirs = head_config(self._teacher_config)
            if theirs.kind != settings.kind:
                raise UserError(
                    f"the teacher's head is of kind {theirs.kind}, the assistant's settings say {settings.kind}"
                )
            head, train_cfg, test_cfg = theirs.head, settings.train_cfg or theirs.train_cfg, theirs.test_cfg
        if train_cfg is None and settings.kind == "roi":
            raise UserError(
                "the assistant's head has no train_cfg (assigner and sampler): give it, or a teacher config that trains"
            )
        with_teacher = self.teacher is not None or self.cache is not None
        if settings.akd_weight and not with_teacher:
            raise UserError("akd_weight needs a teacher: set it to 0 for assistants on labels only and for TF-HEAD")
        if self.cache is not None and settings.ckd_weight and is_two_stage(self.student):
            raise UserError(
                "ckd_weight: a cache has no targets at the regions that a two-stage student samples for itself: set it to 0"
            )
        kind = DenseAssistant if settings.kind == "dense" else RoIAssistant
        return kind(settings, head, train_cfg, test_cfg, student=self.student, with_teacher=with_teacher)

    def _build_neck(self, mimic: NeckMimic) -> NeckImitation:
        if self.teacher is None:
            raise UserError("neck_mimic needs a teacher that runs")
        return NeckImitation(mimic, self.student, self.teacher.detector)

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

    def __getattr__(self, name: str) -> Any:
        """What the host's hooks and loops ask a detector for (``set_epoch``, ``with_neck``) is the student's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get("student")
            if student is None or name.startswith("_"):
                raise
            return getattr(student, name)

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
        losses, terms = self.unweighted(batch, features, samples)
        if self.balance is not None and self.training and terms and self.step < self.balance.iterations:
            self._measure(self.balance, losses, terms, features)
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

    # ------------------------------------------------------------------ the terms

    def unweighted(self, batch: Tensor, features: list[Tensor], samples: list[Any]) -> Terms:
        """Detection losses of student and assistants, and the distillation terms without schedule and balance.

        Args:
            batch: (N, 3, H, W), normalized for the student.
            features: the student's maps of it.
            samples: mmdet's data sample of each image.
        """
        assistants, neck = self.assistants, self.head_kd.neck
        active = self.schedule.stop is None or self.step < self.schedule.stop
        student = self._student_pass(batch, features, samples, active)
        losses, terms = student.losses, {}  # type: dict[str, Any], dict[str, Tensor]
        if not assistants and neck is None:
            return losses, terms
        maps = None
        if self.teacher is not None and (active or self.rois == "teacher") and self._asks_teacher:
            maps = self.teacher.features(batch, samples)
        proposals, targets = student.proposals, None
        if self._takes_regions and self.cache is not None:
            proposals, targets = self.cache.regions(samples, features[0].device)
        elif self._takes_regions and self.rois == "teacher":
            proposals = self._teacher_proposals(maps, samples)
        step = Step(
            features=features,
            samples=samples,
            signals=student.signals,
            proposals=proposals,
            located=self.cache is None and self.rois == "student",
            regions=student.regions,
            targets=targets,
            teacher=self.teacher,
            maps=maps,
            strides=self.strides,
            ramp=self.weight(),
            active=active,
            key=(self.seed, self.step, get_rank()),
            observe=self._observe,
        )
        for number, assistant in enumerate(assistants):
            found, more = assistant.terms(step, number)
            losses |= found
            terms |= more
        if neck is not None:
            terms["neck.loss_mimic"] = neck(features, maps, self._observe) if maps is not None else touch(neck)
        return losses, terms

    def _student_pass(self, batch: Tensor, features: list[Tensor], samples: list[Any], active: bool) -> StudentPass:
        wanted = sorted({a.ckd_names[0] for a in self.assistants if a.ckd is not None and active})
        if is_two_stage(self.student):
            return two_stage(self.student, batch, features, samples, wanted)
        own = self.cache is None and self.rois == "student"
        decoder = self._decoder if own else None
        return one_stage(self.student, batch, features, samples, wanted, decoder, self.proposal_settings)

    @property
    def _asks_teacher(self) -> bool:
        """Whether anything looks at the teacher's maps."""
        return self.rois == "teacher" or self.head_kd.neck is not None or any(a.imitates for a in self.assistants)

    @torch.no_grad()
    def _teacher_proposals(self, maps: list[Tensor] | None, samples: list[Any]) -> list[Proposals]:
        assert self.teacher is not None
        found = self.teacher.detector.rpn_head.predict(maps, samples, rescale=False)
        return [unlocated(r.bboxes, r.scores) for r in found]

    def _observe(self, name: str, own: Tensor, target: Tensor) -> None:
        if self.observer is not None:
            self.observer(name, own.detach(), target.detach())

    def _measure(
        self, balance: Balance, losses: Mapping[str, Any], terms: Mapping[str, Tensor], features: Sequence[Tensor]
    ) -> None:
        """Average the norms over the first iterations, then freeze factors that give each term its share."""
        self.head_kd.norms += gradient_norms(losses, terms, features).to(self.head_kd.norms.device)
        total = self.head_kd.norms.clone()
        all_reduce(total)
        self.head_kd.factors.copy_(shared_factors(total, balance.ratio))
