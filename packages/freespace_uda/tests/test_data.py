"""Readers on stand-ins of a few pixels in the published encodings."""

import numpy as np
import pytest
from freespace_uda import load_scenes
from freespace_uda.config import SceneReading
from freespace_uda.data import _kitti, rendered, same_place
from freespace_uda.scenes import Unlabeled
from PIL import Image

from tenfold import UserError

W, H = 40, 24
KITTI = "P2: 30 0 19.5 0 0 30 8 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_cam_to_road: 1 0 0 0 0 1 0 -1.65 0 0 1 0\n"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def picture():
    return np.random.default_rng(0).integers(0, 255, (H, W, 3)).astype(np.uint8)


def ground(scale):
    """Depth of a road 1.6 m below, in units of 1 / scale, and where it is road."""
    v = np.arange(H)[:, None] - 8
    z = np.where(v > 0, 1.6 * 30 / np.maximum(v, 1), 0)
    return np.broadcast_to(np.round(z * scale), (H, W)).astype(np.uint16), np.broadcast_to(v > 2, (H, W))


def colored(road, color, rest=(0, 0, 0)):
    return np.where(road[..., None], np.array(color), np.array(rest)).astype(np.uint8)


def kitti(root, count=10):
    for i in range(count):
        depth, road = ground(1000)
        name = f"{('um', 'umm', 'uu')[i % 3]}_{i:06d}"
        save(root / f"training/image_2/{name}.png", picture())
        save(root / f"training/depth_u16/{name}.png", depth)
        save(
            root / f"training/gt_image_2/{name.replace('_', '_road_', 1)}.png",
            colored(road, (255, 0, 255), (255, 0, 0)),
        )
        (root / "training/calib").mkdir(exist_ok=True)
        (root / f"training/calib/{name}.txt").write_text(KITTI)
    return f"kitti-road:{root}"


def orfd(root):
    for part in ("training", "testing"):
        for i in range(2):
            depth, road = ground(256)
            base = root / part / "seq1"
            save(base / f"image_data/{i}.png", picture())
            save(base / f"dense_depth/{i}.png", depth)
            save(base / f"gt_image/{i}_fillcolor.png", colored(road, (255, 255, 255)))
            (base / "calib").mkdir(exist_ok=True)
            (base / f"calib/{i}.txt").write_text("cam_K: 30 0 19.5 0 30 8 0 0 1\n")
    return f"orfd:{root}"


def vkitti2(root):
    base = root / "Scene01/clone"
    for i in range(2):
        depth, road = ground(100)
        depth = np.where(depth == 0, 65535, depth).astype(np.uint16)
        save(base / f"frames/rgb/Camera_0/rgb_{i:05d}.jpg", picture())
        save(base / f"frames/depth/Camera_0/depth_{i:05d}.png", depth)
        save(
            base / f"frames/classSegmentation/Camera_0/classgt_{i:05d}.png",
            colored(road, (100, 60, 100), (90, 200, 255)),
        )
    lines = ["frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]", *(f"{i} {c} 30 30 19.5 8" for i in range(2) for c in (0, 1))]
    (base / "intrinsic.txt").write_text("\n".join(lines))
    return f"vkitti2:{root}"


def synthia(root):
    for i in range(2):
        depth, road = ground(100)
        save(root / f"RGB/{i:07d}.png", picture())
        save(root / f"Depth/Depth/{i:07d}.png", depth)
        save(root / f"GT/LABELS/{i:07d}.png", np.where(road, 3, 2).astype(np.uint8))
    (root / "CameraParams").mkdir()
    (root / "CameraParams/intrinsics.txt").write_text("30\n19.5\n8\n")
    return f"synthia:{root}"


