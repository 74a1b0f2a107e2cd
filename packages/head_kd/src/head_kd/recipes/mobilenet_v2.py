"""MobileNetV2 as mmdet's zoo has it, and the channels of its four maps: what two students replace ResNet-18 by."""

mobilenet_v2 = {
    "type": "MobileNetV2",
    "out_indices": (1, 2, 4, 7),
    "act_cfg": {"type": "LeakyReLU", "negative_slope": 0.1},
    "norm_cfg": {"type": "BN", "requires_grad": True},
    "norm_eval": True,
    "init_cfg": {"type": "Pretrained", "checkpoint": "open-mmlab://mmdet/mobilenet_v2"},
}
mobilenet_v2_channels = [24, 32, 96, 1280]
