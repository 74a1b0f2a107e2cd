"""What people bring: backbones of many kinds, a Ray cluster that loses a worker."""

import json
import shutil
import threading
import time

import pytest
import torch
from genview.cli import main
from genview.config import Heads
from genview.networks import SelfSupervised, build_backbone, width_of
from genview.plans import line_of
from genview.store import ViewStore

from tenfold.readers import read_image
from tenfold.testing import assert_user_error

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


def stepped(backbone, size):
    """A network and its loss after one weighted step on pictures of a size."""
    net = SelfSupervised(backbone, "byol", Heads(hidden=16, out=8, predictor_hidden=8), width_of(backbone, size))
    net.train()
    x = torch.rand(4, 3, size, size)
    loss = net(x, x.flip(3), torch.tensor([0.5, 1.5, 1.0, 1.0]))
    loss.backward()
    torch.optim.SGD(net.groups(1e-4), lr=0.01).step()
    net.follow(0.5)
    return net, loss


@pytest.mark.slow
def test_a_backbone_with_frozen_batch_norms_keeps_their_statistics():
    import timm

    torch.manual_seed(0)
    backbone = timm.layers.freeze_batch_norm_2d(timm.create_model("resnet18", num_classes=0))
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    net, loss = stepped(backbone, 64)
    assert bool(torch.isfinite(loss))
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.named_buffers())


@pytest.mark.slow
def test_a_transformer_of_dynamic_size_takes_pictures_of_several_sizes():
    import timm

    torch.manual_seed(0)
    for size in (64, 96):
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
        assert bool(torch.isfinite(stepped(backbone, size)[1]))


@pytest.fixture
def ray(monkeypatch):
    """Ray, whose agents and actors start slowly on a busy machine: actors without Ray's own niceness of 15."""
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "300")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "120")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    found = pytest.importorskip("ray")
    yield found
    found.shutdown()


def on_ray(plan, tmp_path, name, workers):
    words = ["generate", "--plan", plan, "--views", tmp_path / name, "--generator", "tiny", "--steps", 2]
    words += ["--batch_size", 1, "--engine", "ray", "--ray_workers", workers, "--device", "cpu"]
    return [str(word) for word in [*words, "--quiet", "--out", tmp_path / f"log-{name}"]]


def stored(folder):
    """Name and variation of each whole row of all parts, of which none may come twice."""
    lines = [line for file in folder.glob("rows/*.jsonl") for line in file.read_text().splitlines(keepends=True)]
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["key"], row["variation"]) for row in found]


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_worker_makes_the_same_views(world, generator, tmp_path, capsys, monkeypatch, ray):
    monkeypatch.chdir(generator.parent)
    plan, killed = tmp_path / "plan", []
    shutil.copytree(world / "plan", plan)
    rows = [json.loads(line) for line in (plan / "plan.jsonl").read_text().splitlines()]
    rows[3] |= {"error": "broken", "unit": -1}
    (plan / "plan.jsonl").write_text("".join(line_of(row) for row in rows))

    def kill_one():
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and not killed:
            if (
                any(file.stat().st_size > 400 for file in (tmp_path / "v/rows").glob("*.jsonl"))
                and ray.is_initialized()
            ):
                names = [name for name in ray.util.list_named_actors() if name.startswith("genview-")]
                if names:
                    ray.kill(ray.get_actor(names[0]), no_restart=False)
                    killed.append(len(stored(tmp_path / "v")))
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        assert main(on_ray(plan, tmp_path, "v", 3)) == 0
    finally:
        thread.join()
    names = stored(tmp_path / "v")
    assert 0 < killed[0] < len(names) == len(set(names)) == len(rows)
    store, known = ViewStore.open(tmp_path / "v"), ViewStore.open(world / "views").rows()
    broken = (rows[3]["key"], rows[3]["variation"])
    assert store.rows()[broken].error == "broken"
    assert store.done() == set(known) - {broken}
    for name in store.done():
        a, b = (
            read_image(root / r.path).astype(int)
            for root, r in ((tmp_path / "v", store.rows()[name]), (world / "views", known[name]))
        )
        assert abs(a - b).max() <= 1

    (plan / "embeddings.npy").unlink()
    config = plan / "config.yaml"
    config.write_text(config.read_text().replace("colors.npz", "gone.npz"))
    capsys.readouterr()
    assert_user_error(main, on_ray(plan, tmp_path, "w", 1), capsys, "gone.npz")
