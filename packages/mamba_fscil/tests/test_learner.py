"""The learner, its sessions, class means, metrics and its folder."""

import copy
import dataclasses
import itertools
import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from mamba_fscil import metrics
from mamba_fscil.baselines import NearestClassMean, calibrated
from mamba_fscil.config import METHODS, BaseConfig, ProjectorConfig, SessionConfig
from mamba_fscil.head import dot_regression_loss, simplex_etf
from mamba_fscil.losses import ClassSensitiveLoss
from mamba_fscil.memory import FeatureMemory
from mamba_fscil.projector import DualSSMProjector
from mamba_fscil.session import SessionRows, learn, learning_rate, parameter_groups
from mamba_fscil.training.learner import IncrementalLearner
from mamba_fscil.training.store import append, opened
from mamba_fscil.training.store import copy as copy_learner

from tenfold import UserError
from tenfold.errors import NonFiniteError

TINY = ProjectorConfig(width=12, states=3, rank=2)
SESSION = SessionConfig(steps=6, batch_size=8, lr=0.05)


def clouds(classes, each=6, seed=0, channels=8):
    """Maps around a center per class, with labels."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(20, channels, 2, 2, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor(list(classes)).repeat_interleave(each)
    return centers[labels] + 0.3 * torch.randn(len(labels), channels, 2, 2, generator=g), labels


def taught(method="mamba-fscil", session=SESSION, **more):
    learner = IncrementalLearner(method, session)
    maps, labels = clouds(range(4))
    how = {"projector": TINY, "capacity": 8, "epochs": 3, "batch_size": 8, "device": "cpu"} | more
    return learner.fit_base(maps, labels, ["a", "b", "c", "d"], **how)


@pytest.fixture(scope="module")
def learner_once():
    return taught()


@pytest.fixture
def learner(learner_once):
    return copy.deepcopy(learner_once)


def teach(learner, *names, seed=1, **how):
    for name in names:
        maps, _ = clouds([4 + "efgh".index(name)], each=3, seed=seed)
        learner.learn_session(maps, [name] * 3, **how)
    return learner


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_two_sessions_and_keeps_its_classes(method, tmp_path):
    learner = teach(taught(method), "e", "f")
    assert learner.classes == list("abcdef")
    maps, _ = clouds(range(6), each=2, seed=5)
    probabilities = learner.predict_proba(maps)
    assert probabilities.shape == (12, 6)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(12))
    learner.save(tmp_path / "l")
    again = IncrementalLearner.load(tmp_path / "l")
    assert torch.equal(again.predict_proba(maps), probabilities)
    teach(again, "g").save(tmp_path / "l")
    assert IncrementalLearner.load(tmp_path / "l").classes == list("abcdefg")
    with pytest.raises(UserError, match="nothing was learned since"):
        again.save(tmp_path / "l")


def test_saved_loaded_and_continued_equals_unbroken_bit_for_bit(learner, tmp_path):
    learner.save(tmp_path / "l")
    teach(learner, "e").save(tmp_path / "l")
    loaded = IncrementalLearner.load(tmp_path / "l")
    for one in (learner, loaded):
        teach(one, "f")
    maps, _ = clouds(range(6), seed=7)
    assert torch.equal(learner.predict_proba(maps), loaded.predict_proba(maps))
    assert torch.equal(learner.memory.means(), loaded.memory.means())
    names = sorted(p.name for p in (tmp_path / "l").iterdir() if not p.name.startswith("."))
    assert names == ["base.safetensors", "index.json", "session-01.safetensors"]


def test_an_older_file_gives_the_learner_of_that_time(learner, tmp_path):
    maps, _ = clouds(range(4), seed=3)
    first = learner.predict_proba(maps)
    learner.save(tmp_path / "l")
    teach(learner, "e").save(tmp_path / "l")
    assert IncrementalLearner.load(tmp_path / "l").classes == list("abcde")
    assert torch.equal(IncrementalLearner.load(tmp_path / "l/base.safetensors").predict_proba(maps), first)
    with pytest.raises(UserError, match="no file of this learner"):
        IncrementalLearner.load(tmp_path / "l/session-07.safetensors")


def test_a_session_leaves_the_frozen_side_bit_for_bit_and_moves_the_branch(learner):
    before = {name: x.clone() for name, x in learner.projector.state_dict().items()}
    teach(learner, "e")
    for name, x in learner.projector.state_dict().items():
        if not name.startswith("inc."):
            assert torch.equal(x, before[name]), name
    gate = "inc.block.in_proj.weight"
    assert not torch.equal(learner.projector.state_dict()[gate], before[gate])


def test_repeated_from_the_same_learner_a_session_gives_the_same_bits(learner):
    twin = copy.deepcopy(learner)
    torch.manual_seed(123)
    teach(learner, "e")
    torch.manual_seed(321)
    torch.rand(7)
    teach(twin, "e")
    for name, x in learner.projector.state_dict().items():
        assert torch.equal(x, twin.projector.state_dict()[name])


def rows():
    maps, labels = clouds(range(4), each=1)
    shots, new = clouds([4, 5], each=3)
    return SessionRows.of(shots, new, maps, labels, 4)


def trained(config, **how):
    torch.manual_seed(0)
    projector = DualSSMProjector(8, (2, 2), TINY)
    projector.add_incremental_branch()
    learn(
        projector,
        simplex_etf(12, 8, torch.Generator().manual_seed(0)),
        rows(),
        config,
        base_classes=4,
        session=1,
        **how,
    )
    return projector.state_dict()


def test_with_weights_of_zero_the_losses_change_nothing_bit_for_bit():
    off = SessionConfig(steps=5, batch_size=8, suppression_base=0, suppression_novel=0, separation=0)
    a, b = trained(off), trained(SessionConfig(steps=5, batch_size=8), sensitive=False)
    assert all(torch.equal(a[name], b[name]) for name in a)
    c = trained(SessionConfig(steps=5, batch_size=8))
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_with_and_without_the_cache_a_session_is_the_same_to_rounding():
    kept, again = (trained(SessionConfig(steps=5, batch_size=8, cache=cache)) for cache in (True, False))
    assert all(torch.allclose(kept[name], again[name], atol=1e-5) for name in kept)


@pytest.mark.parametrize("base_lr", [0.0, 0.2])
def test_a_batch_of_few_rows_many_times_is_learned_as_a_literal_step_does_with_each_row_put_through_once(base_lr):
    """A step of 24 of ten rows; the literal one puts all 24 through the projector."""
    torch.manual_seed(0)
    config = SessionConfig(steps=1, batch_size=24, lr=0.5, mix=0.0, clip_norm=None, weight_decay=0.0, base_lr=base_lr)
    W = simplex_etf(12, 8, torch.Generator().manual_seed(0)).double()
    ours = DualSSMProjector(8, (2, 2), TINY)
    ours.add_incremental_branch()
    ours.double()
    with torch.no_grad():
        for parameter in ours.inc.parameters():  # its gate is no longer zero
            parameter += 0.1 * torch.randn_like(parameter)
    given = rows()
    given = dataclasses.replace(given, maps=given.maps.double())
    literal = copy.deepcopy(ours)
    (index,) = given.batches(24, 1, 0, 1)
    out = literal(given.maps[index], detach=base_lr == 0)
    loss = dot_regression_loss(out.mu, W, given.labels[index], balanced=True)
    loss = loss + ClassSensitiveLoss(1.0, 0.0, 0.1)(out.gate, out.params, given.labels[index], 4).total
    loss.backward()
    with torch.no_grad():
        for group in parameter_groups(literal, config):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= learning_rate(1, 1, config.lr * group["scale"]) * parameter.grad
    seen = []
    ours.inc.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    learn(ours, W, given, config, base_classes=4, session=1)
    assert seen[0] == len(given.labels) < 24
    for name, x in literal.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], x, rtol=0, atol=1e-12), name


def test_the_base_side_learns_at_its_own_rate_where_it_is_asked_to():
    moved = trained(SessionConfig(steps=5, batch_size=8, base_lr=0.2))
    frozen = trained(SessionConfig(steps=5, batch_size=8))
    assert not torch.equal(moved["base.pos_embed"], frozen["base.pos_embed"])
    projector = DualSSMProjector(8, (2, 2), TINY)
    projector.add_incremental_branch()
    groups = parameter_groups(projector, SessionConfig(base_lr=0.2))
    assert {(g["scale"], g["weight_decay"]) for g in groups} >= {(1.0, 5e-4), (1.0, 0.0), (0.2, 5e-4), (0.2, 0.0)}
    everything = parameter_groups(projector, SessionConfig(decay_all=True))
    assert {g["weight_decay"] for g in everything} == {5e-4}


def test_the_losses_make_delta_b_and_c_differ_and_the_gate_close_on_base_rows():
    torch.manual_seed(0)
    found = {}
    for sensitive in (True, False):
        projector = DualSSMProjector(8, (2, 2), TINY)
        projector.add_incremental_branch()
        W = simplex_etf(12, 8, torch.Generator().manual_seed(0))
        config = SessionConfig(steps=60, batch_size=8, separation=1.0)
        found[sensitive] = learn(projector, W, rows(), config, base_classes=4, session=1, sensitive=sensitive)
    assert found[True].cosine[-1] < found[False].cosine[-1]
    assert found[True].gate_base[-1] < found[False].gate_base[-1]


@pytest.mark.parametrize(
    ("sizes", "copies", "expected"),
    [
        ((5, 5, 60, 0), (10, 1), 85),
        ((5, 5, 60, 35), (10, 8), 855),
        ((10, 5, 100, 90), (10, 1), 1050),
    ],
)
def test_a_session_has_as_many_rows_as_the_authors_have(sizes, copies, expected):
    """CIFAR-100's first session, miniImageNet's last and CUB-200's last."""
    way, shot, base, earlier = sizes
    maps = torch.zeros(way * shot, 1, 1, 1)
    labels = torch.arange(base + earlier, base + earlier + way).repeat_interleave(shot)
    old = torch.arange(base + earlier)
    found = SessionRows.of(
        maps, labels, torch.zeros(len(old), 1, 1, 1), old, base, copies=copies[0], base_copies=copies[1]
    )
    assert len(found) == expected
    batches = list(found.batches(64, 30, seed=0, session=1))
    assert all(len(index) == 64 for index in batches)
    once = torch.cat(batches)[:expected]
    assert torch.equal(torch.bincount(once, minlength=len(found.repeats)), found.repeats)


