"""Encoders that people bring: each gives maps at the strides that are needed, or is refused in one line."""

import pytest
from freespace_uda import Encoder

from tenfold import UserError

RIGHT = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "seresnet50", "res2net50_26w_4s", "regnety_004",
    "efficientnet_b0", "tf_efficientnet_lite0", "mobilenetv2_100", "mobilenetv3_large_100", "convnext_atto", "convnextv2_atto",
    "densenet121", "dla34", "hrnet_w18_small", "pvt_v2_b0", "edgenext_xx_small", "swin_tiny_patch4_window7_224",
]  # fmt: skip
REFUSED = ["vit_tiny_patch16_224", "mixer_b16_224"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_an_encoder_gives_its_maps_for_rgb_and_for_normals(name):
    for channels in (3, 4):
        encoder = Encoder(f"timm:{name}", in_chans=channels, size=(64, 96))
        assert {4, 8} & set(encoder.reductions)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_without_such_maps_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=f"--rgb_encoder timm:{name}"):
        Encoder(f"timm:{name}", size=(64, 96))
