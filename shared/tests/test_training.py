import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tenfold import NonFiniteError, UserError
from tenfold.config import TrainerConfig
from tenfold.devices import choose_device, choose_precision, seed_everything
from tenfold.loading import KeyedLoader, cut
from tenfold.runs import Run
from tenfold.training import fit

sys.path.insert(0, str(Path(__file__).parent))
import training_run
from training_run import Net, Points, Setup, train

CPU = TrainerConfig(epochs=4, checkpoint_every=4, log_every=1, device="cpu", precision="32")  # 6 batches an epoch
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["lightning.pytorch", "tenfold.training"])  # imported once, not by every process


@pytest.fixture(autouse=True)
def _process_wide_settings():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def start(path, setup, **kwargs):
    ours, theirs = forks.Pipe()
    process = forks.Process(target=training_run.train_in_process, args=(path, setup, theirs), kwargs=kwargs)
    process.start()
    theirs.close()
    return process, ours


def run_unbroken(path, setup):
    process, pipe = start(path, setup)
    while pipe.recv() != "fitted":
        pipe.send("go on")
    pipe.send("go on")
    process.join()
    assert process.exitcode == 0
    return results(path)


def run_killed_at(path, setup, moment):
    """Kill when that batch of this process (or ``"fitted"``) has begun; where in it, depends on the race."""
    process, pipe = start(path, setup)
    while (reached := pipe.recv()) != moment:
        assert reached != "fitted"
        pipe.send("go on")
    if moment != "fitted":
        pipe.send("go on")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def run_killed_in_save(path, setup, number):
    process, pipe = start(path, setup, dies_in_save=number)
    try:
        while True:
            pipe.recv()
            pipe.send("go on")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        process.join()
    assert process.exitcode == -signal.SIGKILL


def results(path):
    return {name: (path / name).read_bytes() for name in ("metrics.csv", "model.safetensors")}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def state_of(path):
    return torch.load(path / "checkpoints/last.ckpt", weights_only=True)


# Exact resume


def test_a_run_killed_six_times_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    """Before the first checkpoint, in the middle of epochs, in a half-written checkpoint, after the last step."""
    setup = Setup(CPU)
    expected = run_unbroken(tmp_path / "whole", setup)
    chance, broken = random.Random(0), tmp_path / "broken"
    run_killed_at(broken, setup, chance.randint(1, 4))
    assert not (broken / "checkpoints").exists()
    run_killed_at(broken, setup, chance.randint(6, 9))
    step = state_of(broken)["tenfold"]["step"]
    run_killed_in_save(broken, setup, 2)
    assert state_of(broken)["tenfold"]["step"] == step + 4, "the half-written checkpoint took the whole one's place"
    run_killed_at(broken, setup, chance.randint(5, 8))
    run_killed_at(broken, setup, chance.randint(5, 7))
    run_killed_at(broken, setup, "fitted")
    assert run_unbroken(broken, setup) == expected
    assert [row["step"] for row in rows(broken / "metrics.csv")] == [str(step) for step in range(1, 25)]


def test_with_accumulation_step_validation_and_workers_too(tmp_path):
    """The whole run reads in its own process, the broken one with two workers."""
    config = replace(CPU, epochs=None, steps=10, accumulate=2, checkpoint_every=2, validate_every=2, log_every=3)
    expected = run_unbroken(tmp_path / "whole", Setup(config))
    chance, broken, setup = random.Random(1), tmp_path / "broken", Setup(config, num_workers=2)
    for _ in range(4):
        run_killed_at(broken, setup, chance.randint(4, 7))
    assert run_unbroken(broken, setup) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "validate_every"),  # at least one validation an epoch of 6 batches, as ReduceLROnPlateau wants it
    [(1, 0), (1, 2), (1, 3), (2, 0), (2, 2), (2, 3), (4, 0)],
)
@pytest.mark.parametrize("checkpoint_every", [1, 4, 7])
def test_killed_at_every_batch(tmp_path, accumulate, validate_every, checkpoint_every):
    config = replace(CPU, checkpoint_every=checkpoint_every, accumulate=accumulate, validate_every=validate_every)
    expected = run_unbroken(tmp_path / "whole", Setup(config))
    for batch in range(1, 25):
        run_killed_at(tmp_path / str(batch), Setup(config), batch)
        assert run_unbroken(tmp_path / str(batch), Setup(config)) == expected, f"killed at batch {batch}"


