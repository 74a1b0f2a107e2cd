"""Depth, cameras and labels as people have them: read right, or refused in one line that says what is likely meant."""

import struct
import zlib

import numpy as np
import pytest
from freespace_uda import DepthCode, RoadWorld
from freespace_uda.calibration import pinhole
from freespace_uda.depth import SCALES, complaints, decode, look_at, ray_lengths, read_numbers, shift_of
from freespace_uda.labels import IDS, by_color, by_id, check_ids, recognize_carla
from freespace_uda.scenes import Record, Scenes, read_raw
from PIL import Image

from tenfold import UserError

K = pinhole(100, 100, 1.5, 1.5)


def test_carlas_24_bits_reach_from_0_to_1000_meters_and_come_back():
    corners = np.array([[[0, 0, 0], [255, 255, 255]], [[1, 0, 0], [0, 1, 0]]], np.uint8)
    found = decode(corners, DepthCode("carla", far=1e9), K)
    assert found[0, 1] == pytest.approx(1000)
    assert found[0, 0] == 0
    assert found[1, 0] == pytest.approx(1000 / (256**3 - 1))
    meters = np.array([[3.2, 55.5]])
    whole = np.round(meters / 1000 * (256**3 - 1)).astype(np.int64)
    coded = np.stack([whole % 256, whole // 256 % 256, whole // 65536], -1).astype(np.uint8)
    assert np.allclose(decode(coded, DepthCode("carla"), K), meters, atol=1e-4)
    assert decode(corners, DepthCode("carla"), K)[0, 1] == 0  # the sky


@pytest.mark.parametrize(("unit", "number"), [("mm", 5000), ("cm", 500), ("m/256", 1280), ("m", 5)])
def test_five_meters_in_every_unit(unit, number):
    assert (decode(np.full((2, 2), number, np.uint16), DepthCode(unit), K) == 5).all()


def test_a_zed_camera_writes_nan_and_infinity_for_what_it_does_not_see():
    numbers = np.array([[np.nan, np.inf, -np.inf, 4.5]], np.float32)
    assert decode(numbers, DepthCode("m"), K).tolist() == [[0, 0, 0, 4.5]]


def test_disparity_with_and_without_an_offset_of_the_principal_points():
    pixels = np.array([[10.0, 20.0, 0.0]], np.float32)
    found = decode(pixels, DepthCode("disparity", baseline=0.5), K)
    assert found.tolist() == [[5.0, 2.5, 0.0]]
    moved = decode(pixels, DepthCode("disparity", baseline=0.5, offset=2.0), K)
    assert moved == pytest.approx(np.array([[6.25, 50 / 18, 0]]))
    sixteenths = decode((16 * pixels).astype(np.int16), DepthCode("disparity/16", baseline=0.5), K)
    assert np.allclose(sixteenths, found)
    with pytest.raises(UserError, match="--reading.baseline"):
        decode(pixels, DepthCode("disparity"), K)


def test_a_scale_stands_in_place_of_a_unit():
    assert decode(np.full((2, 2), 20000, np.uint16), DepthCode(scale=0.0001), K)[0, 0] == pytest.approx(2)


def test_a_gray_preview_of_carlas_depth_is_refused():
    with pytest.raises(UserError, match="a gray preview of CARLA's depth"):
        decode(np.full((2, 2, 3), 90, np.uint8), DepthCode("carla"), K)


def test_carlas_labels_in_colors_of_cityscapes_are_told_and_read_when_said(tmp_path):
    colors = np.array([[[128, 64, 128], [157, 234, 50], [70, 70, 70]]], np.uint8)
    Image.fromarray(colors).save(tmp_path / "l.png")
    with pytest.raises(UserError, match="--reading.palette cityscapes-colors"):
        Scenes("s", (Record("a", label=tmp_path / "l.png", palette="carla"),)).label(0)
    told = Scenes("s", (Record("a", label=tmp_path / "l.png", palette="cityscapes-colors"),))
    assert told.label(0).tolist() == [[1, 1, 0]]


def test_distance_along_the_ray_becomes_distance_along_z():
    shape = (4, 6)
    z = np.full(shape, 7.0)
    along = z * ray_lengths(shape, K)
    assert np.allclose(decode(along, DepthCode("m", ray=True), K), z)


def road(domain="roads-flat", size=(96, 48), index=0):
    scene = RoadWorld(domain, size, 1, 3)[index]
    return scene.depth, scene.camera.intrinsics


def test_right_depth_draws_no_complaint_in_any_world():
    for domain in ("roads-flat", "roads-noisy", "roads-city", "roads-real"):
        for i in range(3):
            depth, k = road(domain, index=i)
            assert complaints(look_at(depth, k), "d") == []


@pytest.mark.parametrize(
    ("factor", "told"),
    [(1000, "depth_unit mm"), (100, "depth_unit cm"), (0.01, "depth_unit"), (256, "depth_unit m/256")],
)
def test_a_wrong_unit_is_told_by_the_height_of_the_camera(factor, told):
    depth, k = road()
    ((fatal, message),) = complaints(look_at((depth * factor).astype(np.float32), k), "d")
    assert fatal
    assert told in message
    assert "the camera would be" in message


@pytest.mark.parametrize(("unit", "right"), [("mm", "m/256"), ("m/256", "cm")])
def test_a_unit_that_could_be_a_robots_is_warned_about_where_another_one_fits_a_car(unit, right):
    depth, k = road()
    taken = (depth / SCALES[right] * SCALES[unit]).astype(np.float32)
    ((fatal, message),) = complaints(look_at(taken, k), "d", DepthCode(unit))
    assert not fatal
    assert "on a car" in message
    assert f"--reading.depth_unit {right}" in message
    assert complaints(look_at(depth, k), "d", DepthCode(unit)) == []


def test_a_disparity_taken_for_depth_is_told():
    depth, k = road()
    disparity = np.where(depth > 0, 50 / np.maximum(depth, 1e-3), 0).astype(np.float32)
    assert any(fatal and "looks like a disparity" in text for fatal, text in complaints(look_at(disparity, k), "d"))


def test_distance_along_the_ray_taken_for_z_is_told_and_z_is_not():
    depth, k = road(size=(160, 96))
    along = (depth * ray_lengths(depth.shape, k)).astype(np.float32)
    assert any("--reading.ray" in text for _, text in complaints(look_at(along, k), "d"))
    assert not look_at(depth, k).ray


def test_a_sparse_scan_is_warned_about_and_an_empty_one_refused():
    depth, k = road()
    lidar = np.where(np.arange(len(depth))[:, None] % 8 == 0, depth, 0)
    ((fatal, message),) = complaints(look_at(lidar, k), "d")
    assert not fatal
    assert "under 30 %" in message
    ((fatal, message),) = complaints(look_at(np.zeros_like(depth), k), "d")
    assert fatal
    assert "no pixel has valid depth" in message


@pytest.mark.parametrize("domain", ["roads-flat", "roads-noisy", "roads-city", "roads-real"])
def test_edges_of_depth_meet_those_of_the_picture_and_a_shift_is_found(domain):
    found = []
    for i in range(4):
        scene = RoadWorld(domain, (320, 128), 1, 4)[i]
        assert shift_of(scene.rgb, scene.depth) is None
        found.append(shift_of(scene.rgb, np.roll(scene.depth, 7, 1)))
    if domain in {"roads-flat", "roads-city"}:
        assert any(f is not None and abs(f + 7) <= 1 for f in found)


def test_noise_of_depth_is_not_taken_for_a_shift():
    world = RoadWorld("roads-real", (160, 64), 100, 12)
    assert [shift_of(world[i].rgb, world[i].depth) for i in range(12)] == [None] * 12


def test_files_of_depth_of_every_form(tmp_path):
    values = np.array([[1.5, 2.5], [0.0, 4.0]], np.float32)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", depth=values)
    Image.fromarray(values).save(tmp_path / "c.tiff")
    Image.fromarray((1000 * values).astype(np.uint16)).save(tmp_path / "d.png")
    (tmp_path / "e.pfm").write_bytes(b"Pf\n2 2\n-1.0\n" + values[::-1].astype("<f4").tobytes())
    for name in ("a.npy", "b.npz", "c.tiff", "e.pfm"):
        assert np.array_equal(read_numbers(tmp_path / name), values), name
    assert np.array_equal(read_numbers(tmp_path / "d.png"), 1000 * values)
    (tmp_path / "f.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="f.png: cannot be read as depth"):
        read_numbers(tmp_path / "f.png")
    for name in ("a.npy", "b.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name}: cannot be read as depth"):
            read_numbers(tmp_path / name)
    with pytest.raises(UserError, match="8 bits are too few"):
        decode(np.ones((2, 2), np.uint8), DepthCode("mm"), K)
    with pytest.raises(UserError, match="--reading.depth_unit carla"):
        decode(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), DepthCode("mm"), K)


def wide_png(path, values):
    """A PNG of three channels of 16 bits, which Pillow cannot write."""
    rows, columns, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", columns, rows, 16, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_synthias_labels_of_three_channels_of_16_bits_keep_their_ids(tmp_path):
    ids = np.zeros((3, 4, 3), np.uint16)
    ids[0, :, 0] = (3, 22, 6, 300)
    wide_png(tmp_path / "l.png", ids)
    assert np.array_equal(read_raw(tmp_path / "l.png"), ids)
    scenes = Scenes("s", (Record("a", label=tmp_path / "l.png", palette="synthia-rand"),))
    ids[0, 3, 0] = 1
    wide_png(tmp_path / "l.png", ids)
    assert scenes.label(0).tolist() == [[1, 1, 0, 0], [255] * 4, [255] * 4]


def test_colors_of_kitti_orfd_and_virtual_kitti():
    kitti = np.array([[[255, 0, 255], [255, 0, 0], [0, 0, 0]]], np.uint8)
    assert by_color(kitti, "kitti-road", "l").tolist() == [[1, 0, 255]]
    orfd = np.array([[[255, 255, 255], [0, 0, 150], [0, 0, 201]]], np.uint8)
    assert by_color(orfd, "orfd", "l").tolist() == [[1, 0, 1]]
    virtual = np.array([[[100, 60, 100], [101, 60, 100]]], np.uint8)
    assert by_color(virtual, "vkitti2", "l").tolist() == [[1, 0]]
    with pytest.raises(UserError, match="expected a label in colors"):
        by_color(np.zeros((2, 2), np.uint8), "kitti-road", "l")


def carla(road_id, other):
    ids = np.full((12, 12), other, np.uint8)
    ids[6:] = road_id
    return ids


def test_carlas_version_is_told_by_what_is_before_the_camera_or_asked_for():
    assert recognize_carla([carla(7, 1)], "l") == "carla-0.9.13"
    assert recognize_carla([carla(1, 7)], "l") == "carla-0.9.14"
    with pytest.raises(UserError, match="ids 9, 11: CARLA up to 0.9.13"):
        recognize_carla([carla(11, 9)], "l")


def test_one_picture_with_a_car_before_the_camera_is_read_as_the_rest_of_its_recording(tmp_path):
    records = []
    for i, ids in enumerate([carla(1, 7)] * 3 + [carla(14, 7)]):
        Image.fromarray(ids).save(tmp_path / f"{i}.png")
        records.append(Record(str(i), label=tmp_path / f"{i}.png", palette="carla"))
    scenes = Scenes("s", tuple(records))
    assert scenes.told_palette() == "carla-0.9.14"
    assert scenes.label(0).sum() == 72
    assert scenes.label(3).sum() == 0
    assert scenes.understood(labels=True)["labels"] == "carla-0.9.14"


@pytest.mark.parametrize(("unit", "far"), [("mm", 200), ("disparity/256", 200)])
def test_the_largest_number_of_16_bits_is_a_hole_of_realsense_oak_and_zed_cameras(unit, far):
    numbers = np.array([[65535, 1280]], np.uint16)
    code = DepthCode(unit, far=far, baseline=0.5)
    for kind in (np.uint16, np.int32):  # Pillow gives 32 bits for some PNGs of 16
        found = decode(numbers.astype(kind), code, K)
        assert found[0, 0] == 0
        assert found[0, 1] > 0


@pytest.mark.parametrize(("number", "told"), [(65.536, "--reading.far 65.54"), (0.3, "write 0 there")])
def test_a_number_that_stands_for_no_depth_is_warned_about(number, told):
    depth, k = road()
    depth = np.where((depth > 0) & (depth < 50), depth, 5.0).astype(np.float32)
    depth[5:15, 10:60] = number
    assert any(told in text and not fatal for fatal, text in complaints(look_at(depth, k), "d"))


def test_disparity_as_kitti_and_cityscapes_write_it():
    kitti = decode(np.array([[0, 256 * 20]], np.uint16), DepthCode("disparity/256", baseline=0.54), K)
    assert kitti.tolist() == [[0, pytest.approx(100 * 0.54 / 20)]]
    numbers = np.array([[0, 1, 256 * 20 + 1]], np.uint16)  # (p - 1) / 256, and 0 for nothing
    code = DepthCode("disparity/256", baseline=0.209, offset=1 / 256)
    assert decode(numbers, code, K).tolist() == [[0, 0, pytest.approx(100 * 0.209 / 20)]]


def test_synthias_depth_of_three_equal_channels_of_16_bits_keeps_its_numbers(tmp_path):
    depth = np.array([[500, 1234], [65535, 0]], np.uint16)
    wide_png(tmp_path / "d.png", np.repeat(depth[..., None], 3, 2))
    found = decode(read_numbers(tmp_path / "d.png"), DepthCode("cm"), K)
    assert found == pytest.approx(np.array([[5, 12.34], [0, 0]]))


def test_a_disparity_of_8_bits_is_read_and_depth_of_8_bits_is_not():
    pixels = np.array([[0, 20]], np.uint8)
    assert decode(pixels, DepthCode("disparity", baseline=0.5), K).tolist() == [[0, 2.5]]
    in_color = np.stack([pixels] * 3, -1)
    assert decode(in_color, DepthCode("disparity", baseline=0.5), K).tolist() == [[0, 2.5]]
    for found in (pixels, in_color):
        with pytest.raises(UserError, match="8 bits are too few for depth"):
            decode(found, DepthCode("m"), K)


@pytest.mark.parametrize("array", [np.array([["far"]]), np.array([[1j]]), np.ones((0, 3)), np.ones((2, 2), np.bool_)])
def test_a_file_that_holds_no_numbers_is_refused(tmp_path, array):
    np.save(tmp_path / "d.npy", array)
    with pytest.raises(UserError, match="d.npy: expected numbers, found"):
        read_numbers(tmp_path / "d.npy")


def test_depth_in_meters_where_carlas_code_is_expected_names_the_option():
    with pytest.raises(UserError, match="--reading.depth_unit, such as m or mm"):
        decode(np.ones((2, 2), np.float32), DepthCode("carla"), K)


def test_a_picture_that_its_orientation_tag_turns_is_warned_about(tmp_path):
    depth, k = road()
    tag = Image.Exif()
    tag[0x0112] = 3
    image = Image.fromarray(np.zeros((*depth.shape, 3), np.uint8))
    image.save(tmp_path / "turned.jpg", exif=tag)
    image.save(tmp_path / "upright.jpg")
    np.save(tmp_path / "d.npy", depth)
    for name, count in (("turned", 1), ("upright", 0)):
        record = Record(name, tmp_path / f"{name}.jpg", tmp_path / "d.npy", intrinsics=k)
        said = Scenes("s", (record,)).checked(0)[1]
        assert sum("orientation tag" in text for text in said) == count


def test_a_lossy_label_is_told_and_a_long_list_of_ids_is_cut(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)).save(tmp_path / "l.jpg")
    with pytest.raises(UserError, match=r"and \d+ more were found \(JPEG does not keep ids\)"):
        Scenes("s", (Record("a", label=tmp_path / "l.jpg"),)).label(0)


def test_depth_with_a_leading_dimension_of_one_is_read(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((1, 2, 3), np.float32))
    assert read_numbers(tmp_path / "d.npy").shape == (2, 3)


def test_a_form_that_is_not_read_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "d.exr").write_bytes(b"v/1\x01")
    with pytest.raises(UserError, match="expected PNG, TIFF, PFM, NPY or NPZ"):
        read_numbers(tmp_path / "d.exr")


