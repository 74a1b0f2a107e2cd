import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tenfold import UserError, checkpoints
from tenfold.testing import assert_saved_and_loaded_equal


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.5, float("inf")])}
    checkpoints.save(path, tensors, method="test.linear", version="1.2", config={"rank": 4})
    return path


def test_what_is_saved_is_loaded(path):
    loaded = checkpoints.load(path, method="test.linear")
    assert torch.equal(loaded.tensors["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded.tensors["bias"], torch.tensor([1.5, float("inf")]))
    assert (loaded.method, loaded.version, loaded.config) == ("test.linear", "1.2", {"rank": 4})


def test_tied_and_strided_tensors_are_saved(tmp_path):
    shared = torch.arange(4.0).reshape(2, 2)
    checkpoints.save(tmp_path / "a", {"a": shared, "b": shared.T}, method="m", version="0", config={})
    loaded = checkpoints.load(tmp_path / "a", method="m").tensors
    assert torch.equal(loaded["b"], loaded["a"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 4)}, r"weight has shape \(2, 4\), expected \(2, 3\)"),
        ({"wieght": torch.zeros(2, 3)}, r"unknown wieght: did you mean weight\?"),
    ],
)
def test_loading_into_another_shape_names_the_difference_and_changes_nothing(tmp_path, change, message):
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    checkpoints.save(tmp_path / "a", {"bias": torch.zeros(2), **change}, method="m", version="0", config={})
    with pytest.raises(UserError, match=message):
        checkpoints.load_into(module, tmp_path / "a", method="m")
    assert torch.equal(module.weight, before)


def test_refusals_name_the_file(path, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load(tmp_path / "b", method="m")
    with pytest.raises(UserError, match=r"a\.safetensors holds test\.linear, expected corda\.context"):
        checkpoints.load(path, method="corda.context")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"cut\.safetensors is not a whole safetensors file"):
        checkpoints.load(cut, method="test.linear")
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        checkpoints.load(tmp_path / "pickle.pt", method="test.linear")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare")
    with pytest.raises(UserError, match="no header of ours"):
        checkpoints.load(tmp_path / "bare", method="test.linear")


def test_a_module_saved_and_loaded_gives_equal_outputs(tmp_path):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # noqa: E731
    assert_saved_and_loaded_equal(make(), make(), tmp_path / "a", torch.randn(5, 3))
