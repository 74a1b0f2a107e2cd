"""FCOS with ResNet-18: the paper's student, multi-scale training, 12 epochs of COCO."""

_base_ = "./retinanet_r18_ms.py"

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
}
