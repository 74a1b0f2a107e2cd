"""Small mmdet configs for rendered images: the same classes as the recipes, with fewer channels."""

from typing import Any

from head_kd.rendered import CLASSES, SIZE

MEAN, STD = [127.5] * 3, [64.0] * 3
PREPROCESSOR = {"type": "DetDataPreprocessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True, "pad_size_divisor": 32}
_IOU = {"type": "MaxIoUAssigner", "ignore_iof_thr": -1}


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


def _coder(stds: list[float]) -> dict[str, Any]:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": stds}


def retinanet(width: int = 8, channels: int = 32, classes: int = len(CLASSES)) -> dict[str, Any]:
    """RetinaNet, strides 8 to 64, two tower convolutions with GroupNorm."""
    return {
        "type": "RetinaNet",
        "data_preprocessor": dict(PREPROCESSOR),
        "backbone": _backbone(width),
        "neck": _neck(width, channels, 1, 4),
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": classes,
            "in_channels": channels,
            "stacked_convs": 2,
            "feat_channels": channels,
            "norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True},
            "anchor_generator": {
                "type": "AnchorGenerator",
                "octave_base_scale": 2,
                "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0],
                "strides": [8, 16, 32, 64],
            },
            "bbox_coder": _coder([1.0] * 4),
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "train_cfg": {
            "assigner": {**_IOU, "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0},
            "sampler": {"type": "PseudoSampler"},
            "allowed_border": -1,
            "pos_weight": -1,
            "debug": False,
        },
        "test_cfg": _dense_test(),
    }


def _dense_test() -> dict[str, Any]:
    return {
        "nms_pre": 1000,
        "min_bbox_size": 0,
        "score_thr": 0.05,
        "nms": {"type": "nms", "iou_threshold": 0.5},
        "max_per_img": 100,
    }


def point_detector(kind: str, width: int = 8, channels: int = 32, classes: int = len(CLASSES)) -> dict[str, Any]:
    """FCOS, ATSS or GFL with the same backbone and neck.

    Args:
        kind: "FCOS", "ATSS" or "GFL".
        width: of the backbone.
        channels: of the neck.
        classes: of the data.
    """
    strides = [8, 16, 32, 64]
    model = retinanet(width, channels, classes)
    norm = {"type": "GN", "num_groups": 8, "requires_grad": True}
    common = {
        "num_classes": classes,
        "in_channels": channels,
        "feat_channels": channels,
        "stacked_convs": 2,
        "norm_cfg": norm,
    }
    anchors = {
        "type": "AnchorGenerator",
        "ratios": [1.0],
        "octave_base_scale": 4,
        "scales_per_octave": 1,
        "strides": strides,
    }
    focal = model["bbox_head"]["loss_cls"]
    giou = {"type": "GIoULoss", "loss_weight": 2.0}
    quality = {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0}
    heads: dict[str, dict[str, Any]] = {
        "FCOS": {
            **common,
            "type": "FCOSHead",
            "strides": strides,
            "regress_ranges": ((-1, 32), (32, 64), (64, 128), (128, 1e8)),
            "norm_on_bbox": True,
            "centerness_on_reg": True,
            "center_sampling": True,
            "loss_cls": focal,
            "loss_bbox": {"type": "GIoULoss", "loss_weight": 1.0},
        },
        "ATSS": {
            **common,
            "type": "ATSSHead",
            "anchor_generator": anchors,
            "bbox_coder": _coder([0.1, 0.1, 0.2, 0.2]),
            "loss_cls": focal,
            "loss_bbox": giou,
            "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        },
        "GFL": {
            **common,
            "type": "GFLHead",
            "anchor_generator": anchors,
            "loss_cls": quality,
            "loss_dfl": {"type": "DistributionFocalLoss", "loss_weight": 0.25},
            "reg_max": 16,
            "loss_bbox": giou,
        },
    }
    assigner = {"type": "ATSSAssigner", "topk": 9}
    train = None if kind == "FCOS" else {"assigner": assigner, "allowed_border": -1, "pos_weight": -1, "debug": False}
    return {**model, "type": kind, "bbox_head": heads[kind], "train_cfg": train}


def faster_rcnn(
    width: int = 16, channels: int = 64, classes: int = len(CLASSES), fc: int = 256, regions: int = 32, stages: int = 1
) -> dict[str, Any]:
    """Faster R-CNN (or, with three stages, Cascade R-CNN), strides 4 to 64, RoIs of 5x5.

    Args:
        width: of the backbone.
        channels: of the neck.
        classes: of the data.
        fc: width of the fully connected layers.
        regions: sampled of each image.
        stages: 1, or 3 for a cascade.
    """
    strides = [4, 8, 16, 32]

    def box_head(stds: list[float], agnostic: bool) -> dict[str, Any]:
        return {
            "type": "Shared2FCBBoxHead",
            "in_channels": channels,
            "fc_out_channels": fc,
            "roi_feat_size": 5,
            "num_classes": classes,
            "bbox_coder": _coder(stds),
            "reg_class_agnostic": agnostic,
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            "loss_bbox": {"type": "SmoothL1Loss" if agnostic else "L1Loss", "loss_weight": 1.0},
        }

    def stage_cfg(iou: float) -> dict[str, Any]:
        return {
            "assigner": {
                **_IOU,
                "pos_iou_thr": iou,
                "neg_iou_thr": iou,
                "min_pos_iou": iou,
                "match_low_quality": False,
            },
            "sampler": {
                "type": "RandomSampler",
                "num": regions,
                "pos_fraction": 0.25,
                "neg_pos_ub": -1,
                "add_gt_as_proposals": True,
            },
            "pos_weight": -1,
            "debug": False,
        }

    roi: dict[str, Any] = {
        "bbox_roi_extractor": {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 5, "sampling_ratio": 1},
            "out_channels": channels,
            "featmap_strides": strides,
            "finest_scale": 28,
        }
    }
    if stages == 1:
        roi |= {"type": "StandardRoIHead", "bbox_head": box_head([0.1, 0.1, 0.2, 0.2], False)}
    else:
        stds = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        roi |= {
            "type": "CascadeRoIHead",
            "num_stages": 3,
            "stage_loss_weights": [1, 0.5, 0.25],
            "bbox_head": [box_head(s, True) for s in stds],
        }
    return {
        "type": "FasterRCNN" if stages == 1 else "CascadeRCNN",
        "data_preprocessor": dict(PREPROCESSOR),
        "backbone": _backbone(width),
        "neck": _neck(width, channels, 0, 5),
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": channels,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [4],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": _coder([1.0] * 4),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": roi,
        "train_cfg": {
            "rpn": {
                "assigner": {
                    **_IOU,
                    "pos_iou_thr": 0.7,
                    "neg_iou_thr": 0.3,
                    "min_pos_iou": 0.3,
                    "match_low_quality": True,
                },
                "sampler": {
                    "type": "RandomSampler",
                    "num": 128,
                    "pos_fraction": 0.5,
                    "neg_pos_ub": -1,
                    "add_gt_as_proposals": False,
                },
                "allowed_border": -1,
                "pos_weight": -1,
                "debug": False,
            },
            "rpn_proposal": {
                "nms_pre": 150,
                "max_per_img": 100,
                "nms": {"type": "nms", "iou_threshold": 0.7},
                "min_bbox_size": 0,
            },
            "rcnn": stage_cfg(0.5) if stages == 1 else [stage_cfg(iou) for iou in (0.5, 0.6, 0.7)],
        },
        "test_cfg": {
            "rpn": {
                "nms_pre": 150,
                "max_per_img": 100,
                "nms": {"type": "nms", "iou_threshold": 0.7},
                "min_bbox_size": 0,
            },
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
) -> dict[str, Any]:
    """A whole config around a model: COCO data as drawn, no augmentation, AdamW with one cycle, gradients clipped at 20.

    Args:
        model: of this module.
        train: split that is trained on.
        val: split that is measured.
        steps: iterations.
        batch: images of a step.
        rate: highest learning rate.
        workers: processes that load data.
        memory: keep the training items (``MemoryDataset``); only while nothing in the pipeline is random.
    """
    size = {"type": "Resize", "scale": (SIZE, SIZE), "keep_ratio": True}
    load = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        size,
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
            "optimizer": {"type": "AdamW", "lr": rate, "weight_decay": 0.01},
            "clip_grad": {"max_norm": 20, "norm_type": 2},
        },
        "param_scheduler": [
            {"type": "OneCycleLR", "eta_max": rate, "total_steps": steps, "by_epoch": False, "pct_start": 0.3}
        ],
    }
