"""Video: one pool for all frames, memory that does not grow, runs that go on where they were killed."""

import dataclasses
import gc
import json
import os
import signal
import weakref

import numpy as np
import pytest
import torch
import visctrl_clips
from PIL import Image
from visctrl import metrics
from visctrl.cli import main
from visctrl.commands import _film
from visctrl.commands import video as command
from visctrl.config import VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.toy import PatchCodec, ToyDenoiser, toy_adapter
from visctrl.video import Frame, edit_video, key_positions, shared_pool
from visctrl_tiny import ddim, picture, sd, tiny_unconditional, unconditional

from tenfold.testing import assert_user_error

CONFIG = VisCtrlConfig(steps=4, start=0.5, layers="0:", rounds=2, refine=2, guard=False)


@pytest.fixture(scope="module")
def engine():
    unet = tiny_unconditional(in_channels=3, out_channels=3, sample_size=16)
    return VisCtrl(unet, CONFIG, scheduler=ddim())


def moving(count):
    """Frames of a picture that shifts by one pixel."""
    x = picture(0)
    return [torch.roll(x, number, dims=-1) for number in range(count)]


def test_keyframes_are_the_middles_of_equal_parts():
    assert key_positions(40, 1) == [20]
    assert key_positions(40, 4) == [5, 15, 25, 35]
    assert key_positions(2, 5) == [0, 1]
    for count in range(1, 30):
        assert len(set(key_positions(count, 7))) == min(7, count)
    with pytest.raises(ValueError, match="keyframes"):
        key_positions(0, 3)


def test_all_frames_attend_to_the_same_features_so_that_what_stands_still_does_not_flicker(engine):
    still = [picture(0)] * 5
    references = [engine.reference(picture(seed)) for seed in (1, 2, 3)]
    shared = torch.cat([x.image for x in edit_video(engine, still, references, keyframes=2)])
    assert float(metrics.flicker(shared, torch.cat(still)).max()) == 0
    alone = torch.cat([engine.edit(x, references[n % 3]).images for n, x in enumerate(still)])
    assert float(metrics.flicker(alone, torch.cat(still)).mean()) > 1e-3


def test_with_the_references_alone_each_frame_is_an_edit_of_its_own_bit_for_bit(engine):
    frames, reference = moving(3), engine.reference(picture(1))
    for found, frame in zip(edit_video(engine, frames, reference, alpha=1.0), frames, strict=True):
        assert torch.equal(found.image, engine.edit(frame, reference).images)


def test_keyframes_change_the_frames_and_a_smaller_share_of_the_references_changes_them_more(engine):
    frames, reference = moving(3), engine.reference(picture(1))

    def edited(alpha):
        return torch.cat([x.image for x in edit_video(engine, frames, reference, alpha=alpha)])

    alone = edited(1.0)
    distances = [float((edited(alpha) - alone).abs().mean()) for alpha in (0.999999, 0.5, 0.1)]
    assert distances[0] < 1e-4
    assert distances[0] < distances[1] < distances[2]


def test_frames_together_give_what_they_give_one_by_one(engine):
    frames, reference = moving(5), engine.reference(picture(1))
    one, three = ([x.image for x in edit_video(engine, frames, reference, batch=n)] for n in (1, 3))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(one, three, strict=True))


def test_all_frames_make_as_many_rounds_as_the_keyframe_that_made_fewest(engine):
    frames, reference = moving(4), engine.reference(picture(1))
    engine.config = dataclasses.replace(CONFIG, guard=True, max_clipped=1e-9, rounds=3)
    pool = shared_pool(engine, [3 * x for x in frames], reference)
    engine.config = CONFIG
    assert pool.config.rounds < 3
    assert not pool.config.guard
    assert "stopped after round" in pool.verdict


class Counting:
    """Frames made as they are asked for, that know how many of them are alive."""

    def __init__(self, count):
        self.count, self.alive, self.most = count, 0, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            frame = torch.roll(picture(0), number, dims=-1)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(frame, self._gone)
            yield Frame(frame)
            del frame
            gc.collect(0)

    def _gone(self):
        self.alive -= 1


def test_the_frames_in_memory_do_not_grow_with_the_length_of_the_video(engine):
    most = []
    engine.config = dataclasses.replace(CONFIG, steps=2, rounds=1, refine=1)
    for count in (12, 36):
        frames = Counting(count)
        results = edit_video(engine, frames, engine.reference(picture(1)), keyframes=2, batch=2)
        assert sum(1 for _ in results) == count
        most.append(frames.most)
    engine.config = CONFIG
    assert most[0] == most[1] <= 2 + 2 + 1  # keyframes, a batch, the frame that is being made


