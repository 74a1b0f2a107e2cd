"""Training scripts as lightly's users write them, with our losses dropped in; two processes; Lightning's own options."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from genview import losses
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import SimCLRProjectionHead, SimSiamPredictionHead, SimSiamProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn


class Net(nn.Module):
    """A backbone and its heads, as in lightly's examples."""

    def __init__(self, projection, prediction=None):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection_head = projection
        self.prediction_head = prediction

    def forward(self, x):
        z = self.projection_head(self.backbone(x))
        return z if self.prediction_head is None else (z.detach(), self.prediction_head(z))


def trained(make, step, steps=4):
    """Weights after a few steps of SGD."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x0, x1 = torch.randn(2, 16, 3, 12, 12, generator=draw)
        loss = step(model, x0, x1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def simclr(criterion):
    return lambda model, x0, x1: criterion(model(x0), model(x1))


def simsiam(criterion):
    def step(model, x0, x1):
        (z0, p0), (z1, p1) = model(x0), model(x1)
        return 0.5 * (criterion(z0, p1) + criterion(z1, p0))

    return step


@pytest.mark.parametrize(
    ("make", "step", "theirs", "ours"),
    [
        (
            lambda: Net(SimCLRProjectionHead(8, 8, 4)),
            simclr,
            lambda: NTXentLoss(temperature=0.5),
            lambda: losses.QDNTXentLoss(temperature=0.5),
        ),
        (
            lambda: Net(SimSiamProjectionHead(8, 8, 8), SimSiamPredictionHead(8, 4, 8)),
            simsiam,
            NegativeCosineSimilarity,
            losses.QDNegativeCosine,
        ),
    ],
)
def test_a_script_of_lightly_ends_with_the_same_weights_with_our_loss(make, step, theirs, ours):
    expected = trained(make, step(theirs()))
    assert torch.allclose(trained(make, step(ours())), expected, atol=1e-5)
    loss = ours()
    weighted = step(lambda a, b: loss(a, b, torch.linspace(0.2, 1.8, 16)))
    assert not torch.allclose(trained(make, weighted), expected, atol=1e-5)


def test_a_script_of_moco_keeps_its_keys_where_the_queue_does_not_divide():
    queue = losses.QDMoCoLoss(4, size=40, temperature=0.2)
    seen = []

    def step(model, x0, x1):
        if not hasattr(model, "key"):
            model.key = copy.deepcopy(nn.Sequential(model.backbone, model.projection_head))
            deactivate_requires_grad(model.key)
        update_momentum(model.backbone, model.key[0], m=0.99)
        with torch.no_grad():
            keys = model.key(x1)
        seen.append(nn.functional.normalize(keys, dim=1))
        return queue(model(x0), keys)

    trained(lambda: Net(SimCLRProjectionHead(8, 8, 4)), step, steps=6)
    kept = torch.cat(seen)[-40:]
    assert torch.allclose((queue.queue @ kept.T).amax(dim=0), torch.ones(40), atol=1e-5)


def test_swav_takes_the_lists_that_lightlys_loss_takes():
    torch.manual_seed(0)
    high, low = [torch.randn(8, 6) for _ in range(2)], [torch.randn(8, 6) for _ in range(3)]
    expected = SwaVLoss(temperature=0.1)(high, low)
    assert losses.QDSwAVLoss(0.1)(high, low).item() == pytest.approx(expected.item(), rel=1e-4)


UNEVEN = """
import sys, torch
from genview import losses
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
n = 4 + rank
a, b = torch.randn(n, 6), torch.randn(n, 6)
calls = [
    lambda: losses.QDNTXentLoss(0.5)(a, b),
    lambda: losses.QDMoCoV3Loss()(a, b),
    lambda: losses.QDMoCoLoss(6, 8)(a, b),
    lambda: losses.QDMultiPositiveLoss()(torch.cat([a, b]), torch.arange(n).repeat(2)),
    lambda: losses.image_text_qd_loss(a, b, 10.0),
]
for call in calls:
    try:
        call()
    except ValueError as error:
        assert "needs equal batches" in str(error), error
    else:
        sys.exit(f"{call} took uneven batches")
z = torch.nn.functional.normalize(torch.cat([a, b]), dim=1)
logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
own = torch.nn.functional.cross_entropy(logits, torch.arange(2 * n).roll(n))
assert torch.allclose(losses.QDNTXentLoss(0.5, gather=False)(a, b), own, atol=1e-5)
torch.distributed.destroy_process_group()
"""


def run_both(code, *words):
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank), *map(str, words)]) for rank in (0, 1)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]


def test_processes_with_batches_of_different_sizes_are_refused_and_not_mislabeled(tmp_path):
    run_both(UNEVEN, tmp_path / "store")


DDP = """
import json, os, sys
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader, TensorDataset
from genview.config import Heads, Optimizer, QualitySettings, ViewSettings
from genview.networks import SelfSupervised, build_backbone, width_of
from genview.training import GenViewModule

rank, port, out, method = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
torch.manual_seed(0)
backbone = build_backbone("conv:8")
heads = Heads(hidden=16, out=8, predictor_hidden=8, queue=20, prototypes=6)
network = SelfSupervised(backbone, method, heads, width_of(backbone, 16))
draw = torch.Generator().manual_seed(3)
images = torch.randint(256, (11, 3, 16, 16), dtype=torch.uint8, generator=draw)
data = TensorDataset(torch.arange(11), images, images.flip(3), torch.ones(11, dtype=torch.bool))
module = GenViewModule(
    network, Optimizer(lr=0.05), views=ViewSettings(blur=0.0), size=16,
    qd=QualitySettings(mode="static", gamma=2.0), static=torch.linspace(-1, 1, 11),
)
checkpoint = pl.callbacks.ModelCheckpoint(out, save_last=True, save_top_k=-1, every_n_train_steps=2)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[checkpoint],
)
trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
weights = torch.cat([p.detach().flatten() for p in module.network.parameters() if p.requires_grad])
json.dump([trainer.global_step, float(weights.double().sum()), bool(weights.isfinite().all())], open(f"{out}/{rank}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "mocov2", "mocov3"])
def test_two_devices_of_lightning_end_alike_where_the_last_batch_is_short(tmp_path, method):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_both(DDP, port, tmp_path, method)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][0] == 6
    assert found[0][2]
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("network.") for name in kept)
