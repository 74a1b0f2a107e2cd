"""RetinaNet with ResNet-18: the paper's student, multi-scale training, 12 epochs of COCO; the other students' base."""

_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"

train_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "RandomResize", "scale": [(1333, 640), (1333, 800)], "keep_ratio": True},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "PackDetInputs"},
]
train_dataloader = {"dataset": {"pipeline": train_pipeline}}
optim_wrapper = {
    "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001},
    "clip_grad": {"max_norm": 20, "norm_type": 2},
}