def test_a_batch_that_is_there_already_is_left_out_and_the_others_are_the_same(engine):
    frames, reference = moving(5), engine.reference(picture(1))
    whole = list(edit_video(engine, frames, reference, batch=2))
    pool = shared_pool(engine, frames, reference)
    again = shared_pool(engine, frames, reference, latents=pool.latents, rounds=pool.config.rounds)
    rest = list(edit_video(engine, frames, [], batch=2, pool=again, done={0, 1, 2}.__contains__))
    assert [x.number for x in rest] == [2, 3, 4]
    assert all(torch.equal(x.image, whole[x.number].image) for x in rest)


def test_what_is_no_video_is_refused(engine):
    reference = engine.reference(picture(1))
    for frames in (iter(moving(2)), picture(0)):
        with pytest.raises(ValueError, match="gone through twice"):
            list(edit_video(engine, frames, reference))
    with pytest.raises(ValueError, match="at least one reference"):
        list(edit_video(engine, moving(2), []))
    for changes in ({"alpha": 0.0}, {"batch": 0}, {"keyframes": 0}):
        with pytest.raises(ValueError, match="must be|keyframes"):
            list(edit_video(engine, moving(2), reference, **changes))


def test_flicker_is_the_change_beyond_that_of_the_input():
    x = torch.zeros(3, 3, 4, 4)
    x[1:, :, 0, 0] = 0.5
    assert metrics.flicker(x, x).tolist() == [0, 0]
    y = x.clone()
    y[1, :, 0, 0] = 0.9  # 0.4 more than the input's change, then back
    assert metrics.flicker(y, x).tolist() == pytest.approx([0.4 / 16, 0.4 / 16])
    assert metrics.flicker(0 * x, x).tolist() == [0, 0]