def test_the_learning_rate_is_that_of_the_authors_log():
    assert learning_rate(1, 200, 0.05 * 0.2) == pytest.approx(0.0027998, abs=1e-7)
    assert learning_rate(200, 200, 0.25) == pytest.approx(0.25e-3)


def test_means_that_are_updated_in_batches_equal_the_mean_in_any_order():
    maps, labels = clouds(range(3), each=7)
    expected = torch.stack([maps[labels == k].double().mean(dim=0) for k in range(3)])
    for order in (range(21), reversed(range(21))):
        memory = FeatureMemory()
        for i in order:
            memory.update(maps[i : i + 1], labels[i : i + 1])
        assert torch.allclose(memory.means().double(), expected, atol=1e-6)
        assert memory.counts == {0: 7, 1: 7, 2: 7}


def test_nearest_means_equal_scikit_learns_on_unit_vectors_and_calibration_leaves_base_means():
    from sklearn.neighbors import NearestCentroid

    maps, labels = clouds(range(4))
    x = torch.nn.functional.normalize(maps.flatten(1), dim=1)
    means = torch.stack([x[labels == k].mean(0) for k in range(4)])
    theirs = NearestCentroid().fit(torch.nn.functional.normalize(means, dim=1).numpy(), range(4)).predict(x.numpy())
    assert np.array_equal(NearestClassMean(means)(x).argmax(dim=1), theirs)
    moved = calibrated(means, 3)
    assert torch.equal(moved[:3], means[:3])
    cosine = torch.cosine_similarity(means[3:], means[:3])
    weight = torch.softmax(16 * cosine, dim=0)
    assert torch.allclose(moved[3], 0.5 * means[3] + 0.5 * (weight[:, None] * means[:3]).sum(0))
    assert torch.equal(calibrated(means, 3, share=1.0), means)


