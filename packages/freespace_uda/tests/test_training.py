"""The loop: every method trains, weight 0 is source-only to the bit, no label of the target is read, the choice has a guard."""

import dataclasses
import os
import signal
import subprocess
import sys
import typing

import pytest
import torch
from freespace_uda import FreespaceNet, Signals
from freespace_uda.cli import main
from freespace_uda.config import Alignment, Augment, General, Method, Optimizer, RunSettings, SceneReading, of_arm
from freespace_uda.data import load_scenes
from freespace_uda.items import SceneItems, colored, faulty_depth, to_network
from freespace_uda.models import adapt_statistics, build_net
from freespace_uda.scenes import Unlabeled
from freespace_uda.selection import ailing, better, mean_signals, signals
from freespace_uda.training import AdaptTask, road_share, train
from safetensors.torch import load_file

from tenfold import UserError
from tenfold.loading import KeyedLoader

READING = SceneReading(scenes=4, size=(64, 32), world_seed=3)


def settings(**more):
    base = RunSettings(
        data="roads-flat",
        steps=4,
        batch_size=2,
        rgb_encoder="freespace:tiny",
        width=8,
        size=(64, 32),
        reading=READING,
        target_reading=READING,
        watched=2,
        log_every=1,
        device="cpu",
        align=Alignment(weight=0.1, min_pixels=1, hidden=8, start=0.0, ramp=0.0, tau=0.3),
        general=General(width=2, minent=0.1, advent=0.1, adaptsegnet=0.1, fada=0.1),
        optimizer=Optimizer(kind="adam", lr=1e-3, head=1.0, ema=0.5),
    )
    return dataclasses.replace(base, **more)


@pytest.fixture(scope="module")
def worlds():
    return load_scenes("roads-flat", READING), load_scenes("roads-real", READING)


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("method", typing.get_args(Method))
def test_every_method_trains_without_a_label_of_the_target(worlds, method):
    source, target = worlds
    given = target if method == "oracle" else Unlabeled(target)
    trained = train(source, given, settings(), method, 0, quiet=True)
    fresh = build_net(settings(), method, 0)
    assert any(not torch.equal(a, b) for a, b in zip(trained.net.parameters(), fresh.parameters(), strict=True))
    assert 1 <= trained.step <= 4
    assert 0 <= trained.signals.entropy <= 1


@pytest.mark.parametrize("method", ["minent", "advent", "adaptsegnet", "fada", "self-training", "ccg-sfa"])
def test_a_method_trains_in_mixed_precision_close_to_32_bits(worlds, method):
    source, target = worlds
    plain, mixed = (
        train(source, Unlabeled(target), settings(steps=2, precision=p), method, 0, quiet=True).net.state_dict()
        for p in ("32", "bf16")
    )
    for name, value in plain.items():
        assert torch.allclose(mixed[name], value, atol=5e-3), name


@pytest.mark.parametrize(("method", "plain"), [("minent", "source-only"), ("fada", "source-only"), ("ccg-sfa", "ccg")])
def test_a_weight_of_0_gives_training_on_the_source_alone_bit_for_bit(worlds, method, plain):
    source, target = worlds
    nothing = settings(align=Alignment(weight=0.0), general=General(minent=0.0, fada=0.0))
    ours, theirs = (train(source, Unlabeled(target), nothing, m, 0, quiet=True) for m in (method, plain))
    assert all(torch.equal(v, theirs.net.state_dict()[k]) for k, v in ours.net.state_dict().items())


def test_two_runs_with_one_seed_are_equal_and_with_two_seeds_are_not(worlds):
    source, target = worlds
    runs = [train(source, Unlabeled(target), settings(), "ccg-sfa", seed, quiet=True) for seed in (0, 0, 1)]
    assert all(torch.equal(v, runs[1].net.state_dict()[k]) for k, v in runs[0].net.state_dict().items())
    assert any(not torch.equal(v, runs[2].net.state_dict()[k]) for k, v in runs[0].net.state_dict().items())


