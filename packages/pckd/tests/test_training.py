"""Training: resumed to the same bits, cached teachers, two ranks as one, exported students, timm's protocol."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pckd import CacheMismatchError, Distiller, Losses, Optimizer, PCKDConfig, PCKDLoss, PCKDTask, TeacherCache, Views
from pckd.analysis import center_correlation, fisher_ratio, most_previewed
from pckd.cli import main
from pckd.config import TrainSettings
from pckd.data import load
from pckd.models import build
from pckd.teacher import as_teacher
from pckd.training import train_student
from safetensors.torch import load_file
from torch import nn

OPTIONS = ["--student", "cifar:plain4", "--teacher", "cifar:plain8", "--epochs", "2", "--batch_size", "16"]
OPTIONS += ["--views.kind", "crop", "--views.number", "2", "--views.padding", "1", "--losses.pckd.align_hidden", "32"]
OPTIONS += ["--reading.limit", "96", "--log_every", "1", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": build("cifar:plain8", 10).state_dict()}, path)
    return path


def words(teacher_file, out, *more):
    return ["train", "--data", "digits", "--teacher_weights", str(teacher_file), *OPTIONS, "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(teacher_file, tmp_path_factory):
    """An unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(teacher_file, out)) == 0
    return out


def same(a, b):
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    ours, theirs = load_file(a / "student.safetensors"), load_file(b / "student.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})
    one, other = (np.load(x / "weights.npz") for x in (a, b))
    assert all(np.array_equal(one[key], other[key], equal_nan=True) for key in ("gamma", "weights"))


KILLED = """
import os, signal, sys
from pckd import cli, training
step = training.PCKDLightning.training_step
def until_killed(self, batch, number):
    if self.global_step == 9:  # the second epoch has begun
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, number)
training.PCKDLightning.training_step = until_killed
cli.main(sys.argv[1:])
"""


def test_a_killed_run_resumes_to_the_same_student_bit_for_bit(teacher_file, whole, tmp_path):
    """Killed within the second epoch, and resumed from a checkpoint within the first."""
    out = tmp_path / "run"
    line = words(teacher_file, out, "--checkpoint_every", "4")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED, *line], env=environment, timeout=200, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "student.safetensors").exists()
    assert main([*line, "--resume"]) == 0
    same(out, whole)


def test_the_same_seed_gives_the_same_run_and_another_one_another(teacher_file, whole, tmp_path):
    assert main(words(teacher_file, tmp_path / "again")) == 0
    same(tmp_path / "again", whole)
    assert main(words(teacher_file, tmp_path / "other", "--seed", "1")) == 0
    assert (tmp_path / "other/metrics.csv").read_bytes() != (whole / "metrics.csv").read_bytes()


def test_the_student_alone_is_exported(whole):
    """No heads, no teacher; the same logits from the file, with plain torch."""
    state = load_file(whole / "student.safetensors")
    card = json.loads((whole / "config.json").read_text())
    plain = build(card["model"], len(card["classes"]))
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    assert sum(v.numel() for v in state.values()) < 10_000
    checkpoint = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)
    heads = {name.split(".")[2] for name in checkpoint["state_dict"] if name.startswith("distiller.objective")}
    assert heads == {"contrast", "feature_align"}
    assert all(name.startswith(("distiller.student", "distiller.objective")) for name in checkpoint["state_dict"])
    preview = np.load(whole / "weights.npz")
    assert preview["weights"].shape == preview["gamma"].shape == (2, 90)
    assert not np.isnan(preview["gamma"]).any()


def test_a_cache_stands_for_its_teacher(teacher_file, tmp_path, capsys):
    """The second round of an epoch is the first one's; nearly the same student; another teacher is refused."""
    made = ["cache", "--data", "digits", "--teacher", "cifar:plain8", "--teacher_weights", str(teacher_file)]
    made += ["--epochs", "1", "--quiet", "--reading.limit", "96", "--device", "cpu"]
    made += ["--views.kind", "crop", "--views.number", "2", "--views.padding", "1"]
    assert main([*made, "--out", str(tmp_path / "cache")]) == 0
    cache = TeacherCache(tmp_path / "cache")
    index = torch.tensor([5, 2])
    for epoch in (0, 1, 7):
        assert torch.equal(cache.get(index, epoch).feature, cache.get(index, 0).feature)
    settings = TrainSettings(
        data="digits",
        student="cifar:plain4",
        teacher="cifar:plain8",
        teacher_weights=str(teacher_file),
        epochs=1,
        batch_size=16,
        views=Views(kind="crop", number=2, padding=1),
        losses=Losses(pckd=PCKDConfig(align_hidden="32")),
        device="cpu",
    )
    data = load("digits", dataclasses.replace(settings.reading, limit=96))
    model = build("cifar:plain8", 10, str(teacher_file))
    live = train_student(data, settings, teacher=as_teacher(model, data), quiet=True)
    cached = train_student(data, settings, cache=cache, quiet=True)
    for a, b in zip(live.model.parameters(), cached.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=0.1)
    with pytest.raises(CacheMismatchError, match="teacher is .*, here 'x'"):
        cache.check({"teacher": "x"})
    wrong = words(teacher_file, tmp_path / "run", "--cache", str(tmp_path / "cache"), "--views.padding", "2")
    assert main(wrong) == 2
    assert "the cache was made for something else: views" in capsys.readouterr().err
    with pytest.raises(CacheMismatchError, match="pckd cache"):
        TeacherCache(tmp_path)
    head = tmp_path / "cache/head.npz"
    head.write_bytes(head.read_bytes()[:100])
    with pytest.raises(CacheMismatchError, match="pckd cache"):
        TeacherCache(tmp_path / "cache")


