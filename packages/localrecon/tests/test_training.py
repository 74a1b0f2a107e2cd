import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from localrecon import LocalReconModule, LocalTrainer, MemoryMonitor, SGRConfig, StepOptions, local_step
from localrecon import step as step_module
from localrecon.cli import main
from localrecon.commands.compare import arms_of, measure
from localrecon.config import CompareSettings, OptimizerSettings
from localrecon.data import load_data
from localrecon.evaluation import evaluate
from localrecon.optimizers import make_optimizers, optimizer_of, state_bytes
from localrecon.plan import PlanMismatchError
from localrecon_test_nets import convs, dropout_mlp, images, mlp, same, sgds, split, vectors, weights
from PIL import Image
from safetensors.torch import load_file

from tenfold import UserError
from tenfold.config import TrainerConfig
from tenfold.loading import KeyedLoader
from tenfold.training import fit


def pairs(count=32):
    return list(zip(*vectors(count), strict=True))


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


SETTINGS = SGRConfig(gate=True)


def trainer():
    net = split(dropout_mlp(), vectors()[0], 3)
    return LocalTrainer(net, SETTINGS, momentum, halving, StepOptions(seed=3))


def loader():
    return KeyedLoader(pairs(), batch_size=8, seed=1)


def test_two_and_two_steps_through_a_file_are_four_bit_for_bit(tmp_path):
    whole = trainer()
    whole.fit(loader(), 2)
    first = trainer()
    reports = []
    with pytest.raises(InterruptedError):
        first.fit(loader(), 2, on_step=stop_after(6), checkpoint=tmp_path / "c.pt", checkpoint_every=5)
    second = trainer()
    second.fit(loader(), 2, on_step=lambda step, report: reports.append(step), checkpoint=tmp_path / "c.pt")
    assert reports == [6, 7, 8]
    assert same(weights(whole.net), weights(second.net))


def stop_after(count):
    def on_step(step, report):
        if step == count:
            raise InterruptedError

    return on_step


def test_checkpoints_of_other_splits_and_other_files_are_refused(tmp_path):
    one = trainer()
    one.save(tmp_path / "c.pt")
    other = LocalTrainer(split(dropout_mlp(), vectors()[0], 2))
    with pytest.raises(PlanMismatchError, match="cuts"):
        other.load(tmp_path / "c.pt")
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no.pt"):
        one.load(tmp_path / "no.pt")
    torch.save({"plan": print}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="not unpickled"):
        one.load(tmp_path / "code.pt")


def test_lightning_does_what_the_plain_loop_does_bit_for_bit():
    plain = trainer()
    plain.fit(loader(), 2)
    net = split(dropout_mlp(), vectors()[0], 3)
    module = LocalReconModule(net, SETTINGS, momentum, halving, StepOptions(seed=3, total_steps=8))
    fit(module, loader(), TrainerConfig(epochs=2, device="cpu"), seed=1, quiet=True)
    assert same(weights(plain.net), weights(net))


def test_users_trainers_of_lightning_log_every_module(tmp_path):
    x, y = images(16)
    net = split(convs(), x, 2)
    module = LocalReconModule(net, SGRConfig(ramp=0), momentum, None, StepOptions(accumulate=2, clip_norm=1.0))
    data = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=8)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    user = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[MemoryMonitor(1)], default_root_dir=tmp_path, **quiet)
    user.fit(module, data, data)
    logged = set(user.callback_metrics)
    assert {"m1/loss", "m1/acc", "m2/loss", "b1/cos", "b1/R", "val/acc", "val/loss", "memory/peak_mib"} <= logged
    half = pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    half.precision_plugin.precision = "16-mixed"
    with pytest.raises(UserError, match="dtype=torch.float16"):
        half.fit(LocalReconModule(net), data)


