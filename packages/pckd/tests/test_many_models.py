"""Sixty models of timm and torchvision, each as student and as teacher: one step, and the model's own outputs."""

import pytest
import torch
from pckd import ClassifierNotFound, ClassifierTap, Distiller, Losses, PCKDConfig
from pckd.models import build, freeze

TIMM = [
    "resnet18",
    "resnet26t",
    "resnet50d",
    "resnetv2_50",
    "resnext50_32x4d",
    "seresnet50",
    "ecaresnet50t",
    "skresnet18",
    "res2net50_14w_8s",
    "regnetx_002",
    "regnety_002",
    "densenet121",
    "dla34",
    "dla46_c",
    "vovnet39a",
    "ese_vovnet19b_dw",
    "hrnet_w18_small",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "lcnet_050",
    "ghostnet_050",
    "repghostnet_050",
    "tinynet_e",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "fbnetc_100",
    "mnasnet_small",
    "convnext_atto",
    "convnextv2_atto",
    "repvgg_a0",
    "mobileone_s0",
    "cspresnet50",
    "darknet53",
    "nfnet_l0",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "fastvit_t8",
    "poolformer_s12",
    "efficientformer_l1",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "levit_128s",
    "pit_ti_224",
    "pit_ti_distilled_224",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "xcit_nano_12_p16_224",
    "coat_tiny",
    "volo_d1_224",
    "beit_base_patch16_224",
]
TORCHVISION = [
    "alexnet",
    "vgg11_bn",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "efficientnet_b0",
    "densenet121",
    "regnet_y_400mf",
    "resnet18",
    "convnext_tiny",
    "swin_t",
    "vit_b_32",
    "maxvit_t",
]
SIZES = {
    "timm:swin_tiny_patch4_window7_224": 224,
    "tv:inception_v3": 96,
    "tv:maxvit_t": 224,
    "timm:efficientformer_l1": 224,
}
SIZES |= {
    f"timm:{name}": 224
    for name in ("levit_128s", "pit_ti_224", "pit_ti_distilled_224", "volo_d1_224", "xcit_nano_12_p16_224")
}
SIZES |= {"timm:coat_tiny": 224, "timm:gmlp_ti16_224": 224, "timm:mixer_s32_224": 224}
SIZES |= {"tv:alexnet": 64}
REFUSED = {"timm:volo_d1_224": "a sum of two heads"}
"""Models whose logits are not those of one layer; what they are instead."""
MODELS = [f"timm:{name}" for name in TIMM] + [f"tv:{name}" for name in TORCHVISION]


def pair(spec):
    size = SIZES.get(spec, 64)
    fixed = spec in SIZES and spec.startswith("timm:")
    torch.manual_seed(0)
    return build(spec, 7, size=None if fixed else size), torch.randn(2, 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("spec", MODELS)
def test_a_model_is_student_and_teacher(spec):
    """The tap gives the model's own logits; a step reaches every part of the student that the logits reach."""
    model, images = pair(spec)
    model.eval()
    if spec in REFUSED:
        with pytest.raises(ClassifierNotFound, match="--tap or --teacher_tap names the layer"):
            ClassifierTap(model, example=images)
        return
    with torch.no_grad():
        expected = model(images)
    path = ClassifierTap(model, example=images).path
    out = ClassifierTap(freeze(model, images), path).check(images)
    assert torch.allclose(out.logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert out.feature.shape == (2, out.weight.shape[1])
    small = build("cifar:plain4", 7)
    losses = Losses(pckd=PCKDConfig(align_hidden="16"))
    labels = torch.tensor([3, 5])
    learning = Distiller(small, model, losses=losses, example=images)
    learning(images, labels, 1, 2).total.backward()
    student, _ = pair(spec)
    distiller = Distiller(student, small, losses=losses, example=images)
    distiller.train()
    distiller(images, labels, 1, 2).total.backward()
    weight = dict(student.named_parameters())[f"{path.split(',')[0]}.weight"]
    assert torch.isfinite(weight.grad).all()
    assert float(weight.grad.abs().sum()) > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_the_list_has_sixty_models_of_which_most_run():
    assert len(MODELS) >= 60
    assert len(MODELS) - len(REFUSED) >= 58