@pytest.mark.parametrize(
    ("accuracies", "average", "drop"),
    [
        ([82.80, 77.85, 73.69, 69.67, 66.89, 63.66, 61.48, 59.74, 57.51], 68.14, 25.29),
        ([84.93, 80.02, 74.61, 71.33, 69.15, 65.62, 62.38, 60.93, 59.36], 69.81, 25.57),
        ([80.90, 76.26, 72.97, 70.14, 67.83, 65.74, 65.43, 64.12, 62.31, 62.12, 61.65], 68.13, 19.25),
    ],
)
def test_average_and_drop_are_those_of_the_papers_tables(accuracies, average, drop):
    assert metrics.average(accuracies) == pytest.approx(average, abs=0.006)
    assert metrics.performance_drop(accuracies) == pytest.approx(drop, abs=0.006)


def test_a_perfect_classifier_scores_100_and_an_undecided_one_chance():
    labels = torch.arange(10)
    best = metrics.score(torch.eye(10), labels, 6)
    assert (best.all, best.base, best.novel, best.harmonic, best.calibration) == (100, 100, 100, 100, 0)
    flat = metrics.score(torch.full((10, 10), 0.1), labels, 6)
    assert flat.all == 10
    assert flat.calibration == pytest.approx(0, abs=1e-5)
    wrong = metrics.score(torch.eye(10)[[1] * 10], labels, 6)
    assert wrong.harmonic == 0
    assert wrong.calibration == pytest.approx(90)
    assert np.isnan(metrics.score(torch.eye(10)[:6], labels[:6], 6).novel)


