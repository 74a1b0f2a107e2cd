import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tenfold
from tenfold import UserError, checkpoints
from tenfold.testing import assert_saved_and_loaded_equal


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.5, float("inf")])}
    checkpoints.save(path, tensors, method="test.linear", config={"rank": 4})
    return path


def test_what_is_saved_is_loaded(path):
    loaded = checkpoints.load(path, method="test.linear")
    assert torch.equal(loaded.tensors["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(loaded.tensors["bias"], torch.tensor([1.5, float("inf")]))
    assert (loaded.method, loaded.version, loaded.config) == ("test.linear", "0", {"rank": 4})


def test_tied_and_strided_tensors_are_saved(tmp_path):
    shared = torch.arange(4.0).reshape(2, 2)
    checkpoints.save(tmp_path / "a", {"a": shared, "b": shared.T}, method="m", config={})
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
    checkpoints.save(tmp_path / "a", {"bias": torch.zeros(2), **change}, method="m", config={})
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


def test_the_version_is_that_of_the_package_that_the_method_names(tmp_path):
    checkpoints.save(tmp_path / "a", {"a": torch.zeros(1)}, method="tenfold.thing", config={})
    assert checkpoints.load(tmp_path / "a", method="tenfold.thing").version == tenfold.__version__


def test_the_digest_depends_on_names_shapes_dtypes_values_and_order():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True)}
    expected = hashlib.sha256()
    for name, form, raw in (
        ("a", "(2, 3)torch.float32", np.arange(6, dtype=np.float32)),
        ("b", "()torch.bool", np.True_),
    ):
        expected.update(f"{name}{form}".encode() + raw.tobytes())
    assert checkpoints.digest(tensors) == expected.hexdigest()[:16]
    others = [
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"].T, "b": tensors["b"]},
        {"a": tensors["a"].view(torch.int32), "b": tensors["b"]},
        {"a": tensors["a"] + 1, "b": tensors["b"]},
        dict(reversed(tensors.items())),
        list(tensors.values()),
    ]
    assert len({checkpoints.digest(other) for other in [tensors, *others]}) == 7
    assert checkpoints.digest(tensors["a"].T.contiguous().T for _ in range(1)) == checkpoints.digest([tensors["a"]])


def network(classes=3):
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


def wrapped(state, *prefixes):
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def test_weights_under_any_wrapper_and_prefix_are_found(tmp_path):
    state = network().state_dict()
    options = argparse.Namespace(lr=np.float64(0.1), best=np.arange(3), out=Path("runs"), arch="resnet")
    for number, (content, meta) in enumerate(
        [
            (state, []),
            ({"state_dict": state, "epoch": 3}, ["epoch"]),
            ({"model": wrapped(state, "module."), "opt": options}, ["opt"]),
            ({"model": {"name": "resnet"}, "net": state}, ["model"]),
            ({"model_state_dict": wrapped(state, "module.", "_orig_mod."), "rng": torch.zeros(2)}, ["rng"]),
            (
                {"state_dict": wrapped(state, "model.", "_orig_mod.", "module."), "hyper_parameters": {}},
                ["hyper_parameters"],
            ),
            ({"student": {"x": torch.zeros(1)}, "teacher": wrapped(state, "module.", "backbone.")}, ["student"]),
            ({"ema": {"model": state}, "updates": 7}, ["updates"]),
            ({"my_favorite_weights": state, "step": 1}, ["step"]),
        ]
    ):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file, _use_new_zipfile_serialization=bool(number % 2))
        found = checkpoints.read_foreign(file)
        assert found.tensors.keys() == state.keys(), content.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())
        assert list(found.meta) == meta
    assert checkpoints.read_foreign(tmp_path / "2.pth").meta["opt"].arch == "resnet"


def test_prefixes_are_cut_only_as_far_as_the_module_wants(tmp_path):
    module = nn.ModuleDict({"model": nn.ModuleDict({"backbone": network()})})
    other = nn.ModuleDict({"model": nn.ModuleDict({"backbone": network()})})
    torch.save(wrapped(module.state_dict(), "module.", "model."), tmp_path / "a.pt")
    assert set(checkpoints.read_foreign(tmp_path / "a.pt").tensors) == set(network().state_dict())
    checkpoints.load_foreign_into(other, tmp_path / "a.pt")
    assert checkpoints.digest(other.state_dict()) == checkpoints.digest(module.state_dict())


