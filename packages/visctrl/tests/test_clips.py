"""Videos and folders of frames as people have them: right, or one line."""

import numpy as np
import pytest
import visctrl_clips
from PIL import Image
from visctrl.clips import VideoClip, open_clip, span_of, write_video

from tenfold import UserError

pytest.importorskip("av")


def close(a, b, most=6):
    return np.abs(a.astype(int) - b).mean() < most


def is_number(frame, number):
    """Whether no other frame is nearer in brightness, and its colors are near; a frame two pixels off is further by far."""
    gray = np.array([0.3, 0.59, 0.11])
    distances = [np.abs((frame.astype(int) - visctrl_clips.picture(n)) @ gray).mean() for n in range(40)]
    off = [d for n, d in enumerate(distances) if abs(n - number) >= 4]
    return distances[number] < min(distances) + 0.1 < min(off) and close(frame, visctrl_clips.picture(number), 9)


def test_a_video_is_decoded_frame_by_frame_with_its_colors(tmp_path):
    clip = open_clip(visctrl_clips.write(tmp_path / "a.mp4"))
    assert (len(clip), clip.size, clip.names[39]) == (40, (24, 32), "000039")
    for number, frame in enumerate(clip):
        assert is_number(frame, number), number
    part = open_clip(tmp_path / "a.mp4", span_of("10:13"))
    assert part.names == ["000010", "000011", "000012"]
    assert all(np.array_equal(a, b) for a, b in zip(part, list(clip)[10:13], strict=True))


def test_what_is_written_has_the_times_and_the_sound_of_what_was_read(tmp_path):
    uneven = [40 * n + (13 if n % 3 else 0) for n in range(40)]
    clip = open_clip(visctrl_clips.write(tmp_path / "a.mp4", sound="aac", times=uneven))
    write_video(tmp_path / "b.mp4", iter(clip), clip, note="edited")
    frames, times = visctrl_clips.read(tmp_path / "b.mp4")
    assert times == pytest.approx([t / 1000 for t in uneven], abs=1e-4)
    assert visctrl_clips.sound(tmp_path / "b.mp4") == visctrl_clips.sound(tmp_path / "a.mp4")
    assert all(close(a, b, 4) for a, b in zip(frames, clip, strict=True))
    write_video(tmp_path / "mute.mp4", iter(clip), clip, sound=False)
    assert visctrl_clips.sound(tmp_path / "mute.mp4") is None


def test_a_part_of_a_video_begins_at_zero_with_its_part_of_the_sound(tmp_path):
    visctrl_clips.write(tmp_path / "a.mp4", sound="aac")
    clip = open_clip(tmp_path / "a.mp4", span_of("10:20"))
    write_video(tmp_path / "b.mp4", iter(clip), clip)
    _, times = visctrl_clips.read(tmp_path / "b.mp4")
    assert times == pytest.approx([0.04 * n for n in range(10)], abs=1e-4)
    whole, part = (visctrl_clips.sound(tmp_path / f"{name}.mp4") for name in "ab")
    assert 0 < len(part) < len(whole)
    assert any(whole[i : i + len(part)] == part for i in range(len(whole)))


def test_a_phones_rotation_tag_is_followed_and_the_result_stands_upright(tmp_path):
    path = visctrl_clips.write(tmp_path / "a.mp4", 5)
    visctrl_clips.turn(path)
    clip = open_clip(path)
    assert clip.size == (32, 24)
    first = next(iter(clip))
    assert close(first, np.rot90(visctrl_clips.picture(0), -1))  # a quarter turn clockwise
    write_video(tmp_path / "b.mp4", iter(clip), clip)
    again = open_clip(tmp_path / "b.mp4")
    assert (again.size, again.rotation) == ((32, 24), 0)
    assert close(next(iter(again)), first)


def test_odd_sizes_are_kept(tmp_path):
    clip = open_clip(visctrl_clips.write(tmp_path / "a.mp4", 3, (25, 33)))
    write_video(tmp_path / "b.mp4", iter(clip), clip)
    assert open_clip(tmp_path / "b.mp4").size == (25, 33)


