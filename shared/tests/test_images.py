import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tenfold import UserError, images, readers
from tenfold.memory import MemoryProbe
from tenfold.readers import Images


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def files(tmp_path):
    """Two classes of three pictures, 26 x 20 pixels."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(noise(20, 26, 3, seed=i)).save(tmp_path / name / f"{i}.png")
    return readers.image_folder(tmp_path)


def test_arrays_become_channels_first():
    gray, color = noise(3, 4, 5), noise(3, 4, 5, 3)
    assert images.to_tensor(gray).shape == (3, 1, 4, 5)
    repeated = images.to_tensor(gray, color=True)
    assert repeated.shape == (3, 3, 4, 5)
    assert all(np.array_equal(repeated[:, c], gray) for c in range(3))
    for channels_last in (False, True):
        found = images.to_tensor(color, channels_last=channels_last)
        assert np.array_equal(found, color.transpose(0, 3, 1, 2))
        assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_are_copied_and_others_are_shared():
    array = noise(2, 3, 3)
    found = images.to_tensor(array)
    array[0, 0, 0] = 17
    assert found[0, 0, 0, 0] == 17
    array.flags.writeable = False
    images.to_tensor(array)[0] = 0
    assert array[0, 0, 0] == 17


def test_statistics_are_those_of_numpy_per_channel():
    array = noise(40, 3, 4, 4)
    mean, std = images.pixel_statistics(torch.from_numpy(array))
    np.testing.assert_allclose(mean, array.mean((0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, array.std((0, 2, 3), ddof=0) / 255 * math.sqrt(640 / 639), rtol=1e-12)
    mean, std = images.pixel_statistics(torch.from_numpy(array), scale=1, most=10)
    np.testing.assert_allclose(mean, array[::4].mean((0, 2, 3)), rtol=1e-12)
    assert mean.dtype == std.dtype == torch.float64


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_a_stratified_share_takes_of_every_class_and_leaves_of_every_class(labels, share):
    taken, rest = images.stratified(torch.tensor(labels), share)
    assert sorted(taken + rest) == list(range(len(labels)))
    for label in set(labels):
        count, part = labels.count(label), sum(labels[i] == label for i in taken)
        assert part == min(max(1, round(count * share)), count - 1)
    assert images.stratified(torch.tensor(labels), share) == (taken, rest)


def test_the_share_of_each_class_is_pinned():
    """Trained results depend on which images are held out."""
    labels = torch.arange(24) % 3
    assert images.of_each(labels, lambda count: 2) == [0, 12, 16, 17, 20, 22]
    assert images.of_each(labels, lambda count: 0) == []


def test_a_square_is_the_middle_at_the_size_that_is_usual():
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (40, 60, 3))
    small = images.square(Image.fromarray(np.ascontiguousarray(ramp)), 40)
    assert np.array_equal(small, ramp[:, 10:50])  # the shorter side is 40 already
    large = Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)))
    )
    assert np.array_equal(images.square(large, 224), np.asarray(large)[16:240, 16:240])  # 256 / 224
    assert images.square(large, 100).shape == (100, 100, 3)
    assert np.array_equal(images.middle_square(large, 224), np.asarray(large)[16:240, 16:240])
    assert np.array_equal(images.middle_square(large, 256, share=1), np.asarray(large))


@pytest.fixture
def boxes(monkeypatch):
    """The parts that images are resized from during a test."""
    found, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, box: found.append(box) or resize(self, size, box=box))
    return found


def test_a_random_crop_has_the_area_and_the_ratio_that_were_asked_for(boxes):
    image = Image.fromarray(noise(60, 90, 3))
    torch.manual_seed(0)
    crops = [images.random_resized_crop(image, 16, area=(0.2, 0.5), ratio=(0.5, 2)) for _ in range(300)]
    assert all(crop.shape == (16, 16, 3) and crop.dtype == np.uint8 for crop in crops)
    left, top, right, bottom = np.asarray(boxes, float).T
    area, ratio = (right - left) * (bottom - top) / 5400, (right - left) / (bottom - top)
    assert 0.19 < area.min() < 0.25 < 0.45 < area.max() < 0.51
    assert 0.48 < ratio.min() < 0.6 < 1.7 < ratio.max() < 2.05
    assert left.min() == 0
    assert right.max() == 90
    assert len({crop.tobytes() for crop in crops}) == 300


def test_crops_are_mirrored_half_of_the_time_or_as_asked():
    ramp = Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 32, 3)))
    )
    torch.manual_seed(0)
    for flip, share in ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0)):
        crops = [images.random_resized_crop(ramp, 8, flip=flip) for _ in range(200)]
        assert abs(np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in crops]) - share) <= (0.1 if flip == 0.5 else 0)
    squares = [images.random_square(ramp, 8) for _ in range(200)]
    assert abs(np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in squares]) - 0.5) < 0.1
    width = np.asarray([abs(int(crop[0, 0, 0]) - int(crop[0, -1, 0])) for crop in squares])
    assert width.min() > 0.35**0.5 * 0.75 * 256  # of 8 samples, the outer two lie inside the square


def test_a_crop_that_nothing_fits_is_the_middle():
    thin = Image.fromarray(noise(2, 200, 3))
    torch.manual_seed(0)
    assert images.random_resized_crop(thin, 4, area=(1, 1)).shape == (4, 4, 3)


def test_crops_are_drawn_from_the_global_generator_in_a_pinned_order(boxes):
    """Trained results depend on them."""
    image = Image.fromarray(noise(60, 90, 3))
    torch.manual_seed(0)
    for crop in [images.random_resized_crop] * 3 + [images.random_square] * 3:
        crop(image, 16)
    assert boxes == [
        (2, 1, 60, 51),
        (27, 0, 87, 60),
        (1, 2, 46, 50),
        (28, 8, 77, 57),
        (32, 15, 75, 58),
        (13, 1, 70, 58),
    ]
    assert torch.rand(()).item() == pytest.approx(0.0361648, abs=1e-6)


def test_a_split_gives_the_same_pixels_in_memory_and_from_files(files):
    lazy = images.in_files(files, 16)
    kept = lazy.decoded()
    index = torch.tensor([4, 0])
    assert lazy.images is None
    assert kept.decoded() is kept
    assert torch.equal(lazy.pixels(index), kept.pixels(index))
    assert lazy.pixels(index).shape == (2, 3, 16, 16)
    assert lazy.name(1).endswith("1.png")
    assert len(lazy) == 6
    assert lazy.decoded_bytes == kept.decoded_bytes == 6 * 3 * 16 * 16
    part = kept.part([5, 1])
    assert torch.equal(part.images, kept.images[[5, 1]])
    assert part.labels.tolist() == [1, 0]
    assert part.paths == (files.paths[5], files.paths[1])
    files.paths[0].write_bytes(b"")
    with pytest.raises(UserError, match="0.png: cannot be decoded"):
        lazy.pixels(torch.tensor([0]))


def test_arrays_as_a_split():
    split = images.in_memory(Images(noise(3, 5, 5), np.array([0, 1, 0]), ("a", "b"), "rendered"))
    assert split.images.shape == (3, 3, 5, 5)
    assert split.labels.dtype == torch.int64
    assert (split.size, split.name(2), split.paths) == (5, "2", ())


def test_items_for_a_loader(files):
    lazy = images.in_files(files, 16)
    plain = images.Indexed(lazy)
    assert len(plain) == 6
    index, label, pixels = plain[4]
    assert (index, label) == (4, 1)
    assert torch.equal(pixels, lazy.pixels(torch.tensor([4]))[0])
    crops = images.Indexed(lazy, images.read_random_crop)
    torch.manual_seed(0)
    first = crops[4][2]
    assert not torch.equal(crops[4][2], first)
    torch.manual_seed(0)
    assert torch.equal(crops[4][2], first)
    assert images.Indexed(lazy.decoded())[4] == (4, 1)


def test_data_know_their_size(files):
    split = images.in_files(files, 16)
    data = images.ImageData(split, None, split, files.classes, (0.5,), (0.5,), "real")
    assert data.size == 16


@pytest.mark.parametrize("shape", [(7, 3, 40, 50), (300, 1, 8, 8), (1, 4, 3, 3)])
def test_statistics_are_numpys_in_little_memory(shape):
    pixels = noise(*shape)
    mean, std = images.pixel_statistics(torch.from_numpy(pixels))
    assert np.allclose(mean, pixels.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    assert np.allclose(std, pixels.std(axis=(0, 2, 3), ddof=1) / 255, rtol=1e-10)
    large = torch.zeros(3000, 3, 64, 64, dtype=torch.uint8)
    with MemoryProbe(large) as probe:
        images.pixel_statistics(large)
    assert probe.peak_bytes - probe.start_bytes < 30e6  # in double precision the images themselves would take 295e6


def test_images_keep_their_number_through_parts():
    split = images.in_memory(Images(noise(9, 4, 4, 3), np.arange(9), tuple("abcdefghi"), ""))
    part = split.part([8, 2, 5]).part([2, 0])
    assert [part.name(i) for i in range(2)] == ["5", "8"]
    assert torch.equal(part.images, split.images[[5, 8]])


def test_images_in_memory_are_scaled_as_pillow_does():
    split = images.in_memory(Images(noise(3, 12, 12, 3), np.zeros(3, np.int64), ("a",), ""))
    scaled = split.resized(20)
    assert scaled.size == 20
    for ours, pixels in zip(scaled.images, split.images, strict=True):
        theirs = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((20, 20), Image.Resampling.BILINEAR)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_channels_are_repeated_or_their_luma_taken(files):
    color = torch.from_numpy(noise(2, 3, 5, 5))
    gray = images.in_channels(color, 1)
    theirs = np.stack([np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L")) for x in color])
    assert np.abs(gray[:, 0].numpy().astype(int) - theirs.astype(int)).max() <= 1
    assert torch.equal(images.in_channels(gray, 3), gray.expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="images of 4 channels cannot be brought to 3"):
        images.in_channels(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), 3)
    split = images.in_files(files, 16, channels=1)
    assert split.pixels(torch.arange(2)).shape == (2, 1, 16, 16)
    assert torch.equal(split.decoded().images, split.pixels(torch.arange(len(split))))
