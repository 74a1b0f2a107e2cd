"""Tiny detectors on drawn images; every model here is real mmdet."""

import copy

import head_kd.ops_fallback  # noqa: F401
import torch
from head_kd import rendered, small
from head_kd.configs import resolve_config
from head_kd.detector import HEADDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData


def build(config):
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    model.init_weights()
    return model


def teacher_config(**changes):
    return small.faster_rcnn(8, 32, fc=64, regions=16, **changes)


def raw_batch(count=2, first=0, truth=None):
    """Images as mmdet's loader gives them (BGR uint8), with data samples; ``truth`` replaces the boxes."""
    inputs, samples = [], []
    for i in range(count):
        image, objects = rendered.draw(first + i)
        inputs.append(torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1))
        meta = {"img_id": i + 1, "img_shape": (128, 128), "ori_shape": (128, 128), "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo=meta)
        boxes = torch.tensor([box for _, box in objects]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([label for label, _ in objects], dtype=torch.int64)
        if truth == "none":
            boxes, labels = boxes[:0], labels[:0]
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def batch_for(model, count=2, first=0, truth=None):
    data = model.data_preprocessor(raw_batch(count, first, truth), True)
    return data["inputs"], data["data_samples"]


def wrap(student, **settings):
    """A detector around a student config, its weights initialized, in training mode."""
    settings.setdefault("schedule", {"warmup": 0})
    torch.manual_seed(0)
    model = HEADDetector(copy.deepcopy(student), **settings)
    model.init_weights()
    return model.train()


def total(model, losses):
    return model.parse_losses(losses)[0]


STUDENTS = {
    "retinanet": small.retinanet(8, 16),
    "fcos": small.point_detector("FCOS", 8, 16),
    "atss": small.point_detector("ATSS", 8, 16),
    "gfl": small.point_detector("GFL", 8, 16),
    "faster": small.faster_rcnn(8, 16, fc=48, regions=16),
}


def pair_words(project):
    words = {"student": "student.py", "teacher": "teacher.py", "teacher_weights": "teacher.pth"}
    return [word for name, file in words.items() for word in (f"--{name}", str(project / file))]


def train_words(project, out, *more):
    """``head-kd train`` on the project of the fixture, a row and a checkpoint per step."""
    every = ["--checkpoint_every", "1", "--log_every", "1", "--distill.warmup", "2"]
    rest = ["--quiet", "--device", "cpu", "--guard", "-1", "--out", str(out)]
    return ["train", *pair_words(project), *every, *rest, *more]


def stock(name, classes=6):
    """A model of mmdet's own configs with few channels; what makes it that model stays."""
    model = copy.deepcopy(resolve_config(f"mmdet::{name}").model)
    model.backbone.init_cfg = None
    model.data_preprocessor.pop("batch_augments", None)
    neck = model.neck[0] if isinstance(model.neck, list) else model.neck
    if model.backbone.type == "ResNet":
        last = model.backbone.out_indices
        model.backbone.update(depth=18, stem_channels=8, base_channels=8, dcn=None, stage_with_dcn=(False,) * 4)
        widths = [8, 16, 32, 64]
        if neck.type == "FPN":
            neck.update(in_channels=widths, out_channels=16)
        else:  # YOLOF's encoder
            neck.update(in_channels=widths[last[0]], out_channels=16, block_mid_channels=8)
    else:  # RTMDet, YOLOX
        model.backbone.update(deepen_factor=0.167, widen_factor=0.125)
        neck.update(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1)
    if isinstance(model.neck, list):
        for part in model.neck[1:]:
            part.in_channels = 16
    heads = [model.bbox_head] if "bbox_head" in model else []
    if "roi_head" in model:
        model.rpn_head.update(in_channels=16, feat_channels=16)
        extractor = model.roi_head.bbox_roi_extractor
        extractor.out_channels = 16
        head = model.roi_head.bbox_head
        head.update(in_channels=16, num_classes=classes, fc_out_channels=48)
        if "conv_out_channels" in head:
            head.conv_out_channels = 48
        model.train_cfg.rcnn.sampler.num = 16
    for head in heads:
        head.update(in_channels=16, num_classes=classes)
        if "feat_channels" in head:
            head.feat_channels = 16
        for key in ("norm_cfg",):
            if head.get(key, {}) and head[key].get("type") == "SyncBN":
                head[key] = {"type": "BN"}
        if "norm_cfg" not in head and head.type not in ("YOLOFHead", "YOLOXHead"):
            head.norm_cfg = small.group_norm(8)
    if (head_norm := (heads[0].get("norm_cfg") if heads else None)) and head_norm.get("type") == "GN":
        head_norm["num_groups"] = 8
    return model.to_dict()


ONE_STAGE = {
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "yolox": "yolox/yolox_tiny_8xb8-300e_coco.py",
    "tood": "tood/tood_r50_fpn_1x_coco.py",
    "tood_anchors": "tood/tood_r50_fpn_anchor-based_1x_coco.py",
    "vfnet": "vfnet/vfnet_r50_fpn_1x_coco.py",
    "yolof": "yolof/yolof_r50-c5_8xb8-1x_coco.py",
}
TWO_STAGE = {
    "dynamic": "dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py",
    "pisa": "pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py",
    "double": "double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py",
    "libra": "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py",
    "ohem": "faster_rcnn/faster-rcnn_r50_fpn_ohem_1x_coco.py",
}
