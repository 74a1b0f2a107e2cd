"""Small mmdet configs for rendered images: the detectors of the recipes, with fewer channels, out of the same heads."""

from collections.abc import Sequence
from typing import Any, Literal

from head_kd.heads import (
    FOCAL,
    box_head,
    delta_coder,
    fcos_head,
    group_norm,
    max_iou,
    random_sampler,
    rcnn_train_cfg,
    retina_head,
    retina_train_cfg,
    roi_extractor,
)
from head_kd.rendered import CLASSES, SIZE

MEAN, STD = [127.5] * 3, [64.0] * 3
PREPROCESSOR = {"type": "DetDataPreprocessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True, "pad_size_divisor": 32}
STRIDES = (8, 16, 32, 64)


def _tower() -> dict[str, Any]:
    """Two convolutions; without a normalization, towers from random weights learn little in the demo's few steps."""
    return {"convs": 2, "norm": group_norm(8)}


def _backbone(width: int) -> dict[str, Any]:
    return {
        "type": "ResNet",
        "depth": 18,
        "stem_channels": width,
        "base_channels": width,
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": False,
        "style": "pytorch",
    }


def _neck(width: int, channels: int, start: int, outs: int) -> dict[str, Any]:
    neck = {"type": "FPN", "in_channels": [width, 2 * width, 4 * width, 8 * width], "out_channels": channels}
    extra = {"add_extra_convs": "on_input"} if start else {}
    return {**neck, "start_level": start, "num_outs": outs, **extra}


def _nms(before: int, after: int, iou: float) -> dict[str, Any]:
    return {
        "nms_pre": before,
        "max_per_img": after,
        "nms": {"type": "nms", "iou_threshold": iou},
        "min_bbox_size": 0,
    }


def retinanet(width: int = 8, channels: int = 32, classes: int = len(CLASSES)) -> dict[str, Any]:
    """RetinaNet, strides 8 to 64, two tower convolutions with GroupNorm.

    Args:
        width: channels of the backbone's first stage.
        channels: channels of the neck.
        classes: number of classes.
    """
    return {
        "type": "RetinaNet",
        "data_preprocessor": dict(PREPROCESSOR),
        "backbone": _backbone(width),
        "neck": _neck(width, channels, 1, 4),
        "bbox_head": retina_head(classes, channels, STRIDES, base_scale=2, **_tower()),
        "train_cfg": retina_train_cfg(),
        "test_cfg": {**_nms(1000, 100, 0.5), "score_thr": 0.05},
    }


def point_detector(kind: str, width: int = 8, channels: int = 32, classes: int = len(CLASSES)) -> dict[str, Any]:
    """FCOS, ATSS or GFL with the same backbone and neck.

    Args:
        kind: "FCOS", "ATSS" or "GFL".
        width: channels of the backbone's first stage.
        channels: channels of the neck.
        classes: number of classes.
    """
    common = {
        "type": f"{kind}Head",
        "num_classes": classes,
        "in_channels": channels,
        "feat_channels": channels,
        "stacked_convs": 2,
        "norm_cfg": group_norm(8),
        "anchor_generator": {
            "type": "AnchorGenerator",
            "ratios": [1.0],
            "octave_base_scale": 4,
            "scales_per_octave": 1,
            "strides": list(STRIDES),
        },
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
    }
    heads: dict[str, dict[str, Any]] = {
        "FCOS": fcos_head(classes, channels, STRIDES, reach=4, **_tower()),
        "ATSS": {
            **common,
            "bbox_coder": delta_coder(0.1, 0.1, 0.2, 0.2),
            "loss_cls": dict(FOCAL),
            "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        },
        "GFL": {
            **common,
            "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0},
            "loss_dfl": {"type": "DistributionFocalLoss", "loss_weight": 0.25},
            "reg_max": 16,
        },
    }
    assigner = {"type": "ATSSAssigner", "topk": 9}
    train = None if kind == "FCOS" else {"assigner": assigner, "allowed_border": -1, "pos_weight": -1, "debug": False}
    return {**retinanet(width, channels, classes), "type": kind, "bbox_head": heads[kind], "train_cfg": train}


CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def faster_rcnn(
    width: int = 16,
    channels: int = 64,
    classes: int = len(CLASSES),
    fc: int = 256,
    regions: int = 32,
    stages: int = 1,
    finest: Literal[4, 8] = 4,
) -> dict[str, Any]:
    """Faster R-CNN (or, with three stages, Cascade R-CNN), strides 4 (or 8) to 64, RoIs of 5x5.

    Args:
        width: channels of the backbone's first stage.
        channels: channels of the neck.
        classes: number of classes.
        fc: features of the fully connected layers.
        regions: regions sampled per image.
        stages: 1, or 3 for a cascade.
        finest: stride of the neck's finest map; with 8, a step takes little more than half of the time.
    """
    strides = tuple(stride for stride in (4, 8, 16, 32, 64) if stride >= finest)
    smallest, pooled = (16, 28) if finest == 4 else (20, 40)  # pixels: sides of anchors and regions of the finest map
    proposals = _nms(150, 100, 0.7)

    def stage(stds: Sequence[float], agnostic: bool) -> dict[str, Any]:
        return box_head(classes, channels, width=fc, size=5, stds=stds, agnostic=agnostic)

    roi: dict[str, Any] = {
        "bbox_roi_extractor": {**roi_extractor(channels, strides[:-1], size=5, samples=1), "finest_scale": pooled}
    }
    if stages == 1:
        roi |= {"type": "StandardRoIHead", "bbox_head": stage(CASCADE_STDS[0], False)}
    else:
        roi |= {
            "type": "CascadeRoIHead",
            "num_stages": 3,
            "stage_loss_weights": [1, 0.5, 0.25],
            "bbox_head": [stage(stds, True) for stds in CASCADE_STDS],
        }
    rpn = {
        "assigner": max_iou(0.7, 0.3, 0.3, match_low_quality=True),
        "sampler": random_sampler(128, 0.5, add_gt_as_proposals=False),
        "allowed_border": -1,
        "pos_weight": -1,
        "debug": False,
    }
    samplers = [rcnn_train_cfg(regions, iou=iou) for iou in (0.5, 0.6, 0.7)]
    return {
        "type": "FasterRCNN" if stages == 1 else "CascadeRCNN",
        "data_preprocessor": dict(PREPROCESSOR),
        "backbone": _backbone(width),
        "neck": {**_neck(width, channels, 0, len(strides)), "start_level": 5 - len(strides)},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": channels,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [smallest / finest],
                "ratios": [0.5, 1.0, 2.0],
                "strides": list(strides),
            },
            "bbox_coder": delta_coder(1.0),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": roi,
        "train_cfg": {"rpn": rpn, "rpn_proposal": proposals, "rcnn": samplers[0] if stages == 1 else samplers},
        "test_cfg": {
            "rpn": dict(proposals),
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100},
        },
    }