def test_a_video_that_ends_early_is_refused_with_the_frames_that_are_there_and_these_can_be_edited(tmp_path):
    path = visctrl_clips.write(tmp_path / "a.mp4", movflags="+faststart", g="5")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    with pytest.raises(UserError, match=r"ends early: (\d+) of 40 frames") as found:
        open_clip(path)
    there = int(str(found.value).split("--frames :")[1].split()[0])
    assert 0 < there < 40
    clip = open_clip(path, span_of(f":{there}"))
    assert len(list(clip)) == len(clip) == there
    late = visctrl_clips.write(tmp_path / "late.mp4")  # the table of frames stands at its end
    late.write_bytes(late.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a video that can be opened"):
        open_clip(late)


def test_a_video_trimmed_on_the_phone_has_the_frames_that_a_player_shows(tmp_path):
    path = visctrl_clips.write(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4 + 4 + 4 + 4
    begin = int.from_bytes(data[at : at + 4], "big")
    with_scale = data.index(b"mdhd") + 4 + 4 + 8
    scale = int.from_bytes(data[with_scale : with_scale + 4], "big")
    data[at : at + 4] = (begin + scale * 400 // 1000).to_bytes(4, "big")  # 10 frames later
    path.write_bytes(bytes(data))
    clip = open_clip(path)
    assert len(clip) == 30
    assert is_number(next(iter(clip)), 10)


def test_other_containers_and_codecs_are_read(tmp_path):
    for name, codec in (("a.mkv", "ffv1"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")):
        clip = open_clip(visctrl_clips.write(tmp_path / name, 6, codec=codec))
        assert len(clip) == 6
        write_video(tmp_path / "b.mp4", iter(clip), clip)
        assert len(open_clip(tmp_path / "b.mp4")) == 6


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (1, 2, 10):
        Image.fromarray(visctrl_clips.picture(number)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    clip = open_clip(tmp_path)
    assert clip.names == ["frame_1", "frame_2", "frame_10"]
    assert all(np.array_equal(a, visctrl_clips.picture(n)) for a, n in zip(clip, (1, 2, 10), strict=True))


def test_clips_that_cannot_be_edited_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.fromarray(visctrl_clips.picture(0)).save(mixed / "0.png")
    Image.fromarray(visctrl_clips.picture(0, (20, 32))).save(mixed / "1.png")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("0.png", "0.jpg"):
        Image.fromarray(visctrl_clips.picture(0)).save(twice / name)
    phone = tmp_path / "phone"
    phone.mkdir()
    (phone / "0.heic").write_bytes(b"x")
    (tmp_path / "text.mp4").write_text("no video")
    Image.fromarray(visctrl_clips.picture(0)).save(tmp_path / "one.png")
    for name, said in (
        ("none.mp4", "no such file or folder"),
        ("text.mp4", "not a video that can be opened"),
        ("empty", "no pictures in it"),
        ("twice", "the same name"),
        ("phone", "HEIC"),
        ("one.png", "is one picture"),
    ):
        with pytest.raises(UserError, match=said):
            open_clip(tmp_path / name)
    with pytest.raises(UserError, match="1.png: 32 x 20 pixels, the first frame has 32 x 24"):
        list(open_clip(mixed))
    for text in ("3", "4:4", "a:b", "-1:2"):
        with pytest.raises(UserError, match="--frames"):
            span_of(text)
    short = visctrl_clips.write(tmp_path / "short.mp4", 3)
    with pytest.raises(UserError, match="it has 3 frames"):
        open_clip(short, span_of("5:"))


def test_sound_that_an_mp4_cannot_hold_is_named_before_anything_is_edited(tmp_path):
    path = visctrl_clips.write(tmp_path / "a.avi", 5, codec="mpeg4", sound="adpcm_ms")
    clip = open_clip(path)
    assert isinstance(clip, VideoClip)
    with pytest.raises(UserError, match=r"its sound \(adpcm_ms\) cannot be copied into an mp4: give --sound false"):
        clip.check_sound()
    write_video(tmp_path / "b.mp4", iter(clip), clip, sound=False)


def test_colors_in_hdr_are_refused_by_name(tmp_path):
    path = visctrl_clips.write(tmp_path / "a.mp4", 3, transfer=18)
    with pytest.raises(UserError, match="HLG"):
        open_clip(path)


def test_a_large_video_that_does_not_name_its_colors_has_those_that_players_show(tmp_path):
    size = (720, 1280)
    want = visctrl_clips.picture(1, size)
    for space in (1, 2):
        path = visctrl_clips.write(tmp_path / f"{space}.mp4", 2, size, space=space)
        found = list(open_clip(path))[1]
        assert np.abs(found.astype(int) - want)[20:, 40:].mean() < 3, space


def test_interlaced_frames_are_refused_and_subtitles_that_are_not_written_are_said(tmp_path):
    path = visctrl_clips.write(tmp_path / "tv.mp4", 4, (32, 32), x264="interlaced=1")
    with pytest.raises(UserError, match="interlaced, two moments in each"):
        open_clip(path)
    plain = visctrl_clips.write(tmp_path / "plain.mp4", 3)
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:00,100\nHello\n\n")
    visctrl_clips.joined(tmp_path / "film.mkv", plain, tmp_path / "a.srt")
    with pytest.warns(UserWarning, match="1 tracks of subtitles are not written"):
        assert len(open_clip(tmp_path / "film.mkv")) == 3