def test_ctrl_c_finishes_the_step_writes_the_checkpoint_and_resumes_exactly(tmp_path, capfd):
    setup = Setup(replace(CPU, checkpoint_every=100))
    train(tmp_path / "whole", setup)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", setup, [training_run.InterruptAt(9)])
    assert signal.getsignal(signal.SIGINT) == before
    assert state_of(tmp_path / "broken")["tenfold"]["step"] == 9
    train(tmp_path / "broken", setup)
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
    assert capfd.readouterr() == ("", "")  # quiet


def test_ctrl_c_between_accumulated_batches_stops_at_the_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Setup(replace(CPU, accumulate=3)), [training_run.InterruptAt(8)])
    state = state_of(tmp_path)["tenfold"]
    assert (state["step"], state["epoch"], state["batches"]) == (3, 1, 3)


def test_ctrl_c_in_the_last_step_still_counts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Setup(CPU), [training_run.InterruptAt(24)])
    assert state_of(tmp_path)["tenfold"]["done"]


class StopAt(pl.Callback):
    def __init__(self, step):
        self.step = step
        self.batches = 0

    def on_train_batch_end(self, trainer, module, *batch):
        self.batches += 1
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.slow
def test_two_processes_train_one_model_into_one_folder(tmp_path):
    """Two processes of gloo, started by Lightning as a command line would; rank 1 must neither refuse nor write."""
    command = [sys.executable, training_run.__file__, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    logged = [row["step"] for row in rows(tmp_path / "a/metrics.csv") if row["loss"]]
    assert logged == list("123456")  # each rank takes 3 of the 6 batches of an epoch
    assert json.loads((tmp_path / "a/run.json").read_text())["finished"]
    assert state_of(tmp_path / "a")["tenfold"]["done"]


def test_a_training_that_was_stopped_early_does_not_go_on_when_resumed(tmp_path):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path, Setup(CPU), [StopAt(7)], fitted=die)
    stop = StopAt(7)
    train(tmp_path, Setup(CPU), [stop])
    assert stop.batches == 0
    assert state_of(tmp_path)["global_step"] == 7


def test_a_checkpoint_loads_without_unpickling_and_holds_what_resuming_needs(tmp_path):
    train(tmp_path, Setup(CPU))
    state = state_of(tmp_path)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "tenfold"} <= set(state)
    assert state["tenfold"]["settings"]["config"]["epochs"] == 4
    assert {"python", "numpy", "torch", "cuda"} <= set(state["tenfold"]["random_states"])


def test_two_stages_of_one_run_have_their_own_files_and_are_not_repeated(tmp_path):
    opened = {"package": "tenfold", "verb": "train", "settings": CPU}
    run = Run.open(tmp_path, **opened)
    loader = KeyedLoader(Points(), batch_size=6)
    teacher = fit(Quiet(), loader, CPU, run, stage="teacher", quiet=True)
    after = torch.rand(3)
    fit(Quiet(), loader, CPU, run, stage="student", quiet=True)
    assert len(rows(tmp_path / "metrics.teacher.csv")) == len(rows(tmp_path / "metrics.student.csv")) == 24
    run.close()
    stop, resumed = StopAt(-1), Run.open(tmp_path, **opened, resume=True)
    again = fit(Quiet(), loader, CPU, resumed, stage="teacher", callbacks=[stop], quiet=True)
    assert stop.batches == 0
    assert again.callback_metrics == teacher.callback_metrics
    assert torch.equal(torch.rand(3), after), "what follows a finished stage draws other numbers"
    with pytest.raises(ValueError, match="another stage"):
        fit(Quiet(), loader, CPU, run, stage="teacher", quiet=True)


class Pickled(pl.Callback):
    def state_dict(self):
        return {"path": Path("x")}


def test_a_state_that_only_unpickling_could_read_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"state_dict holds pathlib\.[\w.]*Path"):
        train(tmp_path, Setup(CPU), [Pickled()])
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Setup(CPU), [training_run.InterruptAt(5)])
    path = tmp_path / "checkpoints/last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read as a checkpoint"):
        train(tmp_path, Setup(CPU))


# Metrics


def test_metrics_have_a_row_for_each_logged_step_with_its_learning_rate(tmp_path):
    """24 batches, two a step; the rate is Adam's 0.02 on half a cosine, and Plateau never steps before a validation."""
    config = replace(CPU, epochs=2, accumulate=2, log_every=2)
    fit(Quiet(), KeyedLoader(Points(), batch_size=6), config, Run.open(tmp_path, **OPENED, settings=config), quiet=True)
    found = rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in found] == ["2", "4", "6"]
    assert [row["epoch"] for row in found] == ["0", "1", "1"]
    expected = [0.01 * (1 + math.cos(math.pi * (step - 1) / 6)) for step in (2, 4, 6)]
    assert [float(row["lr"]) for row in found] == pytest.approx(expected)


