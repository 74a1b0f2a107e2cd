"""fcos with mnv2: the paper's student, multi-scale training, 12 epochs of COCO."""

_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"

model = {
    "type": "FCOS",
    "bbox_head": {
        "_delete_": True,
        "type": "FCOSHead",
        "num_classes": 80,
        "in_channels": 256,
        "stacked_convs": 4,
        "feat_channels": 256,
        "strides": [8, 16, 32, 64, 128],
        "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
        "loss_bbox": {"type": "IoULoss", "loss_weight": 1.0},
        "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
    },
    "train_cfg": None,
    "backbone": {
        "_delete_": True,
        "type": "MobileNetV2",
        "out_indices": (1, 2, 4, 7),
        "act_cfg": {"type": "LeakyReLU", "negative_slope": 0.1},
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": True,
        "init_cfg": {"type": "Pretrained", "checkpoint": "open-mmlab://mmdet/mobilenet_v2"},
    },
    "neck": {"in_channels": [24, 32, 96, 1280]},
}

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
