"""The layer of the logits is found by what it gives, and the model is an ordinary one afterwards."""

import copy
import pickle

import pytest
import torch
from pckd import ClassifierNotFound, ClassifierTap, Distiller
from pckd.models import build
from pckd.tap import as_map, second_stage
from torch import nn

from tenfold import UserError

FOUND = {
    "timm:mobilenetv3_small_050": "classifier",  # a subclass of nn.Linear
    "timm:lcnet_035": "classifier",
    "timm:resnetv2_50": "head.fc",  # a convolution after pooling
    "timm:dla46_c": "fc",  # likewise
    "timm:deit_tiny_distilled_patch16_224": "head,head_dist",
    "timm:levit_128s": "head.linear,head_dist.linear",
    "timm:swin_tiny_patch4_window7_224": "head.fc",
}


@pytest.mark.parametrize(("spec", "path"), FOUND.items())
def test_the_layer_of_the_logits_is_found_by_its_outputs(spec, path):
    torch.manual_seed(0)
    args = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 3)} if "swin" in spec else {}
    model = build(spec, 7, size=64, args={"window_size": 2, **args} if args else args)
    images = torch.randn(2, 3, 64, 64)
    tap = ClassifierTap(model, example=images)
    assert tap.path == path
    out = tap.check(images)
    model.eval()
    assert torch.allclose(out.logits, model(images), atol=1e-5)
    assert torch.allclose(out.feature @ out.weight.T + out.bias, out.logits, rtol=1e-3, atol=1e-4)


def test_a_convolutional_classifier_gives_the_mean_of_its_input():
    """SqueezeNet: logits are the mean of the positive outputs of a convolution of one pixel."""
    model = build("tv:squeezenet1_1", 5)
    images = torch.randn(2, 3, 64, 64)
    seen = []
    handle = model.classifier[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tap = ClassifierTap(model, example=images)
    out = tap.check(images)
    handle.remove()
    assert tap.path == "classifier.1"
    assert torch.equal(out.feature, seen[-1].mean(dim=(2, 3)))
    assert out.weight.shape == (5, 512)


class Own(nn.Module):
    """A user's model with names of its own, whose output has several parts."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.body, self.answer, self.side = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def get_classifier(self):
        return None

    def forward(self, x):
        x = self.body(x).relu()
        logits = self.answer(x)
        if self.form == "auxiliary":
            return (logits, self.side(x)) if self.training else logits
        if self.form == "dict":
            return {"logits": logits, "features": x}
        return logits.squeeze(0)


@pytest.mark.parametrize("form", ["auxiliary", "dict", "squeezed"])
def test_outputs_in_other_forms(form):
    model = Own(form)
    rows = torch.randn(4, 6)
    tap = ClassifierTap(model, example=rows)
    assert tap.path == "answer"
    model.train()
    assert tap(rows).logits.shape == (4, 3)
    assert tap(rows[:1]).logits.shape == (1, 3)
    loss = Distiller(Own(form), model, "kd", example=rows)(rows, torch.tensor([0, 1, 2, 0]), 1, 2)
    assert torch.isfinite(loss.total)


def test_a_dict_without_logits_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return {"a": x, "b": x}

    with pytest.raises(ValueError, match="dict with a, b: expected logits"):
        ClassifierTap(Odd(), example=torch.randn(2, 3))


def test_a_scaled_cosine_head_is_refused_with_the_option_that_names_the_layer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return 3 * self.fc(x)

    with pytest.raises(ClassifierNotFound, match=r"--tap or --teacher_tap names the layer: .*fc"):
        ClassifierTap(Scaled(), example=torch.randn(2, 4))


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_no_hook_stays_after_a_step_or_a_failed_one():
    student, teacher = build("cifar:resnet8", 5), build("cifar:resnet8", 5)
    mine = student.fc.register_forward_hook(lambda *_: None)
    images = torch.randn(2, 3, 32, 32)
    for method in ("pckd", "fitnet"):
        distiller = Distiller(student, teacher, method, example=images)
        distiller(images, torch.tensor([0, 1]), 1, 2)
        assert (hooks(student), hooks(teacher)) == (1, 0)
        with pytest.raises(RuntimeError):
            distiller(torch.randn(2, 9, 32, 32), torch.tensor([0, 1]), 1, 2)
        assert (hooks(student), hooks(teacher)) == (1, 0)
    mine.remove()
    again = copy.deepcopy(student)
    pickle.loads(pickle.dumps(student))  # our own
    student.eval(), again.eval()
    assert torch.equal(torch.jit.trace(student, images)(images), again(images))


def test_modules_keep_their_own_mode():
    """A batch norm that the user froze stays frozen while the rest trains."""
    student = build("cifar:resnet8", 5).train()
    student.bn1.eval()
    images = torch.randn(2, 3, 32, 32)
    before = student.bn1.running_mean.clone()
    distiller = Distiller(student, build("cifar:resnet8", 5), "fitnet", example=images)
    distiller(images, torch.tensor([0, 1]), 1, 2)
    assert not student.bn1.training and student.layer1.training  # noqa: PT018
    assert torch.equal(student.bn1.running_mean, before)


def test_outputs_come_in_the_order_of_the_datas_classes():
    model = build("cifar:resnet8", 4).eval()
    images, order = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 3, 1])
    plain, out = (ClassifierTap(model, "fc", order=o).check(images) for o in (None, order))
    assert torch.equal(out.logits, plain.logits[:, order])
    assert torch.equal(out.weight, plain.weight[order])
    assert torch.equal(out.bias, plain.bias[order])


def test_maps_of_other_layouts_are_brought_to_the_same():
    images, x = torch.zeros(2, 3, 32, 32), torch.randn(2, 8, 4, 4)
    assert as_map(x, images, "a") is x
    assert torch.equal(as_map(x.permute(0, 2, 3, 1), images, "a"), x)
    tokens = torch.cat([torch.zeros(2, 2, 8), x.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(as_map(tokens, images, "a"), x)
    with pytest.raises(UserError, match=r"'a' gives \(2, 4, 4, 4\): not to be told which axes"):
        as_map(torch.zeros(2, 4, 4, 4), images, "a")


def test_the_second_stage_of_transformers():
    """The block in the middle of a vision transformer, never its patch embedding."""
    images = torch.randn(2, 3, 32, 32)
    model = build("timm:vit_tiny_patch16_224", 5, size=32, args={"depth": 4, "embed_dim": 24, "num_heads": 2})
    assert second_stage(model, images) == "blocks.1"
    swin = build(
        "timm:swin_tiny_patch4_window7_224",
        5,
        size=32,
        args={"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2},
    )
    assert second_stage(swin, images) == "layers.1"
    distiller = Distiller(model, swin, "fitnet", example=images)
    assert distiller.objective.regressor[0].weight.shape[:2] == (24, 24)
    distiller(images, torch.tensor([0, 1]), 1, 2).total.backward()