def test_one_step_moves_encoders_by_both_domains_and_discriminators_by_their_own_loss(worlds):
    source, target = worlds
    s = settings()
    net = build_net(s, "ccg-sfa", 0)
    task = AdaptTask(net, s, "ccg-sfa", 4, 0.25, [])
    parts = {}
    for name, scenes, labels in (("source", source, True), ("target", target, False)):
        items = SceneItems(scenes, s, Augment(flip=0), labels=labels, faults=False)
        parts[name] = next(iter(KeyedLoader(items, batch_size=2, seed=0)))
    rgb, normals, valid = (torch.cat([parts["source"][k], parts["target"][k]]) for k in ("rgb", "normals", "valid"))
    out = task.net(rgb, normals, valid)
    total, health = task._from_target(out, 2, parts["source"]["labels"], parts, 0.1, 0, True)
    total.backward()
    assert all(p.grad is not None for p in task.discriminators.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in net.encoders.parameters())
    assert net.laterals[0].weight.grad is None or not net.laterals[0].weight.grad.any(), (
        "the decoder learns from labels alone"
    )
    assert {"mask rgb", "mask normal", "accuracy rgb", "agreement", "precision on source rgb", "gradient ratio"} <= set(
        health
    )
    assert 0 <= float(health["precision on source rgb"]) <= 1


SCRIPT = """
import os, sys
from freespace_uda import training
from freespace_uda.cli import main
seen = [0]
step = training.AdaptTask.training_step
def until(self, batch, number):
    seen[0] += 1
    if seen[0] > {after}:
        os.kill(os.getpid(), 9)
    return step(self, batch, number)
training.AdaptTask.training_step = until
sys.exit(main({words}))
"""
WORDS = [
    "train", "--data", "roads-flat", "--method", "ccg-sfa-ema", "--steps", "6", "--batch_size", "2", "--checkpoint_every", "2",
    "--rgb_encoder", "freespace:tiny", "--width", "8", "--size", "64,32", "--reading.size", "64,32", "--reading.scenes", "4",
    "--target_reading.size", "64,32", "--target_reading.scenes", "4", "--watched", "2", "--validate_every", "2",
    "--align.start", "0", "--align.ramp", "0", "--align.min_pixels", "1", "--align.tau", "0.3", "--align.weight", "0.1",
    "--log_every", "1", "--device", "cpu", "--quiet",
]  # fmt: skip


def test_a_run_killed_before_or_after_its_first_checkpoint_ends_with_the_same_weights_and_metrics(tmp_path):
    assert main([*WORDS, "--out", str(tmp_path / "whole")]) == 0
    for after in (1, 3):
        words = [*WORDS, "--out", str(tmp_path / f"killed{after}")]
        script = SCRIPT.format(after=after, words=words)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert main([*words, "--resume"]) == 0
        a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", f"killed{after}"))
        assert all(torch.equal(v, b[k]) for k, v in a.items())
        rows = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", f"killed{after}")]
        assert rows[0] == rows[1]


def test_a_model_that_says_background_everywhere_is_not_chosen():
    nothing = signals(torch.full((1, 1, 4, 4), -30.0), torch.full((1, 1, 4, 4), -30.0), torch.full((1, 1, 4, 4), -30.0))
    assert nothing.agreement == 1
    assert nothing.entropy == pytest.approx(0, abs=1e-6)
    assert not nothing.plausible(0.25)
    honest = Signals(0.8, 0.4, 0.3)
    assert not better(nothing, honest, 0.25, "agreement")
    assert better(honest, nothing, 0.25, "agreement")
    assert better(Signals(0.9, 0.4, 0.3), honest, 0.25, "agreement")
    assert not better(Signals(0.7, 0.4, 0.3), honest, 0.25, "agreement")
    assert better(Signals(0.1, 0.9, 0.3), honest, 0.25, "last")
    assert better(Signals(0.1, 0.3, 0.3), honest, 0.25, "entropy")


HEALTHY = {"adversarial": 1.5, "mask rgb": 0.26, "mask normal": 0.34, "accuracy rgb": 0.5, "accuracy normal": 0.55,
           "precision on source rgb": 0.96, "precision on source normal": 0.97, "gradient ratio": 0.18}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"mask rgb": 0.0}, "mask of the rgb stream has 0 % of the target's pixels"),
        ({"precision on source normal": 0.4}, "normal stream would select on the source, 40 % is road"),
        ({"accuracy rgb": 0.99}, "discriminator of RGB tells 99 %"),
        ({"discriminator accuracy": 1.0}, "the discriminator tells 100 %"),
        ({"gradient ratio": 7.0}, "7.0 times the supervised one"),
    ],
)
def test_the_health_line_speaks_of_a_planted_fault_at_the_end_and_of_nothing_else(fault, told):
    well = [(step, HEALTHY) for step in range(20)]
    assert ailing([]) == ailing([(0, {"loss": 1.0})]) == ailing(well) == []
    (said,) = ailing([*well[:16], *((step, HEALTHY | fault) for step in range(16, 20))])
    assert told in said
    assert ailing([*((step, HEALTHY | fault) for step in range(4)), *well]) == [], "what has passed is no fault"