def carla(root, kind="carla"):
    depth, road = ground(1000)
    meters = np.where(depth > 0, depth / 1000, 1000.0)
    whole = np.round(meters / 1000 * (256**3 - 1)).astype(np.int64)
    coded = np.stack([whole % 256, whole // 256 % 256, whole // 65536], -1).astype(np.uint8)
    for top in [root / "train", root / "test"] if kind == "r2d" else [root]:
        for i in range(2):
            save(top / f"rgb/{i}.png", picture())
            save(top / f"depth/{i}.png", coded)
            save(top / f"label/{i}.png", colored(road, (7, 0, 0), (1, 0, 0)))
    (root / "intrinsics.txt").write_text("30 30 19.5 8")
    return f"{kind}:{root}"


LAYOUTS = {"kitti-road": kitti, "orfd": orfd, "vkitti2": vkitti2, "synthia": synthia, "carla": carla}
LAYOUTS["r2d"] = lambda root: carla(root, "r2d")


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_pictures_meters_cameras_and_labels(tmp_path, make):
    scenes = load_scenes(make(tmp_path))
    item, said = scenes.checked(0)
    assert said == []
    assert item.rgb.shape == (H, W, 3)
    v = np.arange(H)[:, None] - 8
    wanted = np.where(v > 0, 48 / np.maximum(v, 1), 0)
    assert np.abs(item.depth - wanted).max() < 0.006
    assert item.intrinsics.tolist() == [[30, 0, 19.5], [0, 30, 8], [0, 0, 1]]
    assert np.array_equal(scenes.label(0), np.broadcast_to(v > 2, (H, W)))


def test_virtual_kittis_archives_may_lie_side_by_side(tmp_path):
    vkitti2(tmp_path)
    for part in ("rgb", "depth", "classSegmentation"):
        new = tmp_path / f"vkitti_2.0.3_{part}/Scene01/clone/frames"
        new.mkdir(parents=True)
        (tmp_path / f"Scene01/clone/frames/{part}").rename(new / part)
    (tmp_path / "vkitti_2.0.3_textgt/Scene01/clone").mkdir(parents=True)
    (tmp_path / "Scene01/clone/intrinsic.txt").rename(tmp_path / "vkitti_2.0.3_textgt/Scene01/clone/intrinsic.txt")
    scenes = load_scenes(f"vkitti2:{tmp_path}")
    assert scenes.item(0).depth.max() == pytest.approx(48)
    assert scenes.item(0).intrinsics[0, 0] == 30
    assert scenes.label(0).any()


def test_kittis_parts_are_fixed_by_the_sorted_names_and_289_give_173_58_58(tmp_path):
    data = kitti(tmp_path, 10)
    assert [len(load_scenes(data, SceneReading(split=s))) for s in ("train", "val", "test", "all")] == [6, 2, 2, 10]
    for i in range(10, 289):
        (tmp_path / f"training/image_2/zz_{i:06d}.png").write_bytes(b"")
        (tmp_path / f"training/depth_u16/zz_{i:06d}.png").write_bytes(b"")
    parts = [r.part for r in _kitti(tmp_path, SceneReading())]
    assert [parts.count(p) for p in ("train", "val", "test")] == [173, 58, 58]


def test_kittis_testing_folder_has_no_labels_and_the_calibration_gives_the_view_from_above(tmp_path):
    kitti(tmp_path)
    (tmp_path / "training").rename(tmp_path / "testing")
    for file in (tmp_path / "testing/gt_image_2").iterdir():
        file.unlink()
    scenes = load_scenes(f"kitti-road:{tmp_path / 'testing'}")
    assert len(scenes) == 10
    assert not scenes.has_label(0)
    assert scenes.road(0).shape == (3, 3)


def test_orfd_parts_are_its_folders(tmp_path):
    data = orfd(tmp_path)
    assert [len(load_scenes(data, SceneReading(split=s))) for s in ("train", "test")] == [2, 2]
    with pytest.raises(UserError, match="no part 'val': it has test, train"):
        load_scenes(data, SceneReading(split="val"))


def manifest(root, header, *rows):
    (root / "m.csv").write_text("\n".join([header, *rows]) + "\n")
    return f"manifest:{root / 'm.csv'}"


def test_a_manifest_states_units_cameras_and_parts_row_by_row(tmp_path):
    depth, road = ground(1000)
    save(tmp_path / "a.png", picture())
    save(tmp_path / "d.png", depth)
    save(tmp_path / "l.png", road.astype(np.uint8))
    (tmp_path / "k.yaml").write_text("fx: 30.0\nfy: 30.0\ncx: 19.5\ncy: 8.0\n")
    header = "name,rgb,depth,label,split,depth_unit,fx,fy,cx,cy,calibration"
    data = manifest(
        tmp_path,
        header,
        "one,a.png,d.png,l.png,train,mm,30,30,19.5,8,",
        "two,a.png,d.png,,test,mm,,,,,k.yaml",
        "three,,d.png,,train,mm,30,30,19.5,8,",
    )
    with pytest.warns(UserWarning, match="m.csv: 1 scenes have one modality alone, the first: three"):
        scenes = load_scenes(data)
    assert [scenes.name(i) for i in range(2)] == ["one", "three"]
    assert scenes.item(0).depth.max() == 48
    assert scenes.item(1).rgb is None
    assert scenes.label(0).sum() == road.sum()
    with pytest.warns(UserWarning, match="one modality alone"):
        assert load_scenes(data, SceneReading(split="test")).item(0).intrinsics[0, 0] == 30


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        ("rgb,dept", "a.png,d.png", "unknown column 'dept'"),
        ("name", "a", "no column rgb or depth"),
        ("rgb,depth", "a.png,d.png", "no depth_unit"),
        ("rgb,depth,depth_unit", "a.png,d.png,inches", "depth_unit 'inches', expected one of m, cm"),
        ("rgb,depth,depth_unit", "a.png,no.png,mm", "row 2, depth: no such file"),
        ("rgb,depth,depth_unit", "../a.png,d.png,mm", "leads outside"),
        ("rgb,depth,depth_unit,fx,fy,cx,cy", "a.png,d.png,mm,30,30,x,8", "could not convert"),
        ("rgb,depth,depth_unit,split", "a.png,d.png,mm,holdout", "split 'holdout'"),
        ("rgb,depth,depth_unit", "a.png", "expected 3 columns"),
        ("rgb,depth,depth_unit", ",,", "neither rgb nor depth"),
        ("rgb,palette", "a.png,cityscape", "palette 'cityscape', expected one of binary"),
        ("rgb,depth,depth_unit,ray", "a.png,d.png,mm,x", "ray 'x', expected true or false"),
    ],
)
def test_a_faulty_manifest_is_refused_with_its_row(tmp_path, header, row, told):
    save(tmp_path / "a.png", picture())
    save(tmp_path / "d.png", ground(1000)[0])
    with pytest.raises(UserError, match=told):
        load_scenes(manifest(tmp_path, header, row))


