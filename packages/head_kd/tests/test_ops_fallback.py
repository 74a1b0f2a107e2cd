import subprocess
import sys

import head_kd.ops_fallback as fallback
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import UserError

EXTENSION = sys.modules["mmcv._ext"]


def boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand((count, 2), generator=generator)
    return torch.cat([corner, corner + 5 + 40 * torch.rand((count, 2), generator=generator)], dim=1)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 40), threshold=st.floats(0.1, 0.9))
def test_nms_is_torchvisions_and_a_greedy_loop(seed, count, threshold):
    from mmcv.ops import nms

    b, s = boxes(count, seed), torch.rand(count, generator=torch.Generator().manual_seed(seed))
    _, kept = nms(b, s, threshold)
    assert torch.equal(kept, torchvision.ops.nms(b, s, threshold))
    iou = torchvision.ops.box_iou(b, b)
    greedy = []
    for i in s.argsort(descending=True).tolist():
        if all(iou[i, j] <= threshold for j in greedy):
            greedy.append(i)
    assert kept.tolist() == greedy


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_is_a_loop_over_pairs(method):
    """Against a loop written from the paper's definition."""
    from mmcv.ops import soft_nms

    b, s = boxes(30, 3), torch.rand(30, generator=torch.Generator().manual_seed(4))
    dets, kept = soft_nms(b, s, iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method)
    scores, left, order, final = s.clone(), list(range(30)), [], []
    iou = torchvision.ops.box_iou(b, b)
    while left:
        i = max(left, key=lambda k: float(scores[k]))
        order.append(i)
        final.append(float(scores[i]))
        left.remove(i)
        for j in left:
            o = float(iou[i, j])
            factor = {
                "naive": float(o < 0.3),
                "linear": 1 - o if o >= 0.3 else 1.0,
                "gaussian": float(torch.tensor(-o * o / 0.5).exp()),
            }
            scores[j] *= factor[method]
        left = [j for j in left if scores[j] >= 0.05]
    assert kept.tolist() == order
    assert torch.allclose(dets[:, 4], torch.tensor(final), atol=1e-5)
    assert torch.equal(dets[:, :4], b[kept])


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_and_its_gradient_are_torchvisions(ratio, aligned):
    from mmcv.ops import roi_align

    x = torch.randn(2, 3, 10, 12, requires_grad=True)
    rois = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), boxes(3) / 2], dim=1)
    ours = roi_align(x, rois, (4, 3), 0.25, ratio, "avg", aligned)
    theirs = torchvision.ops.roi_align(x, rois, (4, 3), 0.25, ratio, aligned)
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    (a,) = torch.autograd.grad((ours * weight).sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad((theirs * weight).sum(), x)
    assert torch.equal(a, b)


def test_roi_aligns_gradient_is_its_derivative():
    """Gradcheck in fp64."""
    from mmcv.ops import roi_align

    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0.0, 1.3, 0.7, 15.0, 17.2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: roi_align(t, rois, (2, 2), 0.25, 2, "avg", True), (x,))


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_is_autograds_and_its_gradient_too(weighted):
    """Value and gradient against autograd on the definition, and gradcheck."""
    from mmcv.ops import sigmoid_focal_loss

    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 4, dtype=torch.float64)).requires_grad_()
    target = torch.randint(5, (9,))  # 4 is background
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    p = logits.sigmoid()
    hot = F.one_hot(target, 5)[:, :4].double()
    p_t, alpha_t = hot * p + (1 - hot) * (1 - p), hot * 0.25 + (1 - hot) * 0.75
    expected = -alpha_t * (1 - p_t) ** 2 * p_t.log() * (1 if weight is None else weight)
    found = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum")
    assert torch.allclose(found, expected.sum())
    (a,) = torch.autograd.grad(found, logits, retain_graph=True)
    (b,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(a, b)
    assert torch.autograd.gradcheck(lambda t: sigmoid_focal_loss(t, target, 2.0, 0.25, weight, "sum"), (logits,))


def test_focal_loss_stays_finite_for_large_logits():
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_deformable_convolutions_without_offsets_are_convolutions():
    """Values and gradients against torch's convolution, and gradients of the offsets against torchvision's."""
    from mmcv.ops import DeformConv2d, ModulatedDeformConv2d

    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    offset = torch.zeros(2, 18, 7, 8)
    conv = DeformConv2d(4, 6, 3, padding=1)
    ours, theirs = conv(x, offset), F.conv2d(x, conv.weight, padding=1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), [x, conv.weight], retain_graph=True),
        torch.autograd.grad(theirs.square().sum(), [x, conv.weight]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-3)
    modulated = ModulatedDeformConv2d(4, 6, 3, padding=1)
    torch.nn.init.normal_(modulated.bias)
    moved = torch.randn(2, 18, 7, 8, requires_grad=True)
    mask = torch.rand(2, 9, 7, 8, requires_grad=True)
    leaves = [x, moved, mask, modulated.weight, modulated.bias]
    ours = modulated(x, moved, mask)
    theirs = torchvision.ops.deform_conv2d(x, moved, modulated.weight, modulated.bias, padding=1, mask=mask)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_offset_that_is_not_finite_gives_nan_and_not_the_end_of_the_process(bad):
    """torchvision reads outside of its tensors there: a student whose weights have become NaN ended without a word."""
    from mmcv.ops import DeformConv2d

    x, offset = torch.randn(2, 4, 7, 8, requires_grad=True), torch.zeros(2, 18, 7, 8, requires_grad=True)
    with torch.no_grad():
        offset[0, 3, 2, 1] = bad
    out = DeformConv2d(4, 6, 3, padding=1)(x, offset)
    assert out.isnan().all()
    gradients = torch.autograd.grad(out.sum(), [x, offset])
    assert all(g.isnan().any() for g in gradients)