def test_signals_of_batches_are_those_of_all_their_pictures():
    torch.manual_seed(0)
    maps = [torch.randn(5, 1, 4, 4) for _ in range(3)]
    whole = signals(*maps)
    parts = mean_signals([signals(*(m[:2] for m in maps)), signals(*(m[2:] for m in maps))], [2, 3])
    assert tuple(parts) == pytest.approx(tuple(whole))


def test_adabn_takes_the_statistics_of_the_target():
    torch.manual_seed(0)
    net = FreespaceNet("freespace:tiny", width=8, norm="batch")
    pictures = (torch.rand(4, 3, 32, 32), torch.zeros(4, 3, 32, 32), torch.zeros(4, 1, 32, 32))
    adapt_statistics(net, [pictures])
    first = net.encoders["rgb"].body.stem
    with torch.no_grad():
        raw = first[0]((pictures[0] - 0.5) / 0.25)
    assert torch.allclose(first[1].running_mean, raw.mean((0, 2, 3)), atol=1e-5)


def test_arms_are_methods_with_their_settings():
    assert of_arm(settings(), "rgb")[1].streams == "rgb"
    assert of_arm(settings(), "ccg-sfa-all")[1].align.mask_mode == "all"
    assert of_arm(settings(), "oracle")[0] == "oracle"


def test_a_source_without_road_and_too_few_scenes_are_refused(worlds):
    class NoRoad:
        source = "mine"

        def __len__(self):
            return 2

        def label(self, index):
            return torch.zeros(4, 4).byte().numpy()

    with pytest.raises(UserError, match="no label has a pixel of road"):
        road_share(NoRoad())

    class OnlyRoad(NoRoad):
        def label(self, index):
            return torch.tensor([[1, 255]]).byte().numpy()

    with pytest.raises(UserError, match="every labeled pixel is road"):
        road_share(OnlyRoad())
    with pytest.raises(UserError, match="lower --batch_size"):
        train(*worlds, settings(batch_size=9), "source-only", 0, quiet=True)


def test_augmentation_is_keyed_and_keeps_normals_true_when_a_picture_is_mirrored(worlds):
    source, _ = worlds
    plain = Augment(color=0, hue=0, gray=0, gamma=1, blur=0, flip=0, no_depth=0, no_rgb=0)
    items = SceneItems(source, settings(), plain, labels=True, faults=False)
    mirrored = SceneItems(source, settings(), dataclasses.replace(plain, flip=1), labels=True, faults=False)
    a, b = items[0], mirrored[0]
    assert torch.equal(a["labels"].flip(-1), b["labels"])
    assert torch.equal(-a["normals"][0].flip(-1), b["normals"][0])
    assert torch.equal(a["normals"][1:].flip(-1), b["normals"][1:])
    assert torch.allclose(a["rgb"], to_network(source.item(0), settings())[0], atol=1e-6)


def test_faults_of_depth_are_noise_dropouts_and_holes_and_nothing_appears_where_nothing_was():
    torch.manual_seed(0)
    depth = torch.full((40, 60), 20.0)
    depth[:5] = 0
    found = faulty_depth(depth, Augment(holes=5, dropout=0.1))
    assert not found[:5].any()
    assert (found[5:] == 0).float().mean() > 0.01
    there = found[5:][found[5:] > 0]
    assert 0 < float((there - 20).abs().mean()) < 2


def test_a_gray_picture_has_equal_channels():
    torch.manual_seed(0)
    found = colored(torch.rand(3, 8, 8), Augment(gray=1.0))
    assert torch.allclose(found[0], found[1], atol=0.01)
    assert torch.allclose(found[0], found[2], atol=0.01)
