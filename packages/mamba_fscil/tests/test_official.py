"""Checkpoints of the authors' code, by a stand-in with the names and the modules that they published."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mamba_fscil.backbones import ResNet12
from mamba_fscil.cli import main
from mamba_fscil.config import ProjectorConfig
from mamba_fscil.head import simplex_etf
from mamba_fscil.official import converted
from mamba_fscil.projector import DualSSMProjector
from mamba_fscil.training.learner import IncrementalLearner
from torch import nn

from tenfold.testing import assert_user_error


class TheirBlock(nn.Module):
    """A block of their ResNet-12, under their names."""

    def __init__(self, inputs, outputs, norm):
        super().__init__()
        self.norm = norm
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(inputs if i == 1 else outputs, outputs, 3, padding=1, bias=False))
            self.add_module(f"{norm}{i}", nn.BatchNorm2d(outputs))
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i in (1, 2, 3):
            y = getattr(self, f"{self.norm}{i}")(getattr(self, f"conv{i}")(y))
            y = F.leaky_relu(y if i < 3 else y + self.downsample(x), 0.1)
        return F.max_pool2d(y, 2)


@pytest.mark.parametrize("norm", ["norm", "bn"])
def test_their_resnet12_gives_the_same_maps_under_our_names(norm):
    torch.manual_seed(0)
    widths = (4, 5, 6, 7)
    pairs = enumerate(zip((3, *widths[:-1]), widths, strict=True), 1)
    theirs = nn.ModuleDict({f"layer{i}": nn.Sequential(TheirBlock(a, b, norm)) for i, (a, b) in pairs})
    x = torch.randn(4, 3, 32, 32)
    for layer in theirs.values():  # running statistics that are not 0 and 1
        x = layer(x)
    neck = {"neck.mlp_proj.0.weight": torch.zeros(1)}
    found, unknown = converted({**{f"backbone.{k}": v for k, v in theirs.state_dict().items()}, **neck})
    assert unknown == []
    ours = ResNet12(widths)
    own = {name.removeprefix("backbone."): v for name, v in found.items() if name.startswith("backbone.")}
    ours.load_state_dict(own)
    x = torch.randn(2, 3, 32, 32)
    expected = x
    for layer in theirs.eval().values():
        expected = layer(expected)
    assert torch.equal(ours.eval()(x), expected)


def test_a_resnet18_keeps_its_names():
    name = "backbone.layer1.0.downsample.0.weight"
    found, _ = converted({name: torch.zeros(1), "neck.pos_embed": torch.zeros(1)})
    assert set(found) == {name, "projector.base.pos_embed"}


def checkpoint(new=False):
    """A neck and a head under their names, with the shapes that the commands below ask for."""
    torch.manual_seed(0)
    projector = DualSSMProjector(8, (2, 2), ProjectorConfig(states=3, rank=2))
    suffixes = {"base.": ""}
    if new:
        projector.add_incremental_branch()
        suffixes["inc."] = "_new"
    found = {"head.etf_vec": simplex_etf(8, 6, torch.Generator().manual_seed(1)), "head.compute_loss": torch.zeros(1)}
    for name, x in projector.state_dict().items():
        for prefix, suffix in suffixes.items():
            if name.startswith(prefix):
                part, dot, rest = name.removeprefix(prefix).partition(".")
                found[f"neck.{part}{suffix}{dot}{rest}"] = x
    return found


def test_a_base_checkpoint_converts_trains_nothing_and_is_taught_a_class(tmp_path, capsys):
    theirs = checkpoint()
    torch.save({"state_dict": theirs, "meta": {"epoch": 50}}, tmp_path / "theirs.pth")
    assert main(["convert", "--weights", str(tmp_path / "theirs.pth"), "--out", str(tmp_path / "c")]) == 0
    assert "left out: head.compute_loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "c/config.json").read_text())["left out"] == ["head.compute_loss"]
    maps = np.random.default_rng(0).normal(size=(24, 8, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "maps.npz", train_maps=maps, train_labels=np.arange(24) % 4)
    words = ["train", "--data", f"npz:{tmp_path / 'maps.npz'}", "--protocol.base", "3", "--capacity", "6", "--quiet"]
    words += ["--projector.states", "3", "--projector.rank", "2", "--session.steps", "3", "--device", "cpu"]
    words += ["--base_weights", str(tmp_path / "c/converted.safetensors"), "--sessions", "true"]
    assert main([*words, "--learner", str(tmp_path / "l"), "--out", str(tmp_path / "r")]) == 0
    learner = IncrementalLearner.load(tmp_path / "l")
    assert learner.classes == ["0", "1", "2", "3"]
    assert torch.equal(learner.head.W, theirs["head.etf_vec"])
    assert torch.equal(learner.projector.state_dict()["base.block.A_log"], theirs["neck.block.A_log"])
    torch.save(checkpoint(new=True), tmp_path / "later.pth")
    assert main(["convert", "--weights", str(tmp_path / "later.pth"), "--out", str(tmp_path / "d")]) == 0
    words[words.index("--base_weights") + 1] = str(tmp_path / "d/converted.safetensors")
    words += ["--learner", str(tmp_path / "m"), "--out", str(tmp_path / "s")]
    assert_user_error(main, words, capsys, "holds an incremental branch", "of the base session")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    words = ["convert", "--weights", str(tmp_path / "other.pth"), "--out", str(tmp_path / "e")]
    assert_user_error(main, words, capsys, "other.pth", "fc.weight")