QUICK = ["--control.steps", "2", "--control.start", "0.5", "--control.layers", "0:", "--control.rounds", "1"]
QUICK += ["--control.refine", "1", "--control.guard", "false", "--keyframes", "2", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("video")
    unconditional(folder).save_pretrained(folder / "plain")
    visctrl_clips.write(folder / "clip.mp4", sound="aac")
    Image.fromarray(visctrl_clips.picture(0)[::-1].copy()).save(folder / "reference.png")
    return folder


def words(place, out, target="clip.mp4", *more):
    given = ["video", "--model", place / "plain", "--target", place / target, "--reference", place / "reference.png"]
    return [str(x) for x in [*given, *QUICK, "--size", "16", *more, "--out", out]]


def killed(arguments, after):
    """``main`` in a copy of this process, which kills itself (SIGKILL) when it would write so many frames."""
    process = os.fork()
    if not process:
        signal.alarm(600)
        write, count = command.write_picture, iter(range(10**9))

        def writing(path, *args, **kwargs):
            if "frames" in str(path) and next(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, *args, **kwargs)

        command.write_picture = writing
        main(arguments)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_video_killed_and_resumed_has_the_frames_of_an_unbroken_run_its_times_and_its_sound(place, tmp_path):
    killed(words(place, tmp_path / "a"), 17)
    there = sorted((tmp_path / "a/frames").glob("[0-9]*.png"))
    assert len(there) == 17
    before = {path: path.stat().st_mtime_ns for path in there}
    assert main([*words(place, tmp_path / "a"), "--resume"]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert main(words(place, tmp_path / "b")) == 0
    for number in range(40):
        a, b = (tmp_path / x / f"frames/{number:06}.png" for x in "ab")
        assert a.read_bytes() == b.read_bytes(), number
    frames, times = visctrl_clips.read(tmp_path / "a/video.mp4")
    assert (len(frames), frames[0].shape) == (40, (24, 32, 3))
    assert times == pytest.approx([0.04 * n for n in range(40)], abs=1e-4)
    assert visctrl_clips.sound(tmp_path / "a/video.mp4") == visctrl_clips.sound(place / "clip.mp4")
    about = json.loads((tmp_path / "a/video.json").read_text())
    assert about["frames"] == 40
    assert about["flicker"] >= 0
    assert "edited with visctrl from reference.png" in Image.open(tmp_path / "a/frames/000000.png").text["Comment"]
    for name in ("grid.png", "figures/frames.png", "report.html", "history/000010-round_1.png"):
        assert (tmp_path / "a" / name).is_file(), name


def test_a_folder_of_frames_becomes_a_folder_with_the_same_names_and_masks_hold_the_rest(place, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "masks").mkdir()
    mask = np.zeros((25, 33), np.uint8)
    mask[5:15, 5:25] = 255
    for number in range(3):
        Image.fromarray(visctrl_clips.picture(number, (25, 33))).save(tmp_path / f"in/view_{number}.jpg")
        Image.fromarray(mask).save(tmp_path / f"masks/view_{number}.png")
    more = ["--target_mask", tmp_path / "masks", "--feather", "0"]
    assert main(words(place, tmp_path / "out", tmp_path / "in", *more)) == 0
    assert sorted(x.name for x in (tmp_path / "out/frames").iterdir()) == [f"view_{n}.png" for n in range(3)]
    assert not (tmp_path / "out/video.mp4").exists()
    for number in range(3):
        a, b = (
            np.asarray(Image.open(tmp_path / x)) for x in (f"in/view_{number}.jpg", f"out/frames/view_{number}.png")
        )
        assert np.array_equal(a[mask == 0], b[mask == 0])
        assert not np.array_equal(a[mask > 0], b[mask > 0])
    (tmp_path / "masks/view_1.png").unlink()
    main_args = words(place, tmp_path / "x", tmp_path / "in", *more)
    assert main(words(place, tmp_path / "film", tmp_path / "in", "--rate", "5")) == 0
    _, times = visctrl_clips.read(tmp_path / "film/video.mp4")
    assert times == pytest.approx([0, 0.2, 0.4], abs=1e-4)
    assert main(main_args) == 2
    assert not (tmp_path / "x").exists()


def test_videos_and_masks_that_do_not_fit_are_one_line_and_leave_nothing_behind(place, tmp_path, capsys):
    empty = np.zeros((24, 32), np.uint8)
    Image.fromarray(empty).save(tmp_path / "empty.png")
    visctrl_clips.write(tmp_path / "short.mp4", 3)
    for more, said in (
        (["--target_mask", "alpha"], "a video has no transparency"),
        (["--target_mask", tmp_path / "empty.png"], "no pixel of the subject"),
        (["--target_mask", tmp_path / "short.mp4"], "3 masks of 32 x 24 pixels, expected 40"),
        (["--rate", "5"], "--rate is for folders"),
        (["--frames", "50:"], "it has 40 frames, none of them"),
        (["--frames", "x"], "expected FIRST:END"),
        (["--keyframes", "0"], "--keyframes: expected 1 or more"),
        (["--alpha", "0"], "--alpha"),
        (["--reference_mask", tmp_path / "none.png"], "none.png: no such file"),
    ):
        assert_user_error(main, words(place, tmp_path / "out", "clip.mp4", *more), capsys, said)
        assert not (tmp_path / "out").exists(), said


def test_the_recipe_runs_on_a_tiny_stand_in_of_its_model(place, tmp_path):
    sd(tmp_path).save_pretrained(tmp_path / "sd")
    given = ["video", "--config", "recipe:video", "--model", tmp_path / "sd", "--target", place / "clip.mp4"]
    given += ["--reference", place / "reference.png", "--size", "16", "--frames", "0:2", "--control.steps", "4"]
    assert main([str(x) for x in [*given, "--quiet", "--out", tmp_path / "out"]]) == 0
    assert len(visctrl_clips.read(tmp_path / "out/video.mp4")[0]) == 2


def test_the_demonstrations_video_is_measured_and_moves_in_its_ideal_color(monkeypatch):
    film = _film.films(0)[0]
    assert film.frames.images.shape == film.ideal.shape == (8, 3, 32, 32)
    assert float(metrics.flicker(film.ideal, film.ideal).max()) == 0
    assert float((film.frames.images[1:] - film.frames.images[:-1]).abs().mean()) > 0.005
    monkeypatch.setattr(_film, "FILMS", 1)
    monkeypatch.setattr(_film, "CONFIG", dataclasses.replace(_film.CONFIG, steps=5, rounds=1, refine=1))
    codec = PatchCodec()
    codec.fit(film.ideal)
    found = _film.measure(VisCtrl(toy_adapter(ToyDenoiser(), codec), CONFIG), 0)
    assert set(found) == set(_film.ARMS)
    assert all(np.isfinite(list(values.values())).all() for values in found.values())