RANKS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from pckd import Distiller
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, sys.argv[4])
import two_ranks
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
distiller = two_ranks.distiller()
images, labels = two_ranks.batch()
half = slice(4 * rank, 4 * rank + 4)
model = DistributedDataParallel(distiller)
loss = model(images.view(8, 2, 10)[half].flatten(0, 1), labels[half], 3)
loss.total.backward()
total = loss.total.detach().clone()
dist.all_reduce(total)
grads = {n: p.grad for n, p in distiller.named_parameters()}
torch.save({"total": total / 2, "gamma": loss.gamma, **grads}, f"{out}/{rank}.pt")
"""
MODEL = """
import torch
from pckd import Distiller, Losses, PCKDConfig
from torch import nn
class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(10, 6), nn.Linear(6, 4)
    def forward(self, x):
        return self.fc(self.body(x).tanh())
def distiller():
    torch.manual_seed(0)
    made = Distiller(Flat(), Flat(), "pckd", Losses(pckd=PCKDConfig(f=0)), example=torch.randn(2, 10))
    return made
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 10, generator=generator), torch.randint(4, (8,), generator=generator)
"""


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    """Loss and gradients to 1e-6, with the global mean in gamma; a student without batch norm."""
    import socket

    (tmp_path / "two_ranks.py").write_text(MODEL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    lines = [[sys.executable, "-c", RANKS, str(rank), port, str(tmp_path), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(line, stderr=subprocess.PIPE) for line in lines]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read().decode()
    names: dict = {}
    exec(MODEL, names)
    distiller = names["distiller"]()
    images, labels = names["batch"]()
    loss = distiller(images, labels, 3)
    loss.total.backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.allclose(torch.cat([f["gamma"] for f in found]), loss.gamma, rtol=1e-5)
    assert float((found[0]["total"] - loss.total).abs() / loss.total) < 1e-6
    for name, parameter in distiller.named_parameters():
        scale = float(parameter.grad.abs().max())
        for f in found:
            assert float((f[name] - parameter.grad).abs().max()) <= 2e-6 * max(scale, 1), name


def test_timms_protocol_and_ones_own_loop():
    """The same loss by the task and by the module; epochs of timm's loop begin at 0."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.tensor([1, 0])
    distiller = Distiller(build("cifar:plain4", 3), build("cifar:plain8", 3), example=images)
    task = PCKDTask(distiller, epochs=10)
    task.set_epoch(4)
    state = {k: v.clone() for k, v in distiller.state_dict().items()}
    found = task(images, labels)
    distiller.load_state_dict(state)
    loss = distiller(images, labels, 5, 10)
    assert torch.equal(found["loss"], loss.total)
    assert found["output"].shape == (2, 3)  # of the upright views, for the metrics of timm's loop
    assert torch.allclose(found["task_loss"] + found["kd_loss"], loss.total)


def test_numbers_of_the_analysis():
    labels = torch.tensor([0, 0, 1, 1])
    tight = torch.tensor([[1, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
    assert fisher_ratio(tight, labels) == pytest.approx(100, rel=1e-6)
    weight = torch.randn(7, 5)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    assert center_correlation(weight @ turn, weight) == pytest.approx(1)
    preview = {"weights": np.array([[1, 0.2, 1, 0]], np.float16), "gamma": np.array([[0.5, 2, 0.1, 3]], np.float16)}
    assert most_previewed([preview])[0].tolist() == [3, 1, 0, 2]


def test_mislabeled_images_gather_at_the_top(tmp_path):
    """The list of the most held back images finds wrong labels: 8 of 160 digits are given another one."""
    data = load("digits", dataclasses.replace(TrainSettings(data="digits", student="x").reading, limit=160))
    labels = data.train.labels.clone()
    wrong = torch.arange(0, len(labels), 20)
    labels[wrong] = (labels[wrong] + 3) % 10
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))
    settings = TrainSettings(
        data="digits",
        student="cifar:plain8",
        epochs=12,
        batch_size=16,
        views=Views(kind="none"),
        optimizer=Optimizer(lr=0.05, schedule="cosine"),
        device="cpu",
    )
    trained = train_student(data, settings, quiet=True)
    order = most_previewed([trained.preview])[0]
    found = len(set(order[: 2 * len(wrong)].tolist()) & set(wrong.tolist()))
    assert found >= 0.75 * len(wrong), found


def test_ce_is_the_plain_model_and_pckd_modules_compose():
    """A loss as a module of somebody's own loop, without a Distiller."""
    loss = PCKDLoss(64, 64, PCKDConfig(align_hidden="32"))
    assert {name.split(".")[0] for name, _ in loss.named_parameters()} == {"feature_align", "contrast"}
    assert not list(PCKDLoss(64, 64, PCKDConfig(f=0, beta=0)).parameters())
    model = build("cifar:plain4", 3)
    ce = Distiller(model, None, "ce", example=torch.randn(2, 3, 8, 8))
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    assert torch.equal(ce(images, labels, 1).total, F.cross_entropy(model(images), labels))
    assert isinstance(ce.student.layers[0], nn.Linear)
