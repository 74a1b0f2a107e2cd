"""Pretraining: every method learns, a killed run ends with the same weights, the frozen scorer is nowhere."""

import copy
import os
import signal
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
from genview.cli import main
from genview.config import METHODS, Heads, Optimizer, QualitySettings, ViewSettings
from genview.data import PairedViewDataset, load, read_manifest
from genview.encoders import build_encoder
from genview.foreground import ForegroundModel
from genview.networks import ConvNet, SelfSupervised, build_backbone, width_of
from genview.quality import QualityScorer
from genview.training import GenViewModule, foreground_file, kept_maps
from torch.utils.data import DataLoader

from tenfold import UserError
from tenfold.checkpoints import load as load_tensors

HEADS = Heads(hidden=16, out=8, predictor_hidden=8, queue=20, prototypes=6)


def network(method, spec="conv:8", size=16):
    backbone = build_backbone(spec)
    return SelfSupervised(backbone, method, HEADS, width_of(backbone, size))


def fit_with_lightning(module, dataset, **options):
    loader = DataLoader(dataset, batch_size=8, drop_last=True)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, loader)
    return trainer


@pytest.fixture(scope="module")
def dataset(data, world):
    return PairedViewDataset(load(f"npz:{data}").train, read_manifest(world / "merged"), 16, resident=True)


def test_the_last_convolution_of_our_backbone_sees_17_pixels():
    net = ConvNet(8).eval()
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    net.body(x)[0, :, 8, 8].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(dim=(0, 1))
    assert [int((seen.sum(dim=d) > 0).sum()) for d in (0, 1)] == [17, 17]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_with_weights(method):
    torch.manual_seed(0)
    net = network(method)
    x = torch.rand(16, 3, 16, 16)
    optimizer = torch.optim.SGD(net.groups(1e-4), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = net(x, x + 0.05 * torch.randn_like(x), torch.linspace(0.5, 1.5, 16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.follow(0.5)
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < sum(losses[1:4])  # before, the queue holds random vectors
    assert all(p.grad is None for p in net.teacher.parameters())


def test_weights_of_one_change_no_step():
    for method in METHODS:
        torch.manual_seed(0)
        net = network(method).eval()
        a, b = torch.rand(6, 3, 16, 16), torch.rand(6, 3, 16, 16)
        other = copy.deepcopy(net)  # since a step of SwAV brings its prototypes back to unit length
        assert torch.equal(net(a, b), other(a, b, torch.ones(6))), method


def test_the_momentum_copy_follows_and_ends_at_rest():
    net = network("byol")
    with torch.no_grad():
        net.backbone.body[0].weight.add_(1.0)
    before = net.teacher[0].body[0].weight.clone()
    net.follow(0.0)
    moved = net.teacher[0].body[0].weight - before
    assert torch.allclose(moved, torch.full_like(moved, 0.004), atol=1e-5)
    middle = net.teacher[0].body[0].weight.clone()
    net.follow(1.0)
    assert torch.equal(net.teacher[0].body[0].weight, middle)


def test_the_predictor_of_simsiam_keeps_its_rate_and_small_tensors_do_not_decay():
    groups = network("simsiam").groups(0.1)
    assert [g["fixed"] for g in groups].count(True) == 2
    assert all(g["weight_decay"] == 0 for g in groups if all(p.ndim <= 1 for p in g["params"]))
    assert not any(g["fixed"] for g in network("byol").groups(0.1))


def test_methods_that_cannot_be_weighted_or_are_unknown_are_refused():
    with pytest.raises(NotImplementedError, match="no loss of a pair"):
        network("barlow_twins")
    with pytest.raises(UserError, match="did you mean simclr"):
        network("simclrr")


@pytest.mark.parametrize(
    "spec", ["timm:resnet10t", "timm:test_vit", "timm:test_convnext", "tv:resnet18", "timm:test_nfnet"]
)
def test_backbones_of_other_libraries_give_one_vector(spec):
    assert width_of(build_backbone(spec), 160 if "test_" in spec else 32) > 0


def test_a_size_that_a_backbone_does_not_take_is_refused():
    with pytest.raises(UserError, match="--size 32"):
        width_of(build_backbone("timm:vit_tiny_patch16_224"), 32)


@pytest.mark.parametrize("mode", ["online", "cached", "static"])
def test_the_module_runs_in_any_trainer_and_the_scorer_is_in_no_checkpoint(mode, dataset, world, generator, tmp_path):
    views = read_manifest(world / "merged")
    static = torch.tensor([views.quality.get(key, float("nan")) for key in dataset.pictures.keys])
    scorer = maps = None
    if mode != "static":
        encoder = build_encoder(f"generator:{generator}")
        scorer = QualityScorer(encoder, ForegroundModel.load(foreground_file(str(world / "fg"))), mode)
        maps = kept_maps(scorer, dataset) if mode == "cached" else None
    module = GenViewModule(
        network("simclr"),
        Optimizer(lr=0.01),
        views=ViewSettings(blur=0.0),
        size=16,
        qd=QualitySettings(mode=mode, gamma=2.0, encoder="x", foreground="x"),
        scorer=scorer,
        static=static if mode == "static" else None,
        maps=maps,
    )
    names = set(module.state_dict())
    assert all(name.startswith("network.") for name in names)
    trainer = fit_with_lightning(
        module,
        dataset,
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)],
    )
    assert trainer.global_step == 3
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names


def words(world, data, out, *more):
    base = ["train", "--data", f"npz:{data}", "--views", world / "merged", "--backbone", "conv:8", "--size", "16"]
    base += [
        "--batch_size",
        "8",
        "--heads.hidden",
        "16",
        "--heads.out",
        "8",
        "--heads.queue",
        "20",
        "--qd.mode",
        "static",
    ]
    return [str(w) for w in [*base, "--device", "cpu", "--quiet", "--out", out, *more]]


def test_a_run_with_a_queue_that_is_killed_ends_with_the_same_weights(world, data, tmp_path):
    options = ["--method", "mocov2", "--epochs", "40", "--checkpoint_every", "7", "--log_every", "1"]
    assert main(words(world, data, tmp_path / "whole", *options)) == 0
    code = "import sys; from genview.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = words(world, data, tmp_path / "killed", *options)
    process = subprocess.Popen([sys.executable, "-c", code, *killed], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "killed/checkpoints/last.ckpt").exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    assert main([*killed, "--resume"]) == 0
    for name in ("metrics.csv",):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    tensors = [
        load_tensors(tmp_path / run / "backbone.safetensors", method="genview.backbone").tensors
        for run in ("whole", "killed")
    ]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    states = [
        torch.load(tmp_path / r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in ("whole", "killed")
    ]
    assert torch.equal(states[0]["network.loss.queue"], states[1]["network.loss.queue"])
    assert int(states[0]["network.loss.pointer"]) == int(states[1]["network.loss.pointer"])
