"""Tiny detectors on drawn images; every model here is real mmdet."""

import copy

import head_kd.ops_fallback  # noqa: F401
import torch
from head_kd import rendered, small
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