OPENED = {"package": "tenfold", "verb": "train"}


class Quiet(Net):
    """``Net`` without validation and its scheduler."""

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        return optimizers, schedulers[:1]


class LogsMean(Quiet):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mean", loss, on_epoch=True)
        return loss


def test_a_mean_that_resuming_could_not_repeat_is_refused():
    with pytest.raises(ValueError, match="training_step logs 'mean' with on_epoch=True"):
        fit(LogsMean(), KeyedLoader(Points(), batch_size=6), CPU, quiet=True)


# Faults of the numbers


class NaNLoss(Quiet):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        scale = float("nan") if self.global_step == 2 else 1.0
        self.log("kd", loss.detach() * scale)
        return loss * scale


class BadGradient(Quiet):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 3:  # sqrt has an infinite slope at 0, and 0 * inf is NaN
            loss = loss + (0 * self.layers[4].bias).sum().sqrt()
        return loss


def test_nan_in_the_loss_is_caught_at_its_step_with_the_metric(tmp_path):
    with pytest.raises(NonFiniteError, match=r"^step 3: the loss is nan; .*: kd; all weights are finite$"):
        fit(NaNLoss(), KeyedLoader(Points(), batch_size=6), CPU, quiet=True)


def test_nan_in_a_weight_is_named():
    module = Quiet()
    with torch.no_grad():
        module.layers[4].weight[0, 0] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"^step 1: the loss is .*first weight that is not finite: layers\.4\.weight"
    ):
        fit(module, KeyedLoader(Points(), batch_size=6), CPU, quiet=True)


def test_nan_in_a_gradient_is_caught_before_it_reaches_the_weights():
    module = BadGradient()
    with pytest.raises(NonFiniteError, match=r"^step 4: .*gradient is not; first such layer: layers\.4\.bias"):
        fit(module, KeyedLoader(Points(), batch_size=6), CPU, quiet=True)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


# Data order


def contents(loader):
    return [[part.tolist() for part in batch] for batch in loader]


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_draws_every_item_at_most_once_and_fills_whole_batches(size, batch_size, seed, epoch):
    if batch_size > size:
        with pytest.raises(UserError, match=f"{size} items do not fill a batch of {batch_size}"):
            KeyedLoader(range(size), batch_size=batch_size, seed=seed)
        return
    loader = KeyedLoader(range(size), batch_size=batch_size, seed=seed)
    loader.seek(epoch)
    batches = [batch.tolist() for batch in loader]
    drawn = Counter(itertools.chain(*batches))
    assert len(batches) == len(loader) == size // batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    assert max(drawn.values()) == 1
    assert set(drawn) <= set(range(size))


def test_more_batches_than_a_pass_hold_every_item_equally_often_and_differently_augmented():
    loader = KeyedLoader(Points(), batch_size=10, batches=12)
    batches = list(loader)
    assert len(batches) == 12
    points = {tuple(x.tolist()) for xs, _ in batches for x in xs}
    assert len(points) == 120
    order = KeyedLoader(range(40), batch_size=10, batches=12)
    assert set(Counter(torch.cat(list(order)).tolist()).values()) == {3}


def test_order_and_augmentation_do_not_depend_on_workers_or_on_the_global_state():
    alone, helped = KeyedLoader(Points(), batch_size=6), KeyedLoader(Points(), batch_size=6, num_workers=2)
    for epoch in (0, 3):
        alone.seek(epoch)
        helped.seek(epoch)
        torch.manual_seed(epoch)
        first = contents(alone)
        torch.manual_seed(epoch + 10)
        assert contents(helped) == first


def test_seed_and_epoch_change_order_and_augmentation():
    orders, noise = set(), set()
    for seed in range(3):
        for epoch in range(3):
            loader = KeyedLoader(range(40), batch_size=40, seed=seed)
            loader.seek(epoch)
            orders.add(tuple(next(iter(loader)).tolist()))
            loader = KeyedLoader(Points(), batch_size=1, seed=seed, order=lambda generator: [[7]])
            loader.seek(epoch)
            noise.add(tuple(next(iter(loader))[0][0].tolist()))
    assert len(orders) == len(noise) == 9


