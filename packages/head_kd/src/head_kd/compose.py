"""Two mmdet configs become one: the student's, with ``HEADDetector`` around its model."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.models.roi_heads import StandardRoIHead
from mmdet.registry import MODELS
from mmengine.utils import import_modules_from_strings

from head_kd.config import READ_AT_REGIONS, WITH_TEACHER, Distillation, Method, Terms
from head_kd.configs import innermost, resolve_config
from head_kd.heads import fcos_head, rcnn_head, rcnn_train_cfg, retina_head, retina_train_cfg
from tenfold import UserError

IMPORTS = (
    "head_kd.ops_fallback",
    "head_kd.detector",
    "head_kd.training.loop",
    "head_kd.training.hooks",
    "head_kd.training.guard",
)
HOOKS = ("PlainCheckpointHook", "ScheduleHook", "GuardHook", "ExportHook")
"""What a composed config brings for mmengine's own runner; ``head-kd train`` puts its own guard and export in place."""
_OWN_AKD, _OWN_CKD = 0.5, 0.25
"""Weights of losses that are divided by the target's variance (ours)."""


def pair(
    student: Any,
    teacher: Any = None,
    weights: str | Path | None = None,
    method: Method = "own",
    distill: Terms | None = None,
    *,
    cache: str | Path | None = None,
    reuse_features: bool = False,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Any:
    """An mmengine config that distills; ``tools/train.py`` takes its ``dump`` as well as ``head-kd train`` does.

    Args:
        student: config (path, ``mmdet::...``, dict or ``Config``) of the student's project; data, schedule and hooks are
            taken from it.
        teacher: config of the teacher.
        weights: file of the teacher's weights.
        method: what is distilled (see ``TrainSettings``).
        distill: weights that differ from the method's, and with a ``Distillation`` the schedule.
        cache: folder of ``head-kd cache``.
        reuse_features: see ``TeacherView``.
        classes: classes of the data, whose number the student's head takes over; default: as its config says.
        seed: seed of the assistants.

    Raises:
        UserError: a part that the method needs is missing, or the pair has no signals in common.
    """
    how = Distillation(**dataclasses.asdict(distill or Distillation()))
    cfg = copy.deepcopy(resolve_config(student))
    model = cfg.model
    if model.get("type") == "HEADDetector":
        raise UserError("the student's config is a HEADDetector already: give the plain student's config")
    if classes is not None:
        set_num_classes(model, len(classes))
    imports = dict(cfg.get("custom_imports") or {})
    imports["imports"] = [*IMPORTS, *(i for i in imports.get("imports", []) if i not in IMPORTS)]
    imports["allow_failed_imports"] = False
    cfg.custom_imports = imports
    theirs = None if teacher is None else resolve_config(teacher)
    parts: dict[str, Any] = {"type": "HEADDetector", "student": model, "seed": seed}
    if method != "plain":
        parts |= {"schedule": {"warmup": how.warmup, "stop": how.stop}}
        parts |= {"balance": {"ratio": how.balance}} if how.balance else {}
    if method in ("pkd", "fitnet"):
        parts["neck_mimic"] = _neck_mimic(method, how)
    elif method == "tf_head":
        parts["assistants"] = teacher_free(model, how)
        if how.stop is None:
            parts["schedule"]["stop"] = first_drop(cfg)
    elif method != "plain":
        if theirs is None:
            raise UserError(f"the method {method} copies the teacher's head: give the teacher's config")
        parts |= {"assistants": [_assistant(method, how, model, theirs.model)], "rois": how.rois}
    if method in WITH_TEACHER:
        if theirs is None or weights is None:
            raise UserError(f"the method {method} needs a teacher: give its config and its weights")
        source = str(teacher) if isinstance(teacher, str | Path) else theirs.to_dict()
        parts["teacher"] = {"config": source, "checkpoint": str(weights)}
        if reuse_features:
            parts["teacher"]["reuse_features"] = True
    if cache is not None:
        if method not in READ_AT_REGIONS:
            raise UserError(f"the method {method} reads no teacher at regions, so a cache has no part in it")
        parts["teacher"]["cache"] = str(cache)
    cfg.model = parts
    ours = [{"type": kind} for kind in HOOKS if method != "plain" or kind == "PlainCheckpointHook"]
    kept = [hook for hook in cfg.get("custom_hooks") or [] if hook.get("type") not in HOOKS]
    cfg.custom_hooks = [*kept, *ours]
    import_modules_from_strings(list(IMPORTS))  # as mmengine does when it reads a config from a file
    return cfg


def set_num_classes(model: Any, count: int) -> None:
    """Set the number of classes of a model config's final heads."""
    heads = model.get("roi_head", model)["bbox_head"]
    for head in heads if isinstance(heads, list | tuple) else [heads]:
        head["num_classes"] = count


def _neck_mimic(method: Method, how: Distillation) -> dict[str, Any]:
    """Settings of PKD or of FitNet on the neck."""
    usual = 6.0 if method == "pkd" else 0.5
    weight = usual if how.neck_weight is None else how.neck_weight
    return {"kind": method, "weight": weight, "normalize": method == "fitnet"}


def _assistant(method: Method, how: Distillation, model: Any, theirs: Any) -> dict[str, Any]:
    """Settings of an assistant that is a copy of the teacher's head."""
    kind = "roi" if "roi_head" in theirs else "dense"
    if kind == "dense" and "in_channels" not in (theirs.get("bbox_head") or {}):
        raise UserError(
            f"the teacher's {_head_type(theirs)} works on queries, not on regions or maps: it has no signal for an assistant;"
            " the methods pkd and fitnet imitate its neck"
        )
    two_stage = "roi_head" in model
    paper = method == "paper"
    assistant: dict[str, Any] = {"kind": kind, "normalize": not paper}
    akd, ckd = _paper_weights(model, theirs) if paper else (_OWN_AKD, _OWN_CKD)
    if (kind == "dense" and two_stage) or not _shares_regions(model):
        ckd = 0.0  # the student's head has no map that a dense head's would match, or samples anew at every stage
    if method == "assist":
        akd = ckd = 0.0
        roi = kind == "roi"
        assistant |= {
            "head": theirs.roi_head if roi else theirs.bbox_head,
            "train_cfg": theirs.train_cfg.rcnn if roi else theirs.train_cfg,
            "transfer": False,
        }
    elif method == "direct":
        if ckd == 0:
            raise UserError(
                f"the method direct lets the student's head imitate the teacher's, and nothing of the student's"
                f" {_head_type(model)} matches the teacher's {_head_type(theirs)}"
            )
        akd, ckd = 0.0, 0.5
        assistant["detection_weight"] = 0.0
    assistant["akd_weight"] = akd if how.akd_weight is None else how.akd_weight
    assistant["ckd_weight"] = ckd if how.ckd_weight is None else how.ckd_weight
    if kind == "roi":
        assistant["ckd_on"] = how.ckd_on or ("all" if paper else "positive")
        assistant["rois_per_image"] = how.rois_per_image
        assistant["align_strides"] = how.align_strides
    return assistant


def _head_type(model: Any) -> str:
    return str((model.roi_head if "roi_head" in model else model.bbox_head)["type"])


def _shares_regions(model: Any) -> bool:
    """Whether a student's signals can be read at regions: not those of a cascade, which samples anew at every stage."""
    if "roi_head" not in model:
        return True
    kind = MODELS.get(model.roi_head.type) if isinstance(model.roi_head.type, str) else model.roi_head.type
    return isinstance(kind, type) and issubclass(kind, StandardRoIHead)


def _paper_weights(model: Any, theirs: Any) -> tuple[float, float]:
    """The authors' weights of AKD and CKD: 2.0 each; 1.0 for cascades and dense heads, and for FCOS's CKD."""
    dense = "roi_head" not in theirs
    cascade = not dense and isinstance(theirs.roi_head.bbox_head, list | tuple)
    fcos = "roi_head" not in model and model.bbox_head.type == "FCOSHead"
    return (1.0 if cascade or dense else 2.0), (1.0 if fcos or dense else 2.0)


def teacher_free(model: Any, how: Distillation) -> list[dict[str, Any]]:
    """The assistants of TF-HEAD: an R-CNN head, and a dense head of another kind than the student's.

    The RoI term weighs 1.3, the dense term 1.0, the detection losses of the dense head 0.5 where both are there, all under
    the warm-up. A two-stage student gets one dense FCOS head on the neck, without a distillation term, since no signal of
    the student's head matches.

    Source: the authors' development code; it has no config for a two-stage student, for which the choice is ours.
    """
    two_stage = "roi_head" in model
    channels = int(model.neck.out_channels)
    inner = model.roi_head.bbox_head if two_stage else model.bbox_head
    classes = int((inner[0] if isinstance(inner, list | tuple) else inner).num_classes)
    common = {"akd_weight": 0.0, "ramp_detection": True, "transfer": False}
    dense_weight = 1.0 if how.ckd_weight is None else how.ckd_weight
    strides = config_strides(model)
    is_fcos = not two_stage and model.bbox_head.type == "FCOSHead"
    dense = {
        **common,
        "kind": "dense",
        "head": retina_head(classes, channels, strides) if is_fcos else fcos_head(classes, channels, strides),
        "train_cfg": retina_train_cfg() if is_fcos else None,
        "ckd_weight": 0.0 if two_stage else dense_weight,
        "detection_weight": 1.0 if two_stage else 0.5,
    }
    if two_stage:
        return [dense]
    roi = {
        **common,
        "kind": "roi",
        "head": rcnn_head(classes, channels, strides[:4]),
        "train_cfg": rcnn_train_cfg(),
        "ckd_weight": 1.3 if how.ckd_weight is None else how.ckd_weight,
        "ckd_on": how.ckd_on or "all",
        "rois_per_image": how.rois_per_image,
    }
    return [roi, dense]


def config_strides(model: Any) -> list[int]:
    """Strides of a model config's neck, as its dense head or RPN states them; an RPN's finest is left out."""
    if "roi_head" in model:
        return [int(s) for s in model.rpn_head.anchor_generator.strides][1:]
    head = model.bbox_head
    stated = head.get("strides") or (head.get("anchor_generator") or {}).get("strides") or [8, 16, 32, 64, 128]
    return [int(s[0]) if isinstance(s, list | tuple) else int(s) for s in stated]


def first_drop(cfg: Any, iterations_per_epoch: int | None = None) -> int | None:
    """Iteration of the first milestone of a config's step schedule; None where it has none.

    Milestones in epochs need ``iterations_per_epoch``; without it they stay open, and the loop fills them in when it
    knows the data (``HEADDetector`` is told by ``ExactTrainLoop``).
    """
    schedulers = cfg.get("param_scheduler") or []
    for scheduler in schedulers if isinstance(schedulers, list | tuple) else [schedulers]:
        if scheduler.get("milestones"):
            first = int(min(scheduler["milestones"]))
            if not scheduler.get("by_epoch", True):
                return first
            return None if iterations_per_epoch is None else first * iterations_per_epoch
    return None


def use_data(cfg: Any, train: Any, val: Any) -> None:
    """Point a config's data loaders and evaluators at COCO splits, and its model at their classes; pipelines stay.

    Args:
        cfg: the student's config; it is changed.
        train: split that is trained on (``head_kd.data.Split``).
        val: split that is measured.

    Raises:
        UserError: a data set that is made of several, or has no pipeline.
    """
    for name, split in (("train", train), ("val", val), ("test", val)):
        loader = cfg.get(f"{name}_dataloader")
        if loader is None:
            continue
        dataset = innermost(loader.dataset)
        assert dataset is not None
        if "datasets" in dataset or "pipeline" not in dataset:
            raise UserError(
                f"--data: the {name} data of the student's config is a {dataset.get('type')}, which is not replaced"
            )
        usual = {"filter_empty_gt": True, "min_size": 1}
        extra = {"filter_cfg": dataset.get("filter_cfg", usual)} if name == "train" else {"test_mode": True}
        new = {
            "type": "CocoDataset",
            "ann_file": str(Path(split.annotations).resolve()),
            "data_prefix": {"img": str(Path(split.images).resolve())},
            "metainfo": {"classes": tuple(split.classes)},
            "pipeline": dataset.pipeline,
            **extra,
        }
        if dataset is loader.dataset:
            loader.dataset = new
        else:  # in its wrappers
            dataset.clear()
            dataset.update(new)
    for name in ("val", "test"):
        evaluator = cfg.get(f"{name}_evaluator")
        if evaluator is not None:
            kept = dict(evaluator) if isinstance(evaluator, dict) and evaluator.get("type") == "CocoMetric" else {}
            file = str(Path(val.annotations).resolve())
            ours = {"type": "CocoMetric", "ann_file": file, "metric": "bbox", "format_only": False}
            cfg[f"{name}_evaluator"] = {**kept, **ours}
    set_num_classes(cfg.model, len(train.classes))
