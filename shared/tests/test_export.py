import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tenfold import UserError, export
from tenfold.runs import Run


class Net(nn.Module):
    """Convolutions, batch norm, dropout, and a head whose weights are tied to nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        return self.head(self.body(images).mean(dim=(2, 3)))


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", package="tenfold", verb="export", settings={})


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(8, 3, 9, 9))  # so that the running statistics are not the initial ones
    return net


def read(path, format):
    if format == "torch-export":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_the_file_gives_what_the_module_gives_at_any_batch_size(run, net, format):
    done = export.save(net, torch.zeros(2, 3, 9, 9), run, "student", format)
    assert done.path == run.path / f"student{export.SUFFIXES[format]}"
    assert 0 <= done.difference < 1e-5
    assert (done.tensors, done.bytes) == (len(net.state_dict()), done.path.stat().st_size)
    assert net.training
    call = read(done.path, format)
    for size in (1, 2, 5, 17):
        x = torch.randn(size, 3, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(call(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_weights_alone_have_the_modules_own_names(run, net):
    net.tied = net.head  # shared tensors are written once per name
    done = export.save(net, torch.zeros(1, 3, 9, 9), run, "student")
    assert done.path.name == "student.safetensors"
    found = load_file(done.path)
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    assert done.difference == 0


class Two(nn.Module):
    def forward(self, tokens, scale):
        return {"sum": tokens.float() * scale, "count": tokens + 1}


def test_several_inputs_and_outputs(run):
    examples = (torch.arange(6).reshape(2, 3), torch.tensor([[2.0], [3.0]]))
    for format in ("torch-export", "onnx"):
        names = {"inputs": ("tokens", "scale"), "outputs": ("sum", "count")}
        assert export.save(Two(), examples, run, format, format, **names).difference < 1e-6


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
@pytest.mark.parametrize("module", [Branch(), Fixed()])
def test_what_cannot_be_traced_is_refused_in_one_line_and_leaves_no_file(run, format, module):
    with pytest.raises(UserError) as caught:
        export.save(module, torch.zeros(2, 3), run, "student", format)
    assert "needs a module that torch.export can trace (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(run.path.glob("*student*"))


class Wrong(nn.Module):
    """Gives something else when it is traced, as a control flow in Python can."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        return self.wrong(x) if torch.compiler.is_exporting() else x * 2


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
@pytest.mark.parametrize("wrong", [lambda x: x * 2.001, lambda x: x * float("nan"), lambda x: x[:, :1]])
def test_a_file_whose_outputs_differ_does_not_appear(run, format, wrong):
    with pytest.raises(UserError, match="gives outputs that differ from the module's by"):
        export.save(Wrong(wrong), torch.zeros(2, 3), run, "student", format)
    assert not list(run.path.glob("*student*"))
    if wrong(torch.ones(1, 3)).equal(torch.full((1, 3), 2.001)):
        done = export.save(Wrong(wrong), torch.zeros(2, 3), run, "student", format, tolerance=1e-2)
        assert done.difference == pytest.approx(5e-4, rel=1e-2)


def test_without_onnx_the_line_that_installs_it_is_named(run, net, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'--format onnx needs onnxscript, .*pip install "tenfold\[onnx\]"'):
        export.save(net, torch.zeros(1, 3, 9, 9), run, "student", "onnx")