def test_a_camera_that_nobody_gave_is_asked_for(tmp_path):
    save(tmp_path / "a.png", picture())
    save(tmp_path / "d.png", ground(1000)[0])
    scenes = load_scenes(manifest(tmp_path, "rgb,depth,depth_unit", "a.png,d.png,mm"))
    with pytest.raises(UserError, match="--reading.intrinsics fx,fy,cx,cy"):
        scenes.item(0)


def test_orphans_are_named_refused_when_most_and_warned_about_when_few(tmp_path):
    data = kitti(tmp_path)
    (tmp_path / "training/depth_u16/um_000000.png").unlink()
    with pytest.warns(UserWarning, match="1 scenes have one modality alone, the first: um_000000"):
        scenes = load_scenes(data)
    assert scenes.item(0).depth is None
    for path in (tmp_path / "training/depth_u16").iterdir():
        path.rename(path.with_name("x" + path.name))
    with pytest.raises(UserError, match="have a picture or a depth alone, the first: um_000000, um_000003, um_000006"):
        load_scenes(data)


def test_a_folder_without_any_depth_is_said(tmp_path):
    data = kitti(tmp_path)
    for path in (tmp_path / "training/depth_u16").iterdir():
        path.rename(path.with_suffix(".exr"))
    with pytest.warns(UserWarning, match="no depth .* was found: pictures alone are used"):
        load_scenes(data)


def test_a_folder_its_parent_and_a_manifest_of_it_are_one_place(tmp_path):
    data = kitti(tmp_path)
    whole = load_scenes(data, SceneReading(split="all"))
    assert same_place(whole, load_scenes(f"{data}/training", SceneReading(split="all")))
    listed = manifest(tmp_path, "rgb", "training/image_2/um_000000.png")
    assert same_place(whole, load_scenes(listed))
    other = manifest(tmp_path, "rgb", "training/gt_image_2/um_road_000000.png")
    assert not same_place(whole, load_scenes(other))


def test_an_empty_folder_and_a_folder_of_another_layout_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected the folder image_2"):
        load_scenes(f"kitti-road:{tmp_path}")
    with pytest.raises(UserError, match="no pictures in the layout of orfd"):
        load_scenes(f"orfd:{tmp_path}")
    with pytest.raises(UserError, match="expected the folder RGB"):
        load_scenes(f"synthia:{tmp_path}")
    with pytest.raises(UserError, match="roads-real"):
        load_scenes("roads-rael")


def test_the_users_ids_and_the_field_of_view_replace_what_the_layout_has(tmp_path):
    data = carla(tmp_path)
    (tmp_path / "intrinsics.txt").unlink()
    scenes = load_scenes(data, SceneReading(road_ids=[1], fov=67.38))
    assert (scenes.label(0) == 1).sum() == (~ground(1)[1]).sum()
    assert scenes.item(0).intrinsics[0, 0] == pytest.approx(30, abs=0.01)


def test_a_limit_takes_pictures_evenly(tmp_path):
    data = kitti(tmp_path)
    found = load_scenes(data, SceneReading(split="all", limit=3))
    assert len({r.name for r in found.records}) == 3
    assert found.name(0) == "um_000000"


def test_unlabeled_scenes_give_everything_but_their_labels():
    scenes = rendered("roads-flat", SceneReading(scenes=1, size=(64, 32)))
    hidden = Unlabeled(scenes)
    assert np.array_equal(hidden.item(0).rgb, scenes.item(0).rgb)
    with pytest.raises(AssertionError, match="training without target labels"):
        hidden.label(0)


def test_parts_of_a_rendered_world_are_different_scenes():
    reading = SceneReading(scenes=1, size=(64, 32))
    train, test = rendered("roads-real", reading), rendered("roads-real", reading, "test")
    assert not np.array_equal(train.item(0).rgb, test.item(0).rgb)
