"""FCOS with MobileNetV2: the paper's student, multi-scale training, 12 epochs of COCO."""

_base_ = ["./fcos_r18_ms.py", "./mobilenet_v2.py"]

model = {  # mmengine merges the bases into `_base_`
    "backbone": {**_base_.mobilenet_v2, "_delete_": True},  # type: ignore[attr-defined]
    "neck": {"in_channels": _base_.mobilenet_v2_channels},  # type: ignore[attr-defined]
}