def test_what_is_not_covered_names_itself():
    with pytest.raises(UserError, match=r"mmcv operator carafe_forward: not compiled here.*pip install mmcv"):
        EXTENSION.carafe_forward(1, 2)
    with pytest.raises(UserError, match="offset=1"):
        fallback.nms(boxes(2), torch.rand(2), iou_threshold=0.5, offset=1)
    from mmcv.ops import roi_align

    with pytest.raises(UserError, match="pool_mode"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max", True)


def test_compiled_operators_stay(monkeypatch):
    """Where mmcv has its extension nothing is replaced."""
    real = type(sys)("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", real)
    assert fallback.install_ops_fallback() is False
    assert sys.modules["mmcv._ext"] is real
    monkeypatch.setitem(sys.modules, "mmcv._ext", EXTENSION)
    assert fallback.install_ops_fallback() is True


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "no mmdet is installed"),
        ({"mmdet": "3.3.0", "onedl-mmcv": "2.3.6"}, "two families of the mm stack are mixed"),
        ({"mmdet": "3.3.0", "mmengine": "0.10.7"}, "mmcv or mmcv-lite is not installed"),
        ({"onedl-mmdetection": "3.5.1"}, "onedl-mmengine, onedl-mmcv is not installed"),
    ],
)
def test_a_family_that_is_missing_or_mixed_is_one_line(monkeypatch, found, message):
    from head_kd import families

    monkeypatch.setattr(families, "installed", lambda names: {n: v for n, v in found.items() if n in names})
    with pytest.raises(UserError, match=message):
        families.family()


def test_importing_the_fallback_alone_is_enough():
    """In a process that has imported nothing else, mmcv's operators work."""
    use = "print(nms(torch.tensor([[0.0, 0, 9, 9]]), torch.ones(1), 0.5)[1].tolist())"
    code = f"import head_kd.ops_fallback, torch; from mmcv.ops import nms; {use}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout == "[0]\n", done.stderr