def test_safetensors_come_with_their_metadata(tmp_path):
    save_file(network().state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = checkpoints.read_foreign(tmp_path / "a.safetensors")
    assert found.meta == {"format": "pt"}
    assert set(found.tensors) == set(network().state_dict())


def shards(folder, **changes):
    """A model in two files with their index, as transformers writes it."""
    folder.mkdir(exist_ok=True)
    state = network().state_dict()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": where | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def test_shards_are_read_through_their_index_or_their_folder(tmp_path):
    state = shards(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a/model.safetensors.index.json"):
        found = checkpoints.read_foreign(path)
        assert checkpoints.digest(found.tensors) == checkpoints.digest(state)
        assert found.meta == {"total_size": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.weight": "../secret.safetensors"}, "names '../secret.safetensors', expected files beside it"),
        ({"0.weight": "/etc/passwd"}, "expected files beside it"),
        ({"0.weight": "other.safetensors"}, "names other.safetensors, which is not there"),
        (
            {"more": "model-00001-of-00002.safetensors"},
            "1 tensors of model.safetensors.index.json are in none of its files: more",
        ),
    ],
)
def test_an_index_names_only_what_lies_beside_it(tmp_path, changes, message):
    shards(tmp_path / "a", **changes)
    with pytest.raises(UserError, match=message):
        checkpoints.read_foreign(tmp_path / "a")


def test_a_folder_gives_the_one_file_of_weights_in_it(tmp_path):
    with pytest.raises(UserError, match="no file of weights in this folder"):
        checkpoints.read_foreign(tmp_path)
    state = network().state_dict()
    torch.save(state, tmp_path / "model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert set(checkpoints.read_foreign(tmp_path).tensors) == set(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"--weights .*: 2 files of weights, give one: model\.bin, other\.pth"):
        checkpoints.read_foreign(tmp_path, option="--weights")
    save_file({"one": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(checkpoints.read_foreign(tmp_path).tensors) == {"one"}
    (tmp_path / "x.index.json").write_text("[]")
    with pytest.raises(UserError, match="x.index.json is not an index of weights: expected a 'weight_map'"):
        checkpoints.read_foreign(tmp_path / "x.index.json")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_nothing_of_a_file_runs_and_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network().state_dict(), "more": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError) as caught:
        checkpoints.read_foreign(tmp_path / "evil.pth", option="--teacher_weights")
    message = str(caught.value)
    assert message.startswith(
        f"--teacher_weights {tmp_path}/evil.pth cannot be read without running what is in it (posix.mkdir)"
    )
    assert "torch.save(model.state_dict(), FILE)" in message
    assert "add_safe_globals" in message
    assert "\n" not in message
    assert not (tmp_path / "unpickled").exists()


class Buffer:
    """As mmengine's message hub leaves them in a checkpoint."""

    def __init__(self, values=()):
        self.values = values


def test_objects_of_a_checkpoint_are_read_over_where_a_stand_in_is_given(tmp_path):
    torch.save({"state_dict": network().state_dict(), "hub": Buffer([1.0])}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"\(.*Buffer\)"):
        checkpoints.read_foreign(tmp_path / "a.pth")
    name = f"{Buffer.__module__}.Buffer"
    found = checkpoints.read_foreign(tmp_path / "a.pth", stand_ins=[(checkpoints.Inert, name)])
    assert isinstance(found.meta["hub"], checkpoints.Inert)
    assert set(found.tensors) == set(network().state_dict())


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path):
    torch.save(network().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    save_file(network().state_dict(), tmp_path / "whole.safetensors")
    safe = (tmp_path / "whole.safetensors").read_bytes()
    files = {"a.pth": b"", "b.pth": b"<html>", "c.pth": whole[: len(whole) // 2], "d.safetensors": safe[:-3]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save([torch.zeros(1)], tmp_path / "e.pth")
    torch.save({"epoch": 1}, tmp_path / "f.pth")
    torch.save({}, tmp_path / "g.pth")
    for name in (*files, "e.pth", "f.pth", "g.pth", "none.pth"):
        with pytest.raises(UserError) as caught:
            checkpoints.read_foreign(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)), name
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"found none \(it has epoch\)"):
        checkpoints.read_foreign(tmp_path / "f.pth")


def test_loading_into_a_module_says_what_differs_and_then_changes_nothing(tmp_path):
    module = network()
    before = checkpoints.digest(module.state_dict())
    torch.save(network(classes=7).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"--weights .*a\.pth has 7 classes, the data 3$"):
        checkpoints.load_foreign_into(module, tmp_path / "a.pth", option="--weights")
    torch.save(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"0.weight has shape \(6, 4\), expected \(5, 4\)"):
        checkpoints.load_foreign_into(module, tmp_path / "a.pth")
    assert checkpoints.digest(module.state_dict()) == before


def test_weights_of_an_old_torch_without_counters_are_loaded(tmp_path):
    module, old = network(), {n: t + 1 for n, t in network().state_dict().items() if not n.endswith("tracked")}
    torch.save(old, tmp_path / "old.pth")
    checkpoints.load_foreign_into(module, tmp_path / "old.pth")
    assert checkpoints.digest(old) == checkpoints.digest({n: module.state_dict()[n] for n in old})
    assert int(module.state_dict()["1.num_batches_tracked"]) == 0


def test_a_classifier_of_other_classes_starts_anew_where_that_is_asked_for(tmp_path):
    theirs, ours = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, n)) for n in (5, 2))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    fresh = ours[1].weight.detach().clone()
    with pytest.raises(UserError, match="has 5 classes, the data 2"):
        checkpoints.load_foreign_into(ours, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"a\.pth has 5 classes, the data 2: 1\.weight, 1\.bias start anew"):
        checkpoints.load_foreign_into(ours, tmp_path / "a.pth", new_head=True)
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[1].weight, fresh)


def test_the_header_is_read_without_the_tensors(tmp_path):
    checkpoints.save(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, method="a.b", config={"c": 1})
    assert json.loads(checkpoints.metadata(tmp_path / "a.safetensors")["tenfold"])["config"] == {"c": 1}
    (tmp_path / "b.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        checkpoints.metadata(tmp_path / "b.safetensors")
