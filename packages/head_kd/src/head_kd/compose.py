"""Two mmdet configs become one: the student's, with ``HEADDetector`` around its model."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.utils import import_modules_from_strings

from head_kd.config import Distillation
from head_kd.configs import innermost, resolve_config
from head_kd.heads import fcos_head, rcnn_head, rcnn_train_cfg, retina_head, retina_train_cfg
from tenfold import UserError

IMPORTS = ("head_kd.ops_fallback", "head_kd.detector", "head_kd.training.loop")
_PAPER_CKD = {"FCOSHead": 1.0}
"""The authors' weight for FCOS students; 2.0 for others."""


def pair(
    student: Any,
    teacher: Any = None,
    checkpoint: str | Path | None = None,
    distillation: Distillation | None = None,
    *,
    cache: str | Path | None = None,
    reuse_features: bool = False,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Any:
    """An mmengine config that distils; ``tools/train.py`` takes its ``dump`` as well as ``head-kd train`` does.

    Args:
        student: config (path, ``mmdet::...``, dict or ``Config``) of the student's project; data, schedule and hooks are
            taken from it.
        teacher: config of the teacher.
        checkpoint: of the teacher.
        distillation: preset and weights.
        cache: folder of ``head-kd cache``.
        reuse_features: see ``TeacherView``.
        classes: of the data; sets ``num_classes`` of the student.
        seed: of the assistants.

    Raises:
        UserError: a part that the preset needs is missing, or the pair has no signals in common.
    """
    how = distillation or Distillation()
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
    parts: dict[str, Any] = {"type": "HEADDetector", "student": model, "seed": seed}
    theirs = None if teacher is None else resolve_config(teacher)
    if how.preset != "plain":
        parts |= _parts(model, theirs, how, cfg)
    if how.needs_teacher:
        if teacher is None or checkpoint is None:
            raise UserError(f"preset {how.preset} needs a teacher: give its config and its checkpoint")
        source = str(teacher) if isinstance(teacher, str | Path) else theirs.to_dict()  # type: ignore[union-attr]
        parts["teacher"] = {"config": source, "checkpoint": str(checkpoint)}
        if cache is not None:
            parts["teacher"]["cache"] = str(cache)
        if reuse_features:
            parts["teacher"]["reuse_features"] = True
    elif cache is not None:
        raise UserError(f"preset {how.preset} runs no teacher, so a cache has no part in it")
    cfg.model = parts
    import_modules_from_strings(list(IMPORTS))  # as mmengine does when it reads a config from a file
    return cfg


def set_num_classes(model: Any, count: int) -> None:
    """Set the number of classes of a model config's final heads."""
    heads = model.get("roi_head", model)["bbox_head"]
    for head in heads if isinstance(heads, list | tuple) else [heads]:
        head["num_classes"] = count


def _parts(model: Any, teacher: Any, how: Distillation, cfg: Any) -> dict[str, Any]:
    schedule: dict[str, Any] = {"warmup": how.warmup, "stop": how.stop}
    if how.preset in ("pkd", "fitnet"):
        weight = how.neck_weight if how.neck_weight is not None else {"pkd": 6.0, "fitnet": 0.5}[how.preset]
        mimic = {"kind": how.preset, "weight": weight, "normalize": how.preset == "fitnet"}
        return {"neck_mimic": mimic, "schedule": schedule} | _balance(how)
    if how.preset == "tf_head":
        stop = how.stop if how.stop is not None else first_drop(cfg)
        schedule["stop"] = stop
        return {"assistants": teacher_free(model, how), "schedule": schedule} | _balance(how)
    if teacher is None:
        raise UserError(f"preset {how.preset} copies the teacher's head: give --teacher CONFIG")
    theirs = teacher.model
    kind = "roi" if "roi_head" in theirs else "dense"
    two_stage = "roi_head" in model
    cascade = kind == "roi" and isinstance(theirs.roi_head.bbox_head, list | tuple)
    student_head = "" if two_stage else str(model.bbox_head.type)
    assistant: dict[str, Any] = {"kind": kind}
    paper = how.preset == "paper"
    akd = 1.0 if paper and (cascade or kind == "dense") else 2.0 if paper else 0.5
    ckd = _PAPER_CKD.get(student_head, 1.0 if kind == "dense" else 2.0) if paper else 0.25
    if kind == "dense" and two_stage:
        ckd = 0.0  # the student's head has no map that a dense head's would match
    if how.preset == "assist":
        akd = ckd = 0.0
        roi = kind == "roi"
        assistant |= {
            "head": theirs.roi_head if roi else theirs.bbox_head,
            "train_cfg": theirs.train_cfg.rcnn if roi else theirs.train_cfg,
            "transfer": False,
        }
    elif how.preset == "direct":
        akd, ckd = 0.0, 0.5
        assistant |= {"detection_weight": 0.0}
    assistant |= {
        "akd_weight": akd if how.akd_weight is None else how.akd_weight,
        "ckd_weight": ckd if how.ckd_weight is None else how.ckd_weight,
        "normalize": not paper,
    }
    if kind == "roi":
        assistant["ckd_on"] = how.ckd_on or ("all" if paper else "positive")
        assistant["rois_per_image"] = how.rois_per_image
        assistant["align_strides"] = how.align_strides
    return {"assistants": [assistant], "schedule": schedule, "rois": how.rois} | _balance(how)


def _balance(how: Distillation) -> dict[str, Any]:
    return {"balance": {"ratio": how.balance}} if how.balance else {}


def teacher_free(model: Any, how: Distillation) -> list[dict[str, Any]]:
    """The assistants of TF-HEAD: an R-CNN head, and a dense head of another kind than the student's.

    Weights (authors' development code): the RoI term 1.3, the dense term 1.0, detection losses of the dense head 0.5
    where both are there, all under the warm-up. For a two-stage student the source has no config; ours is one dense FCOS
    head on the neck, without a distillation term, since no signal of the student's head matches.
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
        if "datasets" in dataset or "pipeline" not in dataset:
            raise UserError(
                f"--data: the {name} data of the student's config is a {dataset.get('type')}, which is not replaced"
            )
        extra = {"filter_cfg": {"filter_empty_gt": True, "min_size": 1}} if name == "train" else {"test_mode": True}
        new = {
            "type": "CocoDataset",
            "ann_file": str(Path(split.annotations).resolve()),
            "data_prefix": {"img": str(Path(split.images).resolve())},
            "metainfo": {"classes": tuple(split.classes)},
            "pipeline": dataset.pipeline,
            **extra,
        }
        loader.dataset = new
    for name in ("val", "test"):
        evaluator = cfg.get(f"{name}_evaluator")
        if evaluator is not None:
            cfg[f"{name}_evaluator"] = {
                "type": "CocoMetric",
                "ann_file": str(Path(val.annotations).resolve()),
                "metric": "bbox",
                "format_only": False,
            }
    set_num_classes(cfg.model, len(train.classes))
