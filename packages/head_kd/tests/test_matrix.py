"""Twenty students and eight teachers of mmdet's own configs, three steps each: works, or is refused with which words.

The table goes to ``docs/head-kd.md``: ``python -m pytest -m slow -s packages/head_kd/tests/test_matrix.py`` prints it.
"""

import copy
import gc
import math
import sys

import pytest
import torch
from head_kd import pair
from head_kd.configs import resolve_config
from head_kd.stack import build
from mmengine.config import Config
from mmengine.logging import MessageHub
from tiny_detectors import batch_for, total

from tenfold import UserError

STUDENTS = {
    "RetinaNet R18": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "FCOS R50": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "ATSS R50": "atss/atss_r50_fpn_1x_coco.py",
    "GFL R50": "gfl/gfl_r50_fpn_1x_coco.py",
    "RTMDet tiny": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "YOLOX tiny": "yolox/yolox_tiny_8xb8-300e_coco.py",
    "TOOD R50": "tood/tood_r50_fpn_1x_coco.py",
    "VFNet R50": "vfnet/vfnet_r50_fpn_1x_coco.py",
    "YOLOF R50": "yolof/yolof_r50-c5_8xb8-1x_coco.py",
    "PAA R50": "paa/paa_r50_fpn_1x_coco.py",
    "FSAF R50": "fsaf/fsaf_r50_fpn_1x_coco.py",
    "FreeAnchor R50": "free_anchor/freeanchor_r50_fpn_1x_coco.py",
    "FoveaBox R50": "foveabox/fovea_r50_fpn_4xb4-1x_coco.py",
    "RepPoints R50": "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
    "SSD 300": "ssd/ssd300_coco.py",
    "Faster R-CNN R50": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "Cascade R-CNN R50": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "Dynamic R-CNN R50": "dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py",
    "Double-Head R50": "double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py",
    "Libra R-CNN R50": "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py",
}
TEACHERS = {
    "Faster R-CNN": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "Cascade R-CNN": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "FCOS": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "ATSS": "atss/atss_r50_fpn_1x_coco.py",
    "GFL": "gfl/gfl_r50_fpn_1x_coco.py",
    "RepPoints": "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
    "DINO": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}
DENSE = ("RetinaNet", "FCOS", "ATSS", "GFL", "RepPoints")
REFUSED = {
    ("SSD 300", None): "no signal of a known name",
    ("PAA R50", None): "no proposals with a known cell",
    ("FoveaBox R50", None): "no proposals with a known cell",
    ("RepPoints R50", None): "no proposals with a known cell",
    (None, "DINO"): "works on queries",
    **{("YOLOF R50", teacher): "do not cover the dense head's" for teacher in DENSE},
    **{("SSD 300", teacher): "does not say how many channels" for teacher in DENSE},
}
"""Words with which a student with any teacher, or a teacher with any student, is refused."""


def config(name):
    """A stock config without what it would download."""
    cfg = copy.deepcopy(resolve_config(f"mmdet::{name}"))
    cfg.model.backbone.init_cfg = None
    cfg.model.data_preprocessor.pop("batch_augments", None)
    return Config(cfg.to_dict())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of each teacher, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("zoo") / "teacher.pth"
            teacher = build(config(TEACHERS[name]).model)
            teacher.init_weights()
            torch.save({"state_dict": teacher.state_dict()}, made[name])
        return made[name]

    return of


def cell(student, teacher, file):
    """Terms of a pair after three steps, or the words that refuse it."""
    MessageHub.get_current_instance().update_info("epoch", 0)
    torch.manual_seed(0)
    try:
        model = build(pair(config(STUDENTS[student]), config(TEACHERS[teacher]), file).model)
    except UserError as error:
        return f"refused: {error}"
    model.init_weights()
    model.schedule = type(model.schedule)(warmup=0)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for step in range(3):
        losses = model.loss(*batch_for(model, 2, 2 * step))
        optimizer.zero_grad()
        total(model, losses).backward()
        optimizer.step()
    terms = [name for name in losses if name.startswith(("akd", "ckd"))]
    values = {name: float(losses[name].detach()) for name in terms}
    assert all(math.isfinite(value) and value >= 0 for value in values.values()), values
    # CKD counts where a box of the student's own hits an object, which an untrained student's need not do
    assert all(value > 0 for name, value in values.items() if name.startswith("akd")), values
    return f"{sum(t.startswith('akd') for t in terms)} AKD" + (
        " + CKD" if any(t.startswith("ckd") for t in terms) else ""
    )


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_each_pair_trains_or_is_refused_with_its_reason(student, weights):
    row = []
    for teacher in TEACHERS:
        found = cell(student, teacher, weights(teacher))
        gc.collect()
        words = [text for (s, t), text in REFUSED.items() if s in (None, student) and t in (None, teacher)]
        row.append(found)
        sys.stdout.write(f"{student} <- {teacher}: {found}\n")
        if found.startswith("refused"):
            assert any(text in found for text in words), found
    sys.stdout.write(
        "| " + " | ".join([student, *(f if not f.startswith("refused") else "refused" for f in row)]) + " |\n"
    )