def experiment(
    model: dict[str, Any],
    train: Any,
    val: Any,
    *,
    steps: int,
    batch: int,
    rate: float,
    workers: int = 0,
    memory: bool = False,
    side: int = SIZE,
) -> dict[str, Any]:
    """A whole config around a model: COCO data as drawn, no augmentation, AdamW with one cycle, gradients clipped at 20.

    Args:
        model: config of a detector, such as ``retinanet()``.
        train: split that is trained on.
        val: split that is measured.
        steps: training iterations.
        batch: images per step.
        rate: highest learning rate.
        workers: processes that load data.
        memory: whether to keep the training items in memory (``MemoryDataset``); only while nothing in the pipeline is random.
        side: pixels of a side that the images are resized to.
    """
    load = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "Resize", "scale": (side, side), "keep_ratio": True},
        {"type": "PackDetInputs"},
    ]

    def loader(split: Any, size: int, training: bool) -> dict[str, Any]:
        dataset = {
            "type": "CocoDataset",
            "ann_file": str(split.annotations),
            "data_prefix": {"img": str(split.images)},
            "metainfo": {"classes": tuple(split.classes)},
            "pipeline": load,
            "test_mode": not training,
            "serialize_data": False,  # saves memory where many processes load; here it costs most of a second
        }
        return {
            "batch_size": size,
            "num_workers": workers,
            "sampler": {"type": "DefaultSampler", "shuffle": training},
            "dataset": {"type": "MemoryDataset", "dataset": dataset} if training and memory else dataset,
        }

    metric = {"type": "CocoMetric", "ann_file": str(val.annotations), "metric": "bbox"}
    return {
        "default_scope": "mmdet",
        "model": model,
        "train_dataloader": loader(train, batch, True),
        "val_dataloader": loader(val, 20, False),
        "test_dataloader": loader(val, 20, False),
        "val_evaluator": metric,
        "test_evaluator": metric,
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": steps, "val_interval": 10**9},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": rate, "weight_decay": 0.01, "foreach": True},
            "clip_grad": {"max_norm": 20, "norm_type": 2, "foreach": True},
        },
        "param_scheduler": [
            {"type": "OneCycleLR", "eta_max": rate, "total_steps": steps, "by_epoch": False, "pct_start": 0.3}
        ],
    }
