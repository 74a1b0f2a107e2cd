"""The runner: the same views for any number of workers, nothing made twice, nothing lost when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from genview.cli import main
from genview.plans import Plan, PlanRow, in_units, seed_of
from genview.runner import progress, run_shard, shard_of
from genview.store import Stored, ViewStore, file_of

from tenfold import UserError
from tenfold.readers import read_image
from tenfold.testing import assert_user_error

HEAD = {"plan": "p", "generator": "g", "format": "png", "quality": 92, "store": None}


def rows(n=10, level=lambda i: 100 * (i % 3)):
    made = [PlanRow(i, i, f"a/{i}.png", 0, 0.5, level(i), 2.0, "", seed_of(0, f"a/{i}.png", 0), -1) for i in range(n)]
    return in_units(made, 3)


class Fake:
    """A generator whose pictures tell their seed; it counts how often each was made."""

    id, needs = "fake", "embedding"

    def __init__(self):
        self.made = []

    def embed(self, images):
        return images.mean(dim=(2, 3))

    def generate(self, conditions, level, seeds, *, guidance, prompts=None):
        assert len({level}) == 1
        self.made += list(seeds)
        out = np.zeros((len(seeds), 8, 8, 3), np.uint8)
        out[:] = np.asarray([seed % 251 for seed in seeds], np.uint8)[:, None, None, None]
        return out


def work(folder, plan, shard=(0, 1), generator=None, size=2):
    generator = generator or Fake()
    part = f"shard-{shard[0]}-of-{shard[1]}"
    with ViewStore.open(folder, head=HEAD, part=part) as store:
        run_shard(plan, store, generator, lambda r: (torch.zeros(len(r), 3), {}), shard=shard, batch_size=size)
    return generator


@pytest.fixture
def plan(tmp_path):
    return Plan(tmp_path, tuple(rows()), "p", None)


def test_a_seed_depends_on_root_key_and_variation_alone():
    seeds = {seed_of(*key) for key in ((0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0))}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "ü b.png", 3) == seed_of(0, "ü b.png", 3)


def test_units_hold_rows_of_one_level_and_every_row_once(plan):
    units = plan.units()
    assert all(len({row.level for row in unit}) == 1 and len(unit) <= 3 for unit in units)
    assert sorted(row.number for unit in units for row in unit) == list(range(10))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_any_number_of_shards_makes_the_same_views_once(tmp_path, plan, shards):
    made = [work(tmp_path / "v", plan, (i, shards)) for i in range(shards)]
    assert sorted(seed for one in made for seed in one.made) == sorted(row.seed for row in plan.rows)
    store = ViewStore.open(tmp_path / "v")
    assert store.done() == {row.name for row in plan.rows}
    for row in plan.rows:
        assert read_image(tmp_path / "v" / file_of(row.key, 0, "png"))[0, 0, 0] == row.seed % 251


def test_what_is_there_is_never_made_again_and_what_is_missing_is(tmp_path, plan):
    work(tmp_path / "v", plan)
    assert work(tmp_path / "v", plan).made == []
    (tmp_path / "v" / file_of("a/4.png", 0, "png")).unlink()
    (tmp_path / "v" / file_of("a/5.png", 0, "png")).write_bytes(b"cut")
    assert sorted(work(tmp_path / "v", plan).made) == sorted(plan.rows[i].seed for i in (4, 5))


def test_a_row_that_was_cut_short_does_not_count_and_is_cut_off(tmp_path, plan):
    work(tmp_path / "v", plan)
    file = next((tmp_path / "v/rows").glob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-20])
    store = ViewStore.open(tmp_path / "v")
    assert len(store.done()) == 9
    assert len(work(tmp_path / "v", plan).made) == 1
    assert len(store.done()) == 10
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_folder_of_another_plan_generator_or_number_of_steps_is_refused(tmp_path, plan):
    work(tmp_path / "v", plan)
    for name in ("plan", "generator", "store"):
        with pytest.raises(UserError, match=f"{name}: .* there, 'other' here"):
            ViewStore.open(tmp_path / "v", head={**HEAD, name: "other"}, part="x")
    (tmp_path / "w").mkdir()
    (tmp_path / "w/mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds no views of ours"):
        ViewStore.open(tmp_path / "w", head=HEAD, part="x")


def test_two_workers_of_one_shard_are_told_apart(tmp_path):
    with ViewStore.open(tmp_path / "v", head=HEAD, part="a"), pytest.raises(UserError, match="at this moment"):
        ViewStore.open(tmp_path / "v", head=HEAD, part="a")
    ViewStore.open(tmp_path / "v", head=HEAD, part="a").close()


def test_a_picture_that_cannot_be_read_becomes_a_row_and_no_crash(tmp_path, plan):
    with ViewStore.open(tmp_path / "v", head=HEAD, part="a") as store:
        made, failed = run_shard(plan, store, Fake(), lambda r: (torch.zeros(len(r) - 1, 3), {0: "x.png: broken"}))
    assert failed == len(plan.units())
    assert made + failed == 10
    found = progress(plan, ViewStore.open(tmp_path / "v").rows())
    assert (found.done, found.errors) == (made, failed)


def test_a_full_disk_ends_the_worker_in_one_line_and_keeps_what_is_there(tmp_path, plan, monkeypatch):
    from genview import store as module

    real, count = module.replacing, []

    def full(path):
        count.append(path)
        if len(count) == 5:
            raise UserError(f"cannot write {path}: No space left on device")
        return real(path)

    monkeypatch.setattr(module, "replacing", full)
    with pytest.raises(UserError, match="No space left"):
        work(tmp_path / "v", plan)
    monkeypatch.undo()
    assert len(ViewStore.open(tmp_path / "v").done()) == 4
    assert len(work(tmp_path / "v", plan).made) == 6


@pytest.mark.parametrize("key", ["../x.png", "/etc/x.png", "a/../../x.png", ""])
def test_a_key_that_leads_outside_is_refused(key):
    with pytest.raises(UserError, match="outside"):
        file_of(key, 0, "png")


def test_files_of_one_base_name_and_long_names_do_not_collide():
    names = {file_of(key, 0, "png") for key in ("a/x.jpg", "b/x.jpg", "a/x.png", "a/x.jpg.0")}
    assert len(names) == 4
    long = [file_of("я" * 120 + tail, 0, "png") for tail in ("a.png", "b.png")]
    assert long[0] != long[1]
    assert all(len(os.fsencode(name.split("/")[-1])) <= 255 for name in long)


def test_the_rate_is_that_of_all_workers_over_the_last_minutes(plan):
    made = {}
    for i, row in enumerate(plan.rows[:8]):
        made[row.name] = Stored(row.key, 0, "p", 1, 1, "ok", "", f"w{i % 2}", 1.0, 1000.0 + i)
    found = progress(plan, made, at=1010.0)
    assert found.rate == pytest.approx(4 / 10 + 4 / 9)
    assert found.seconds == pytest.approx(2 / found.rate)
    assert progress(plan, made, at=9999.0).seconds is None


def test_shards_come_from_the_command_line_or_from_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert shard_of("2/8") == (2, 8)
    with pytest.raises(UserError, match="neither torchrun nor Slurm"):
        shard_of("auto")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "2")
    assert shard_of("auto") == (3, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shard_of("auto") == (1, 2)


def test_the_commands_make_the_same_pictures_in_one_shard_and_in_two(world, generator, data, tmp_path):
    shared = ["--plan", str(world / "plan"), "--views", str(tmp_path / "v"), "--generator", str(generator), "--quiet"]
    for i in (0, 1):
        words = ["generate", *shared, "--steps", "2", "--batch_size", "3", "--shard", f"{i}/2"]
        assert main([*words, "--out", str(tmp_path / f"log{i}")]) == 0
    first, second = (ViewStore.open(path).rows() for path in (world / "views", tmp_path / "v"))
    assert first.keys() == second.keys()
    for name, row in first.items():
        a, b = (
            read_image(root / r.path).astype(int)
            for root, r in ((world / "views", row), (tmp_path / "v", second[name]))
        )
        assert abs(a - b).max() <= 1


def test_a_worker_that_is_killed_in_a_unit_and_started_again_completes_it(world, generator, tmp_path):
    words = ["generate", "--plan", world / "plan", "--views", tmp_path / "v", "--generator", generator, "--steps", "2"]
    words = [str(w) for w in [*words, "--batch_size", "1", "--quiet", "--out", tmp_path / "log"]]
    code = "import sys; from genview.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "v/views.json").exists() and len(ViewStore.open(tmp_path / "v").rows()) >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    there = len(ViewStore.open(tmp_path / "v").done())
    assert there >= 3
    assert main([*words, "--resume"]) == 0
    store = ViewStore.open(tmp_path / "v")
    assert len(store.done()) == 24
    assert not [fault for row in store.rows().values() if (fault := store.fault(row))]
    for name, row in ViewStore.open(world / "views").rows().items():
        a, b = (
            read_image(root / r.path).astype(int)
            for root, r in ((world / "views", row), (tmp_path / "v", store.rows()[name]))
        )
        assert abs(a - b).max() <= 1


def test_status_tells_progress_and_finds_a_file_that_was_changed(world, tmp_path, capsys):
    import shutil

    shutil.copytree(world / "views", tmp_path / "v")
    words = ["status", "--plan", str(world / "plan"), "--views", str(tmp_path / "v"), "--verify", "true"]
    assert main(words) == 0
    assert "24 of 24 views are there (100.0 %), 0 failed; nothing is left" in capsys.readouterr().out
    victim = next((tmp_path / "v/images").rglob("*.png"))
    victim.write_bytes(victim.read_bytes()[:-3])
    assert_user_error(main, [*words, "--quiet"], capsys, "1 of 24 files", victim.name)


def test_a_changed_number_of_steps_is_refused_by_the_command(world, generator, tmp_path, capsys):
    words = ["generate", "--plan", str(world / "plan"), "--views", str(world / "views"), "--generator", str(generator)]
    assert_user_error(main, [*words, "--steps", "3", "--out", str(tmp_path / "o")], capsys, "steps: 2 there, 3 here")
    assert not (tmp_path / "o").exists()


def test_rows_of_broken_pictures_are_in_no_unit():
    made = in_units([replace(row, error="broken") if row.number == 2 else row for row in rows()], 4)
    assert [row.unit for row in made if row.error] == [-1]
    assert all(row.unit >= 0 for row in made if not row.error)
