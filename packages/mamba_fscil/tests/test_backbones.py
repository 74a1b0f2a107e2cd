"""Backbones give maps, whatever their layout; frozen ones stay frozen; foreign weights load or are refused in one line."""

import pytest
import torch
from mamba_fscil.backbones import MapBackbone, ResNet12, SmallConv, as_map, build_backbone
from torch import nn

from tenfold import UserError


def test_own_backbones_have_the_maps_of_the_benchmarks():
    for size, expected in ((32, (2, 2)), (84, (5, 5))):
        backbone = MapBackbone(ResNet12((4, 5, 6, 7)), torch.zeros(2, 3, size, size))
        assert (backbone.channels, backbone.size) == (7, expected)
    assert MapBackbone(SmallConv(), torch.zeros(2, 3, 16, 16)).size == (4, 4)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_become_a_map_without_those_that_stand_for_no_place(prefix):
    tokens = torch.randn(2, prefix + 9, 6)
    for known in (prefix, None):
        found = as_map(tokens, 6, known)
        assert found.shape == (2, 6, 3, 3)
        assert torch.equal(found[:, :, 1, 2], tokens[:, prefix + 5])


def test_channels_last_become_first_and_a_feature_a_map_of_one_place():
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(as_map(x, 7, None), x.permute(0, 3, 1, 2))
    assert torch.equal(as_map(x, 3, None), x)
    assert as_map(torch.randn(2, 9), None, None).shape == (2, 9, 1, 1)
    with pytest.raises(UserError, match="7 tokens of a backbone fill no square map"):
        as_map(torch.randn(2, 7, 4), None, 0)


def test_a_frozen_batch_norm_stays_frozen_inside_a_training_model():
    backbone = MapBackbone(SmallConv(), torch.zeros(2, 3, 16, 16)).freeze()
    outer = nn.Sequential(backbone, nn.Flatten()).train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    outer(torch.randn(4, 3, 16, 16))
    assert not backbone.training
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_looking_at_a_model_leaves_its_statistics_and_mode():
    model = SmallConv().train()
    before = model.layers[1].running_mean.clone()
    MapBackbone(model, torch.randn(2, 3, 16, 16))
    assert model.training
    assert torch.equal(model.layers[1].running_mean, before)


def test_a_classifier_with_another_head_lends_its_backbone_and_a_foreign_file_is_refused(tmp_path):
    import timm

    theirs = timm.create_model("resnet18", num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone("timm:resnet18", str(tmp_path / "w.pth"), 32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(x), theirs.eval().forward_features(x))
    with pytest.raises(UserError, match=r"no conv1\.0\.weight in the file"):
        build_backbone("timm:resnet34d", str(tmp_path / "w.pth"), 32)
    with pytest.raises(UserError, match="--backbone timm:vit_tiny_patch16_224 does not take images of 32 x 32 pixels"):
        build_backbone("timm:vit_tiny_patch16_224", None, 32)


TIMM = """
    resnet18 resnet26d resnext26ts mobilenetv3_small_050 efficientnet_b0 tf_efficientnet_lite0 convnext_atto convnextv2_atto
    densenet121 vgg11_bn repvgg_a0 ghostnet_050 lcnet_050 mnasnet_small regnetx_002 regnety_002 hrnet_w18_small dla34 darknet53
    cspresnet50 mixnet_s test_vit deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 vit_tiny_patch16_224
    vit_small_patch14_reg4_dinov2 swin_tiny_patch4_window7_224 swin_s3_tiny_224 pvt_v2_b0 poolformer_s12 mixer_s32_224
    xcit_nano_12_p16_224 levit_128s mobilevit_xxs efficientformer_l1 edgenext_xx_small
"""
TORCHVISION = """
    resnet18 mobilenet_v2 mobilenet_v3_small densenet121 efficientnet_b0 regnet_y_400mf shufflenet_v2_x0_5 squeezenet1_1 vgg11
    convnext_tiny swin_t vit_b_32 mnasnet0_5 googlenet
"""
NAMES = [f"timm:{name}" for name in TIMM.split()] + [f"tv:{name}" for name in TORCHVISION.split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_models_that_people_bring_give_a_map_that_depends_on_the_place(name):
    """Or are refused in one line."""
    size = {"vit_small_patch14_reg4_dinov2": 518, "test_vit": 160}.get(name.partition(":")[2], 224)
    torch.manual_seed(0)
    backbone = build_backbone(name, None, size).freeze()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        maps = backbone(images)
        assert maps.shape == (2, backbone.channels, *backbone.size)
        assert backbone.size[0] == backbone.size[1] > 1
        assert maps.isfinite().all()
        images[0, :, : size // 8, : size // 8] += 5
        moved = (backbone(images) - maps).abs().sum(dim=1)
    assert moved[0].max() > 0
    assert moved[1].max() < 1e-3 * float(maps.abs().sum(dim=1).max())


def test_a_learner_on_a_transformers_model_loads_where_that_models_folder_is_gone(tmp_path):
    import shutil

    from mamba_fscil.training.learner import IncrementalLearner
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8, num_labels=5)).save_pretrained(
        tmp_path / "vit"
    )
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    learner = IncrementalLearner("ncm")
    how = {"backbone": f"hf:{tmp_path / 'vit'}", "freeze": True, "capacity": 8, "batch_size": 4, "device": "cpu"}
    learner.fit_base(images, torch.arange(6) % 2, ["a", "b"], **how)
    learner.save(tmp_path / "l")
    shutil.rmtree(tmp_path / "vit")
    again = IncrementalLearner.load(tmp_path / "l")
    assert learner.projector.size == (4, 4)
    assert torch.equal(again.predict_proba(images), learner.predict_proba(images))