def test_carlas_depth_with_red_and_blue_exchanged_is_told(tmp_path):
    depth, k = road()
    whole = np.round(np.where(depth > 0, depth, 1000) / 1000 * (256**3 - 1)).astype(np.int64)
    coded = np.stack([whole % 256, whole // 256 % 256, whole // 65536], -1).astype(np.uint8)
    for name, pixels in (("right", coded), ("wrong", coded[..., ::-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        record = Record(name, depth=tmp_path / f"{name}.png", intrinsics=k, code=DepthCode("carla"))
        if name == "right":
            assert Scenes("s", (record,)).checked(0)[1] == []
        else:
            with pytest.raises(UserError, match="red and blue are exchanged"):
                Scenes("s", (record,)).checked(0)


def test_a_png_of_indices_is_read_by_its_colors_where_the_palette_is_one_of_colors(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([128, 64, 128, 70, 70, 70])
    image.save(tmp_path / "l.png")
    scenes = Scenes("s", (Record("a", label=tmp_path / "l.png", palette="cityscapes-colors"),))
    assert scenes.label(0).tolist() == [[1, 0]]
    scenes = Scenes("s", (Record("a", label=tmp_path / "l.png", palette="cityscapes-train"),))
    assert scenes.label(0).tolist() == [[1, 0]]


@pytest.mark.parametrize("palette", ["binary", "cityscapes", "cityscapes-train", "mapillary"])
def test_colors_where_ids_are_expected_are_refused(tmp_path, palette):
    Image.fromarray(np.array([[[0, 255, 0], [0, 0, 0]]], np.uint8)).save(tmp_path / "l.png")
    with pytest.raises(UserError, match="colors where palette"):
        Scenes("s", (Record("a", label=tmp_path / "l.png", palette=palette),)).label(0)


def test_cityscapes_and_mapillary_ids_and_ids_that_a_palette_does_not_have():
    assert by_id(np.array([[7, 8, 0]]), (7,), (0,)).tolist() == [[1, 0, 255]]
    with pytest.raises(UserError, match="ids 0, 40 were found, palette cityscapes has 0 to 33"):
        check_ids(np.array([[0, 40]]), "cityscapes", "l")
    check_ids(np.array([[0, 13, 65]]), "mapillary", "l")
    check_ids(np.array([[0, 21, 123]]), "mapillary-2.0", "l")
    assert IDS["mapillary-2.0"].known == 124


@pytest.mark.parametrize(
    ("road", "rest", "right", "wrong"),
    [
        (0, 10, "cityscapes-train", "cityscapes"),
        (7, 11, "cityscapes", "cityscapes-train"),
        (13, 17, "mapillary", "mapillary-2.0"),
        (21, 30, "mapillary-2.0", "mapillary"),
    ],
)
def test_the_second_palette_of_the_same_pictures_is_told_by_the_road_before_the_camera(road, rest, right, wrong):
    ids = np.full((30, 60), rest)
    check_ids(ids, wrong, "l")  # no road anywhere: nothing is told
    ids[15:] = road
    check_ids(ids, right, "l")
    with pytest.raises(UserError, match=f"--reading.palette {right}"):
        check_ids(ids, wrong, "l")


def test_a_mask_in_black_and_white_is_road_and_not_road(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "m.png")
    assert Scenes("s", (Record("a", label=tmp_path / "m.png"),)).label(0).tolist() == [[0, 1]]


def test_depth_of_another_size_than_its_picture_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "p.png")
    Image.fromarray(np.ones((3, 6), np.uint16)).save(tmp_path / "d.png")
    record = Record("a", tmp_path / "p.png", tmp_path / "d.png", intrinsics=K)
    with pytest.raises(UserError, match="6 x 3 pixels, its picture .* has 6 x 4: register depth"):
        Scenes("s", (record,)).item(0)
