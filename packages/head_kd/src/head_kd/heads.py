"""mmdet configs of detection heads: of the assistants that a pair composes, and of the small detectors.

The defaults are those of mmdet's own configs; each function says where the authors' code differs.
"""

import itertools
from collections.abc import Sequence
from typing import Any

Config = dict[str, Any]
FOCAL: Config = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}


def group_norm(groups: int) -> Config:
    """GroupNorm that is trained."""
    return {"type": "GN", "num_groups": groups, "requires_grad": True}


def delta_coder(*stds: float) -> Config:
    """Boxes as shifts and log-scales of anchors, divided by ``stds`` (four of them, or one for all)."""
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds) * (4 // len(stds))}


def _losses(name: str, **changes: Any) -> Config:
    return {"type": name, **changes, "loss_weight": 1.0}


def retina_head(
    classes: int,
    channels: int,
    strides: Sequence[int],
    *,
    convs: int = 4,
    base_scale: int = 4,
    norm: Config | None = None,
) -> Config:
    """A RetinaNet head: nine anchors per cell.

    Args:
        classes: number of classes.
        channels: channels of the neck and of the towers.
        strides: strides of the neck's maps.
        convs: convolutions of each tower.
        base_scale: side of the smallest anchor, in strides.
        norm: normalization of the towers; mmdet's default has none.
    """
    return {
        "type": "RetinaHead",
        "num_classes": classes,
        "in_channels": channels,
        "feat_channels": channels,
        "stacked_convs": convs,
        **({} if norm is None else {"norm_cfg": norm}),
        "anchor_generator": {
            "type": "AnchorGenerator",
            "octave_base_scale": base_scale,
            "scales_per_octave": 3,
            "ratios": [0.5, 1.0, 2.0],
            "strides": list(strides),
        },
        "bbox_coder": delta_coder(1.0),
        "loss_cls": dict(FOCAL),
        "loss_bbox": _losses("L1Loss"),
    }


def retina_train_cfg() -> Config:
    """Assigner of a RetinaNet head."""
    return {
        "assigner": max_iou(0.5, 0.4, 0),
        "sampler": {"type": "PseudoSampler"},
        "allowed_border": -1,
        "pos_weight": -1,
        "debug": False,
    }


def fcos_head(
    classes: int,
    channels: int,
    strides: Sequence[int],
    *,
    convs: int = 4,
    reach: int = 8,
    norm: Config | None = None,
) -> Config:
    """An FCOS head with the improvements that the authors use beside an R-CNN assistant.

    Args:
        classes: number of classes.
        channels: channels of the neck and of the towers.
        strides: strides of the neck's maps.
        convs: convolutions of each tower.
        reach: largest side that a level regresses, in strides.
        norm: normalization of the towers; default: GroupNorm.
    """
    bounds = [-1, *(reach * stride for stride in strides[:-1]), 1e8]
    return {
        "type": "FCOSHead",
        "num_classes": classes,
        "in_channels": channels,
        "feat_channels": channels,
        "stacked_convs": convs,
        "strides": list(strides),
        "regress_ranges": tuple(itertools.pairwise(bounds)),
        "norm_on_bbox": True,
        "centerness_on_reg": True,
        "center_sampling": True,
        "norm_cfg": norm or group_norm(min(32, channels // 4)),
        "loss_cls": dict(FOCAL),
        "loss_bbox": _losses("GIoULoss"),
        "loss_centerness": _losses("CrossEntropyLoss", use_sigmoid=True),
    }


def box_head(
    classes: int,
    channels: int,
    *,
    width: int,
    size: int = 7,
    stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
    agnostic: bool = False,
) -> Config:
    """The box head of an R-CNN stage: two fully connected layers.

    Args:
        classes: number of classes.
        channels: channels of the neck.
        width: features of the fully connected layers.
        size: cells per side of a pooled region.
        stds: scale of the box deltas.
        agnostic: one box for all classes, as the stages of a cascade have it.
    """
    return {
        "type": "Shared2FCBBoxHead",
        "in_channels": channels,
        "fc_out_channels": width,
        "roi_feat_size": size,
        "num_classes": classes,
        "bbox_coder": delta_coder(*stds),
        "reg_class_agnostic": agnostic,
        "loss_cls": _losses("CrossEntropyLoss", use_sigmoid=False),
        "loss_bbox": _losses("SmoothL1Loss" if agnostic else "L1Loss"),
    }


def roi_extractor(channels: int, strides: Sequence[int], *, size: int = 7, samples: int = 0) -> Config:
    """RoIAlign on the neck's maps, each region on the map that its size asks for.

    Args:
        channels: channels of the neck.
        strides: strides of the maps.
        size: cells per side of a pooled region.
        samples: samples per side of a cell; 0 adapts to the region.
    """
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": samples},
        "out_channels": channels,
        "featmap_strides": list(strides),
    }


def rcnn_head(classes: int, channels: int, strides: Sequence[int]) -> Config:
    """A Faster R-CNN head; its layers are four times as wide as the neck, 1024 for the usual 256 channels."""
    return {
        "type": "StandardRoIHead",
        "bbox_roi_extractor": roi_extractor(channels, strides),
        "bbox_head": box_head(classes, channels, width=4 * channels),
    }


def rcnn_train_cfg(regions: int = 512, *, iou: float = 0.5) -> Config:
    """Assigner and sampler of an R-CNN stage.

    Args:
        regions: regions sampled per image.
        iou: overlap with ground truth from which a region is positive.
    """
    return {
        "assigner": max_iou(iou, iou, iou, match_low_quality=False),
        "sampler": random_sampler(regions, 0.25, add_gt_as_proposals=True),
        "pos_weight": -1,
        "debug": False,
    }


def max_iou(positive: float, negative: float, minimum: float, **changes: Any) -> Config:
    """mmdet's assigner by overlap, without regions to ignore."""
    thresholds = {"pos_iou_thr": positive, "neg_iou_thr": negative, "min_pos_iou": minimum}
    return {"type": "MaxIoUAssigner", **thresholds, **changes, "ignore_iof_thr": -1}


def random_sampler(count: int, positive: float, *, add_gt_as_proposals: bool) -> Config:
    """mmdet's random sampler: ``count`` per image, the share ``positive`` of them positive at most."""
    return {
        "type": "RandomSampler",
        "num": count,
        "pos_fraction": positive,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": add_gt_as_proposals,
    }