def test_factories_that_share_parameters_are_refused():
    net = split(mlp(), vectors()[0], 2)
    everything = [p for k in range(2) for p in net.parameters_of(k)]
    with pytest.raises(UserError, match="optimizer of module 1 holds 8 of its 8 parameters and parameters of module 2"):
        make_optimizers(net, lambda parameters: torch.optim.SGD(everything, lr=0.1))
    one = torch.optim.SGD(net.parameters_of(0), lr=0.1)
    with pytest.raises(UserError, match="module 2"):
        make_optimizers(net, lambda parameters: one)


def test_float16_scales_each_module_on_its_own():
    x, y = vectors()
    one = LocalTrainer(split(mlp(), x, 2), SGRConfig(ramp=0), momentum, None, StepOptions(dtype=torch.float16))
    assert len(one.stepper.scalers) == 2
    with torch.no_grad():
        before = [p.clone() for p in one.net.parameters_of(0)]
    report = one.step(x, y)
    assert report.modules[1].cosine is not None
    assert not all(torch.equal(a, b) for a, b in zip(before, one.net.parameters_of(0), strict=True))


def test_evaluation_counts_every_head():
    x, y = vectors(10)
    net = split(mlp(), x, 2).eval()
    found = evaluate(net, [(x[:6], y[:6]), (x[6:], y[6:])])
    exits = net.forward_exits(x)
    for k in range(2):
        assert found[f"accuracy {k + 1}"] == pytest.approx(100 * float((exits[k].argmax(1) == y).float().mean()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(exits[1], y)))


ARM = {
    "model": "convnet",
    "data": "digits",
    "depth": 3,
    "width": 8,
    "k": 2,
    "epochs": 1,
    "batch_size": 128,
    "device": "cpu",
}


def test_all_methods_run_through_one_loop_and_share_their_start():
    settings = CompareSettings(**ARM)
    data = load_data(settings)
    found = {
        method: measure(method, settings, data, True, 0) for method in ("bp", "ckpt", "accum", "local", "sgr", "bpfree")
    }
    assert found["bp"]["accuracy"] == found["ckpt"]["accuracy"]  # the same numbers, computed in another order of need
    assert found["bp"]["loss"] == found["ckpt"]["loss"]
    assert found["accum"]["loss"] != found["bp"]["loss"]  # BatchNorm sees halves
    assert found["local"]["peak MiB"] < found["bp"]["peak MiB"]
    assert all(math.isfinite(arm["loss"]) and arm["seconds"] > 0 for arm in found.values())


def test_numbers_of_modules_make_arms_unless_the_cuts_are_given():
    assert list(arms_of(CompareSettings(**ARM, arms=["bp", "sgr"], ks=[2, 3]))) == ["bp", "sgr-k2", "sgr-k3"]
    assert list(arms_of(CompareSettings(**ARM, arms=["local", "sgr"], cuts=[1]))) == ["local", "sgr"]
    with pytest.raises(UserError, match="--ks does not go with --budget or --cuts"):
        CompareSettings(**ARM, ks=[2], budget="1GB")


def test_language_models_are_trained_on_text(tmp_path):
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    text = f"text:{tmp_path / 't.txt'}"
    small = {"depth": 2, "width": 16, "window": 64, "k": 2, "batch_size": 128, "epochs": 1}
    settings = CompareSettings(model="gpt", data=text, device="cpu", **small)
    data = load_data(settings)
    found = measure("sgr", settings, data, True, 0)
    assert found["bits"] < 8


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as many as here


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


def killed(arguments, turns):
    """``main`` in a copy of this process, which kills itself (SIGKILL) at a module's turn of that number."""
    process = os.fork()
    if not process:
        signal.alarm(100)
        count, train_stage = iter(range(10**9)), step_module.train_stage

        def counting(*args, **kwargs):
            if next(count) == turns:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_stage(*args, **kwargs)

        step_module.train_stage = counting
        main(arguments)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("model", ["mlp", "timm:test_vit"])
