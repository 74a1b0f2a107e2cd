"""A budget finds the best method, not only the best cut; and what is measured is what the allocator says."""

import json

import pytest
import torch
from localrecon import LocalNet, SGRConfig, StepOptions, local_step
from localrecon.allocation import allocated_peak
from localrecon.arms import run_as
from localrecon.choosing import cheapest, choices
from localrecon.cli import main
from localrecon_test_nets import convs, images, mlp, same, split, vectors, weights

from tenfold.memory import MemoryProbe
from tenfold.testing import assert_user_error


def test_ways_come_by_their_computation_and_exact_ones_first():
    x, _ = images(count=8, size=4)
    found = list(choices(convs(4), x, sgr=SGRConfig(ramp=0)))
    assert [way.method for way in found[:3]] == ["bp", "accum", "accum"]
    assert [way.cost for way in found] == sorted(way.cost for way in found)
    assert {way.method for way in found} == {"bp", "accum", "ckpt", "sgr", "sgr + ckpt"}
    assert found[1].note == "BatchNorm sees the parts"
    lazy = [way.method for way in choices(convs(4), x, sgr=SGRConfig(ramp=0, every=8))]
    assert lazy.index("sgr") < lazy.index("ckpt")


def test_the_first_way_that_fits_is_taken_and_its_step_needs_what_was_predicted():
    x, y = images(count=16, size=16)
    sgr = SGRConfig(ramp=0)
    everything = list(choices(convs(8), x, sgr=sgr))
    for limit in sorted({way.peak for way in everything})[1:4]:
        best, seen = cheapest(iter(everything), limit)
        assert best.cost == min(way.cost for way in everything if way.peak <= limit)
        assert all(way.peak > limit for way in seen[:-1])
        torch.manual_seed(0)
        how = "ckpt" if best.method == "ckpt" else best.method
        net = run_as(how, convs(8), best.plan, checkpointing="ckpt" in best.method).train()
        optimizers = [torch.optim.AdamW(net.parameters_of(k)) for k in range(net.k)]
        options = StepOptions(accumulate=best.count if best.method == "accum" else 1)
        local_step(net, x, y, optimizers, sgr, options)
        with MemoryProbe(net, optimizers, x, y) as probe:
            local_step(net, x, y, optimizers, sgr, options)
        assert probe.peak_bytes == pytest.approx(best.peak, rel=0.05)
    assert cheapest(iter(everything), 1000)[0] is None


def test_checkpoints_within_modules_change_no_number_and_save_memory():
    x, y = images(count=16, size=16)
    ends, peaks = [], []
    for again in (False, True):
        net = split(convs(8), x, 2)
        for stage in net.segments:
            stage.checkpointing = 2 if again else 0
        optimizers = [torch.optim.SGD(net.parameters_of(k), lr=0.1) for k in range(2)]
        with MemoryProbe(net, x, y) as probe:
            local_step(net, x, y, optimizers, SGRConfig(ramp=0))
        ends.append(weights(net))
        peaks.append(probe.peak_bytes)
    assert same(*ends)
    assert peaks[1] < peaks[0]


def test_the_allocator_counts_temporaries_that_live_tensors_do_not_show():
    assert 8000 <= allocated_peak(lambda: torch.zeros(1000) + 1) <= 8100
    x = torch.zeros(1000)

    def hidden():
        (x + 1).sum()  # nothing is left

    assert allocated_peak(hidden) >= 4000
    data, labels = vectors()
    net = split(mlp(), data, 2)
    assert isinstance(net, LocalNet)
    optimizers = [torch.optim.SGD(net.parameters_of(k), lr=0.1) for k in range(2)]
    assert allocated_peak(lambda: local_step(net, data, labels, optimizers, SGRConfig(ramp=0))) > 0


def test_plan_with_a_budget_says_what_to_run_and_that_runs(tmp_path, capsys):
    words = ["--model", "convnet", "--depth", "4", "--width", "4", "--data", "digits", "--batch_size", "256"]
    assert main(["plan", *words, "--k", "1", "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads((tmp_path / "whole/plan.json").read_text())["predicted_peak"]
    capsys.readouterr()
    budget = ["--budget", str(int(0.7 * whole))]
    assert main(["plan", *words, *budget, "--out", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    choice = json.loads((tmp_path / "p/choice.json").read_text())
    assert f"{choice['options']} (predicted peak" in out
    assert choice["peak"] <= 0.7 * whole
    more = ["--epochs", "1", "--device", "cpu", "--quiet", "--out", str(tmp_path / "t")]
    assert main(["train", *words, *choice["options"].split(), *more]) == 0
    both = ["--method", "sgr", "--k", "2", "--checkpointing", "true", "--epochs", "1", "--device", "cpu", "--quiet"]
    assert main(["train", *words, *both, "--out", str(tmp_path / "b")]) == 0
    no = ["--budget", "1KB", "--out", str(tmp_path / "no")]
    assert_user_error(main, ["plan", *words, *no], capsys, "by any method: the least is", "MiB (--method")
    assert not (tmp_path / "no").exists()