def test_what_cannot_be_learned_is_refused_in_one_line_and_changes_nothing(learner):
    before = {name: x.clone() for name, x in learner.projector.state_dict().items()}
    maps, _ = clouds([5], each=3)
    hole = maps.clone()
    hole[1, 0, 0, 0] = float("nan")
    cases = [
        ((maps, ["a"] * 3), "'a' is there already"),
        ((maps, ["x"] * 2), "3 pictures, but 2 names"),
        ((maps[:0], []), "at least one picture"),
        ((hole, ["x"] * 3), "row 1 holds NaN"),
        ((maps[:, :5], ["x"] * 3), r"maps are \(5, 2, 2\) each"),
        ((maps[:, :, :1], ["x"] * 3), r"maps are \(8, 1, 2\) each"),
        ((torch.zeros(3, 3, 8, 8, dtype=torch.uint8), ["x"] * 3), "made from maps"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            learner.learn_session(*arguments)
    with pytest.raises(UserError, match="base class"):
        learner.learn_session(maps, ["a"] * 3, update=True)
    with pytest.raises(UserError, match="more than the capacity of 8"):
        learner.learn_session(torch.cat([maps, maps]), list("uvwxyz"))
    with pytest.raises(NonFiniteError, match="session 1, step"):
        learner.session = SessionConfig(steps=20, batch_size=8, lr=1e30, clip_norm=None)
        learner.learn_session(maps, ["x"] * 3)
    assert learner.classes == list("abcd")
    assert all(torch.equal(x, before[name]) for name, x in learner.projector.state_dict().items())


def test_a_class_is_refitted_from_new_pictures_where_it_is_asked_for(learner):
    teach(learner, "e")
    maps, _ = clouds([9], each=4)
    learner.learn_session(maps, ["e"] * 4, update=True)
    assert learner.classes == list("abcde")
    assert learner.memory.counts[4] == 4
    assert torch.allclose(learner.memory.means([4])[0], maps.mean(0), atol=1e-6)


def test_before_the_base_session_nothing_can_be_learned_or_asked():
    with pytest.raises(RuntimeError, match="no base session"):
        IncrementalLearner().learn_session(torch.zeros(1, 2, 2, 2), ["x"])


def test_more_classes_than_dimensions_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="--capacity 40 is more than the width 12"):
        taught(capacity=40)
    with pytest.raises(UserError, match="--capacity 3: the data have 4 classes"):
        taught(capacity=3)


def test_a_kill_at_any_rename_leaves_the_previous_learner_and_the_repeated_session_gives_the_same_file(
    learner, tmp_path
):
    maps, _ = clouds([4], each=3)
    torch.save(maps, tmp_path / "maps.pt")
    folders = [tmp_path / f"l{calls}" for calls in (1, 2, 3)]  # the file, by a first and by its own name; the index
    learner.save(folders[0])
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    script = """
import os, signal, sys
from pathlib import Path
import torch
from mamba_fscil.training.learner import IncrementalLearner

for number, folder in enumerate(sys.argv[2:], 1):  # one start of Python for all of them
    child = os.fork()
    if child == 0:
        learner = IncrementalLearner.load(folder)
        learner.learn_session(torch.load(sys.argv[1]), ["e"] * 3)
        count, rename = 0, Path.replace
        def replace(self, target):
            global count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(self, target)
        Path.replace = replace
        learner.save(folder)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, number
"""
    words = [sys.executable, "-c", script, str(tmp_path / "maps.pt"), *map(str, folders)]
    assert subprocess.run(words).returncode == 0
    for folder in folders:
        assert IncrementalLearner.load(folder).classes == list("abcd")
    left = (folders[2] / "session-01.safetensors").read_bytes()
    for folder in folders:
        again = IncrementalLearner.load(folder)
        again.learn_session(maps, ["e"] * 3)
        again.save(folder)
        assert (folder / "session-01.safetensors").read_bytes() == left
        assert IncrementalLearner.load(folder).classes == list("abcde")


def test_base_classes_of_ten_and_of_two_pictures_are_both_known_afterwards():
    """Each class weighs the same in its mean, and with ``balanced`` in the loss, too."""
    parts = [clouds([k], each=each, seed=k) for k, each in enumerate((10, 2, 9, 3))]
    maps, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    tests, expected = clouds(range(4), each=3, seed=9)
    for method in ("ncm", "mamba-fscil"):
        learner = IncrementalLearner(method, SESSION)
        how = {"projector": TINY, "capacity": 8, "epochs": 15, "batch_size": 8, "device": "cpu"}
        learner.fit_base(maps, labels, list("abcd"), base=BaseConfig(balanced=True, lr=0.05), **how)
        assert learner.memory.counts == {0: 10, 1: 2, 2: 9, 3: 3}
        assert torch.allclose(learner.memory.means([1])[0], parts[1][0].mean(0), atol=1e-6)
        assert learner.predict(tests) == ["abcd"[k] for k in expected.tolist()]


def test_a_learners_files_hold_plain_json_and_tensors_that_any_python_reads(learner, tmp_path):
    learner.save(tmp_path / "l")
    teach(learner, "e").save(tmp_path / "l")
    names = {p.name for p in (tmp_path / "l").iterdir() if not p.name.startswith(".")}
    assert names == {"base.safetensors", "session-01.safetensors", "index.json"}
    json.loads((tmp_path / "l/index.json").read_text("utf-8"))
    for name in names - {"index.json"}:
        raw = (tmp_path / "l" / name).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        about = header.pop("__metadata__")
        assert all(isinstance(value, str) for value in about.values())
        assert {part["dtype"] for part in header.values()} <= {"F32", "F64", "I64"}
        assert max(part["data_offsets"][1] for part in header.values()) == len(raw) - 8 - length


def test_a_second_writer_and_a_changed_folder_are_refused(learner, tmp_path):
    learner.save(tmp_path / "l")
    twin = copy.deepcopy(learner)
    teach(learner, "e")
    with opened(tmp_path / "l", writing=True), pytest.raises(UserError, match="another command is adding to it"):
        learner.save(tmp_path / "l")
    learner.save(tmp_path / "l")
    teach(twin, "f")
    with pytest.raises(UserError, match="another command has changed it"):
        twin.save(tmp_path / "l")


def test_a_copy_goes_on_where_a_killed_one_has_left_off_and_leaves_the_old_learner(learner, tmp_path):
    learner.save(tmp_path / "old")
    teach(learner, "e").save(tmp_path / "old")
    copy_learner(tmp_path / "old", tmp_path / "new", 1)
    copy_learner(tmp_path / "old", tmp_path / "new", 2)
    teach(learner, "f")
    with opened(tmp_path / "new", writing=True) as growing:
        append(growing, learner)
    assert IncrementalLearner.load(tmp_path / "new").classes == list("abcdef")
    assert IncrementalLearner.load(tmp_path / "old").classes == list("abcde")
    with pytest.raises(UserError, match="another learner is there"):
        copy_learner(tmp_path / "old", tmp_path / "new", 2)


def test_files_of_another_learner_or_of_a_newer_version_are_refused(learner, tmp_path):
    from tenfold import checkpoints

    learner.save(tmp_path / "l")
    path = tmp_path / "l/base.safetensors"
    kept = checkpoints.load(path, method="mamba_fscil.base")
    checkpoints.save(path, kept.tensors, method="mamba_fscil.base", config={**kept.config, "format": 2})
    with pytest.raises(UserError, match="newer than this one"):
        IncrementalLearner.load(tmp_path / "l")
    checkpoints.save(path, kept.tensors, method="mamba_fscil.base", config={**kept.config, "channels": 9})
    with pytest.raises(UserError, match="has shape"):
        IncrementalLearner.load(tmp_path / "l")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        IncrementalLearner.load(tmp_path / "l")
    with pytest.raises(UserError, match="no such file or folder"):
        IncrementalLearner.load(tmp_path / "none")


def test_the_backbone_of_another_learner_is_refused_by_its_digest(tmp_path):
    learners = []
    for seed, name in itertools.product((0, 1), ("l",)):
        learner = IncrementalLearner("ncm", SESSION, seed)
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        learner.fit_base(
            images, torch.arange(8) % 2, ["a", "b"], backbone="fscil:conv", capacity=4, epochs=1, device="cpu"
        )
        learner.save(tmp_path / f"{name}{seed}")
        learner.learn_session(images[:2], ["c", "c"])
        learner.save(tmp_path / f"{name}{seed}")
        learners.append(learner)
    again = IncrementalLearner.load(tmp_path / "l0")
    assert again.predict(images) == learners[0].predict(images)
    (tmp_path / "l0/session-01.safetensors").write_bytes((tmp_path / "l1/session-01.safetensors").read_bytes())
    with pytest.raises(UserError, match="learned on another backbone"):
        IncrementalLearner.load(tmp_path / "l0")
    index = json.loads((tmp_path / "l1/index.json").read_text())
    assert index["files"][1]["about"]["new"] == ["c"]
