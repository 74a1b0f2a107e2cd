"""Taps, models by name, and the files of weights that people have."""

import argparse
import collections

import pytest
import torch
from pckd import ClassifierNotFound, ClassifierTap
from pckd.models import build, freeze
from pckd.tap import second_stage
from pckd.zoo import ZOO
from torch import nn

from tenfold import UserError
from tenfold.checkpoints import load_foreign_into

PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "ResNet50": 23_705_252,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
}
"""For 100 classes, as tables of the field give them."""
WIDTHS = {"resnet20": 64, "resnet8x4": 256, "wrn_40_2": 128, "wrn_40_1": 64, "vgg8": 512, "ResNet50": 2048}
WIDTHS |= {"MobileNetV2": 1280, "ShuffleV1": 960, "ShuffleV2": 1024, "plain4": 64}
OTHERS = [
    "timm:resnet10t",
    "timm:mobilenetv3_small_050",
    "timm:vit_tiny_patch16_224",
    "timm:convnext_atto",
    "tv:resnet18",
]
OTHERS += ["tv:mobilenet_v3_small", "tv:shufflenet_v2_x0_5", "tv:squeezenet1_0", "tv:vgg11"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_topologies_have_the_published_number_of_parameters(name):
    assert sum(p.numel() for p in ZOO[name](100).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", WIDTHS)
def test_the_tap_reproduces_the_logits_of_the_zoo(name):
    model = ZOO[name](7).eval()
    images = torch.randn(2, 3, 32, 32)
    tap = ClassifierTap(model, example=images)
    with torch.no_grad():
        out = tap(images)
    assert tap.feature_dim == WIDTHS[name]
    assert torch.allclose(out.feature @ out.weight.T + out.bias, out.logits, atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in OTHERS if "squeezenet" not in s])
def test_the_tap_reproduces_the_logits_of_timm_and_torchvision(spec):
    """Also a classifier of several layers, of which the last counts."""
    side = 224 if "vit" in spec or "vgg" in spec else 64
    images = torch.randn(2, 3, side, side)
    out = ClassifierTap(build(spec, 7).eval(), example=images).check(images)
    assert out.logits.shape == (2, 7)
    assert torch.allclose(out.feature @ out.weight.T + out.bias, out.logits, atol=1e-5)


def test_heads_without_bias_and_explicit_paths():
    model = nn.Sequential(collections.OrderedDict(body=nn.Linear(4, 5), fc=nn.Linear(5, 3, bias=False)))
    rows = torch.randn(2, 4)
    out = ClassifierTap(model, example=rows)(rows)
    assert out.bias is None
    assert torch.allclose(out.feature @ out.weight.T, out.logits)
    odd = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert ClassifierTap(odd, "2").feature_dim == 5
    assert ClassifierTap(odd, example=rows).path == "2"
    with pytest.raises(UserError, match="give them, or its path"):
        ClassifierTap(odd)
    with pytest.raises(ClassifierNotFound, match=r"linear layers are 0\.0, 0\.2"):
        ClassifierTap(nn.Sequential(odd, nn.Softmax(dim=1)), example=rows)
    with pytest.raises(ClassifierNotFound, match="'1' is no linear layer"):
        ClassifierTap(odd, "1")
    with pytest.raises(ClassifierNotFound, match="no linear layer inside"):
        ClassifierTap(nn.Flatten(), example=rows)
    with pytest.raises(ClassifierNotFound, match="not those of the layer '0'"):
        ClassifierTap(odd, "0", example=rows)
    with pytest.raises(ValueError, match=r"logits must be \(2, C\)"):
        ClassifierTap(nn.Sequential(collections.OrderedDict(fc=nn.Linear(4, 3))), "fc")(torch.randn(2, 5, 4))


@pytest.mark.parametrize(
    ("spec", "stage"),
    [("cifar:resnet20", "layer2"), ("cifar:wrn_16_1", "block2"), ("cifar:MobileNetV2", "blocks.4.2.conv.7")],
)
def test_second_stages(spec, stage):
    found = second_stage(build(spec, 5), torch.randn(2, 3, 32, 32))
    assert found == stage or found.startswith("blocks"), found


@pytest.mark.parametrize(
    "spec", ["cifar:resnet8", "cifar:ShuffleV2", "tv:resnet18", "timm:resnet10t", "timm:mobilenetv3_small_050"]
)
def test_a_folded_teacher_gives_the_same_logits(spec):
    """Batch norms go into the convolutions before them; the layer of the logits keeps its name."""
    torch.manual_seed(0)
    model = build(spec, 5)
    images = torch.randn(4, 3, 32, 32)
    model(images)  # statistics that are not those of the beginning
    model.eval()
    folded = freeze(model, images)
    with torch.no_grad():
        expected = model(images)
        out = ClassifierTap(folded, ClassifierTap(model, example=images).path)(images)
    assert torch.allclose(out.logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in folded.parameters())
    if spec in {"cifar:resnet8", "timm:mobilenetv3_small_050"}:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_other_programs_load(tmp_path, key, prefix):
    """RepDistiller's and mdistiller's {"model"}, SSKD's {"state_dict"}, with options beside, of DataParallel."""
    model = ZOO["resnet8"](5)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    holds = state if key is None else {key: state, "epoch": 240, "opt": argparse.Namespace(lr=0.05)}
    torch.save(holds, tmp_path / "last.pth")
    other = ZOO["resnet8"](5)
    load_foreign_into(other, tmp_path / "last.pth")
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_file_that_does_not_fit_is_named_with_its_option(tmp_path):
    torch.save(ZOO["resnet8"](7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(UserError, match=r"--teacher_weights .*seven\.pth has 7 classes, the data 5"):
        build("cifar:resnet8", 5, str(tmp_path / "seven.pth"), option="--teacher", whole=True)
    with pytest.warns(UserWarning, match=r"seven\.pth has 7 classes, the data 5: fc\.weight, fc\.bias start anew"):
        student = build("cifar:resnet8", 5, str(tmp_path / "seven.pth"))
    theirs = torch.load(tmp_path / "seven.pth")
    assert torch.equal(student.conv1.weight, theirs["conv1.weight"])
    assert student.fc.weight.shape == (5, 64)
    torch.save(ZOO["resnet14"](5).state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(UserError, match=r"unknown layer1\.1"):
        build("cifar:resnet8", 5, str(tmp_path / "deeper.pth"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet8", "--student resnet8: expected one of cifar:NAME, .*did you mean cifar:resnet8"),
        ("cifar:resnet8x", "did you mean resnet8x4"),
        ("timm:resnet_18", "timm"),
        ("tv:resnet19", "did you mean resnet1"),
        ("tm:resnet18", "unknown kind 'tm': did you mean timm"),
        ("py:pckd.zoo:none", "none"),
    ],
)
def test_unknown_models(spec, message):
    with pytest.raises(UserError, match=message):
        build(spec, 5)


def test_models_of_ones_own():
    assert sum(p.numel() for p in build("py:pckd.zoo:ResNet50", 100).parameters()) == PARAMETERS["ResNet50"]