def test_an_epoch_can_be_begun_in_its_middle():
    loader = KeyedLoader(Points(), batch_size=6)
    loader.seek(2)
    whole = contents(loader)
    loader.seek(2, 4)
    assert contents(loader) == whole[4:]


def test_an_own_order_decides_the_batches():
    loader = KeyedLoader(
        range(9), order=lambda generator: [[0, 8], [3], [int(torch.randint(9, (), generator=generator))]]
    )
    assert [batch.tolist() for batch in loader][:2] == [[0, 8], [3]]
    assert len(loader) == 3


class Pairs(Quiet):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"source", "target"}
        return super().training_step(batch["source"], batch_idx) + super().training_step(batch["target"], batch_idx)


def test_loaders_by_name_come_together_and_must_be_equally_long():
    source, target = KeyedLoader(Points(), batch_size=6), KeyedLoader(Points(), batch_size=3, batches=6, seed=1)
    assert fit(Pairs(), {"source": source, "target": target}, CPU, quiet=True).global_step == 24
    with pytest.raises(ValueError, match=r"loaders of \[6, 13\] batches"):
        fit(Pairs(), {"source": source, "target": KeyedLoader(Points(), batch_size=3)}, CPU, quiet=True)


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 4))
def test_batches_of_one_step_have_one_size_on_all_devices_and_no_row_comes_twice(rows, size, devices):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    batches = cut(order, size, devices)
    assert len(batches) % devices == 0
    for start in range(0, len(batches), devices):
        assert len({len(batch) for batch in batches[start : start + devices]}) == 1
    found = [row for batch in batches for row in batch]
    assert found == order[: len(found)].tolist()
    assert rows - len(found) < 2 * devices  # at most one row per device, and those that cannot be shared out


@pytest.mark.parametrize(
    ("epochs", "steps", "accumulate"), [(3, None, 1), (3, None, 4), (2, 5, 1), (4, 5, 2), (None, 7, 1)]
)
def test_the_length_of_a_schedule_is_what_lightning_will_do(epochs, steps, accumulate):
    config = replace(CPU, epochs=epochs, steps=steps, accumulate=accumulate)
    loader = KeyedLoader(Points(), batch_size=6)
    assert fit(Quiet(), loader, config, quiet=True).global_step == config.total_steps(loader.batches)
    assert replace(config, devices=2).total_steps(loader.batches) <= config.total_steps(loader.batches)


def test_data_that_do_not_fill_a_batch_on_each_device_are_refused():
    with pytest.raises(UserError, match="the data fill 1 of 2 batches, one per device: lower the batch size"):
        fit(Quiet(), KeyedLoader(Points(), batch_size=40), replace(CPU, devices=2), quiet=True)


# Settings


@dataclass(frozen=True, kw_only=True)
class Own(TrainerConfig):
    epochs: int | None = 30
    margin: float = 0.5


def test_a_package_inherits_the_settings_and_gives_its_defaults():
    assert (Own().epochs, Own(steps=5).steps, Own().checkpoint_every) == (30, 5, 500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "neither --epochs nor --steps"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"epochs": 1, "clip_norm": -1.0}, "clip_norm: expected more than 0, got -1.0"),
        ({"epochs": 1, "device": "gpu"}, "device: expected one of auto, cpu, cuda, mps, got 'gpu'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainerConfig(**changes)


def test_device_and_precision_that_are_not_available_are_refused():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in {"cpu", "cuda", "mps"}
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UserError, match=f"--device {missing}: .* expected one of .*cpu"):
        choose_device(missing)
    with pytest.raises(UserError, match="--precision 16 needs a GPU"):
        choose_precision("16", "cpu")
    assert [choose_precision(p, "cpu") for p in ("auto", "32", "bf16")] == ["32-true", "32-true", "bf16-mixed"]
    assert choose_precision("16", "cuda") == "16-mixed"


def test_settings_are_read_without_torch():
    code = "import sys, tenfold.config; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fit_without_a_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    validate = DataLoader([Points()[i] for i in range(4)], batch_size=2)
    trainer = fit(Net(), KeyedLoader(Points(), batch_size=6), CPU, validate=validate, quiet=True)
    assert 0 <= float(trainer.callback_metrics["val_top1"]) <= 1
    assert os.listdir(tmp_path) == []


def test_seeding_leaves_new_tensors_as_they_are_instead_of_filling_each_with_nan():
    seed_everything(0)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