def test_killed_before_and_after_its_first_checkpoint_and_resumed_it_ends_with_the_same_files(
    model, tmp_path, pictures
):
    small = {"mlp": "--data digits --depth 4 --epochs 1", "timm:test_vit": f"--data imagefolder:{pictures} --epochs 6"}
    sizes = "--batch_size 64" if model == "mlp" else "--batch_size 4 --image_size 32 --augment crop"
    words = f"train --model {model} {small[model]} {sizes} --k 2 --checkpoint_every 7 --device cpu --quiet".split()

    def arguments(name, *more):
        return [*words, "--out", str(tmp_path / name), *more]

    killed(arguments("killed"), 2 * 4)
    assert (tmp_path / "killed/plan.json").exists()
    assert not (tmp_path / "killed/checkpoints/last.ckpt").exists()
    killed(arguments("killed", "--resume"), 2 * 5 + 1)  # once more, in the middle of a step
    assert not (tmp_path / "killed/checkpoints/last.ckpt").exists()
    killed(arguments("killed", "--resume"), 2 * 9)
    assert (tmp_path / "killed/checkpoints/last.ckpt").exists()
    assert main(arguments("whole")) == 0
    assert main(arguments("killed", "--resume")) == 0
    for name in ("backbone.safetensors", "heads.safetensors", "metrics.csv", "plan.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw8bit"])
def test_the_bytes_foreseen_for_an_optimizers_states_are_those_that_it_keeps(name):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4095,), (64, 64), (300, 70), (3,))]
    optimizer = optimizer_of(OptimizerSettings(name=name), parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = {
        state.untyped_storage().data_ptr(): state.nbytes
        for states in optimizer.state.values()
        for key, state in states.items()
        if isinstance(state, torch.Tensor) and state.dim() and "qmap" not in key  # the quantiles are shared by all
    }
    assert sum(kept.values()) == sum(state_bytes(name, parameter) for parameter in parameters)


def test_states_of_eight_bits_train_like_those_of_thirty_two_and_resume_to_the_same_files(tmp_path):
    settings = "--model mlp --data digits --depth 3 --k 2 --epochs 1 --checkpoint_every 7 --device cpu --quiet"
    words = ["train", *settings.split()]

    def arguments(name, optimizer, *more):
        return [*words, "--optimizer.name", optimizer, "--out", str(tmp_path / name), *more]

    killed(arguments("killed", "adamw8bit"), 2 * 9)
    assert main(arguments("killed", "adamw8bit", "--resume")) == 0
    assert main(arguments("whole", "adamw8bit")) == 0
    assert main(arguments("plain", "adamw")) == 0
    for name in ("backbone.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    ends = [load_file(tmp_path / name / "backbone.safetensors") for name in ("whole", "plain")]
    moved = [torch.cat([end[key].flatten() for key in end]) for end in ends]
    assert not torch.equal(*moved)
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.99


@pytest.mark.slow
def test_two_devices_train_as_one_with_the_whole_batch(tmp_path):
    """On the command line, where Lightning starts the second process; networks without BatchNorm."""
    words = [
        "train",
        "--model",
        "mlp",
        "--data",
        "digits",
        "--k",
        "2",
        "--depth",
        "4",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--quiet",
    ]
    both = [*words, "--batch_size", "64", "--devices", "2", "--strategy", "ddp", "--out", str(tmp_path / "two")]
    command = str(Path(sys.executable).parent / "localrecon")  # a file, which Lightning can start again
    subprocess.run([command, *both], env=ENVIRONMENT, check=True, timeout=600)
    assert main([*words, "--batch_size", "128", "--out", str(tmp_path / "one")]) == 0
    for name in ("backbone.safetensors", "heads.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, msg=key)


def test_a_step_from_the_readme_is_the_trainers():
    x, y = vectors()
    net = split(dropout_mlp(), x, 3)
    by_hand = split(dropout_mlp(), x, 3)
    LocalTrainer(net, SGRConfig(ramp=0), momentum).step(x, y)
    optimizers = [momentum(by_hand.parameters_of(k)) for k in range(3)]
    local_step(by_hand, x, y, optimizers, SGRConfig(ramp=0), StepOptions())
    assert same(weights(net), weights(by_hand))
    assert sgds(net)
