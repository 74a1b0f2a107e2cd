"""What people bring: backbones of many kinds, a Ray cluster that loses a worker."""

import threading
import time

import pytest
import torch
from genview.cli import main
from genview.config import Heads
from genview.networks import SelfSupervised, build_backbone, width_of
from genview.store import ViewStore

from tenfold.readers import read_image

BACKBONES = (
    "resnet18",
    "resnet26d",
    "resnetv2_50",
    "seresnet18",
    "regnetx_002",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "convnext_atto",
    "convnextv2_atto",
    "mixnet_s",
    "ghostnet_050",
    "vgg11_bn",
    "densenet121",
    "repvgg_a0",
    "edgenext_xx_small",
    "nf_resnet26",
    "inception_next_atto",
    "starnet_s1",
)
BREAK_CHANNELS_LAST = {"repvgg_a0"}
"""timm's own model, alone, breaks torch 2.15's heap in a backward pass on a CPU with channels last."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_many_kinds_take_a_weighted_step(name):
    torch.manual_seed(0)
    backbone = build_backbone(f"timm:{name}")
    net = SelfSupervised(backbone, "byol", Heads(hidden=16, out=8, predictor_hidden=8), width_of(backbone, 64))
    optimizer = torch.optim.SGD(net.groups(1e-4), lr=0.01)
    x = torch.rand(4, 3, 64, 64)
    if name not in BREAK_CHANNELS_LAST:
        x = x.to(memory_format=torch.channels_last)
    loss = net(x, x.flip(3), torch.tensor([0.5, 1.5, 1.0, 1.0]))
    loss.backward()
    optimizer.step()
    net.follow(0.5)
    assert bool(torch.isfinite(loss))


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_worker_makes_the_same_views(world, generator, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")  # on a busy machine its agents start slowly
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    ray = pytest.importorskip("ray")
    killed = []

    def kill_one():
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not killed:
            rows = list((tmp_path / "v/rows").glob("*.jsonl"))
            if rows and ray.is_initialized():
                names = [name for name in ray.util.list_named_actors() if name.startswith("genview-")]
                if names:
                    ray.kill(ray.get_actor(names[0]), no_restart=False)
                    killed.append(names[0])
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    words = [
        "--plan",
        world / "plan",
        "--views",
        tmp_path / "v",
        "--generator",
        generator,
        "--steps",
        2,
        "--batch_size",
        1,
    ]
    words += ["--engine", "ray", "--ray_workers", 3, "--device", "cpu", "--quiet", "--out", tmp_path / "log"]
    try:
        assert main(["generate", *map(str, words)]) == 0
    finally:
        thread.join()
        ray.shutdown()
    assert killed
    store, known = ViewStore.open(tmp_path / "v"), ViewStore.open(world / "views").rows()
    assert store.done() == set(known)
    for name, row in store.rows().items():
        a, b = (
            read_image(root / r.path).astype(int) for root, r in ((tmp_path / "v", row), (world / "views", known[name]))
        )
        assert abs(a - b).max() <= 1
