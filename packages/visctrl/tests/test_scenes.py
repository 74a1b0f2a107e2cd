"""Scenes in files: read, written with other pictures, and read again by their own libraries."""

import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from visctrl.scenes import read_scene
from visctrl.viewset import ORIENTATION, read_view, stored_size, upright_mask
from visctrl_scenes import HEIGHT, WIDTH, colmap, nerfstudio, photo, pose

from tenfold import UserError
from tenfold.readers import read_image


def blackened(scene):
    """Each view's picture with its upper half black."""
    out = {}
    for view in scene.views:
        out[view.name] = read_view(view).copy()
        out[view.name][: len(out[view.name]) // 2] = 0
    return out


def written(scene, folder):
    pictures = blackened(scene)
    scene.write(folder, pictures, "edited in a test")
    return pictures


def test_a_nerfstudio_scene_is_written_with_new_pictures_and_the_same_cameras_masks_and_points(tmp_path):
    root = nerfstudio(tmp_path / "ns")
    scene = read_scene(f"nerfstudio:{root}")
    assert (len(scene.views), scene.cameras, list(scene.remarks)) == (4, 2, [])
    pictures = written(scene, tmp_path / "new")
    assert (tmp_path / "new/transforms.json").read_bytes() == (root / "transforms.json").read_bytes()
    content = json.loads((tmp_path / "new/transforms.json").read_text())
    for frame in content["frames"]:
        picture = read_image(tmp_path / "new" / frame["file_path"])
        w, h = (frame.get(side, content[side]) for side in "wh")
        assert picture.shape == (h, w, 3)
        assert np.array_equal(picture, pictures[frame["file_path"]])
        assert (tmp_path / "new" / frame["mask_path"]).read_bytes() == (root / frame["mask_path"]).read_bytes()
    assert (tmp_path / "new" / content["ply_file_path"]).is_file()
    again = read_scene(f"nerfstudio:{tmp_path / 'new'}")
    assert [view.name for view in again.views] == [view.name for view in scene.views]


@pytest.mark.parametrize(
    ("model", "text"),
    [("sparse/0", False), ("colmap/sparse/0", True), (".", False), ("distorted/sparse/0", False)],
)
def test_a_colmap_scene_is_written_with_new_pictures_and_a_model_that_pycolmap_reads_alike(tmp_path, model, text):
    import pycolmap

    root = colmap(tmp_path / "cm", model=model, text=text)
    scene = read_scene(f"colmap:{root}", reconstruction=model if "distorted" in model else None)
    assert (len(scene.views), scene.cameras) == (4, 2)
    pictures = written(scene, tmp_path / "new")
    before, after = (pycolmap.Reconstruction(str(x / model)) for x in (root, tmp_path / "new"))
    assert {i: x.name for i, x in after.images.items()} == {i: x.name for i, x in before.images.items()}
    for i, image in after.images.items():
        assert np.array_equal(image.cam_from_world().matrix(), before.images[i].cam_from_world().matrix())
        camera = after.cameras[image.camera_id]
        assert (camera.model.name, list(camera.params)) == (
            before.cameras[image.camera_id].model.name,
            list(before.cameras[image.camera_id].params),
        )
        picture = read_image(tmp_path / "new/images" / image.name)
        assert picture.shape == (camera.height, camera.width, 3)
        assert np.array_equal(picture, pictures[f"images/{image.name}"])
    assert len(after.points3D) == 1


def test_pictures_that_a_scene_names_and_that_are_not_there_are_refused_or_left_out_by_name(tmp_path):
    import pycolmap

    root = nerfstudio(tmp_path / "ns")
    (root / "images/frame_00002.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 views .*--missing leave_out.*frame_00002.png: the picture of frame 1"):
        read_scene(f"nerfstudio:{root}")
    with pytest.warns(UserWarning, match="frame_00002.png is left out: the picture of frame 1 is not there"):
        scene = read_scene(f"nerfstudio:{root}", missing="leave_out")
    written(scene, tmp_path / "new")
    content = json.loads((tmp_path / "new/transforms.json").read_text())
    before = json.loads((root / "transforms.json").read_text())
    assert content["frames"] == [frame for frame in before["frames"] if "00002" not in frame["file_path"]]
    assert content["train_filenames"] == ["images/frame_00001.png", "images/frame_00003.png"]
    assert {k: content[k] for k in ("fl_x", "k1", "w")} == {k: before[k] for k in ("fl_x", "k1", "w")}

    for text in (False, True):
        root = colmap(tmp_path / f"cm{text}", text=text)
        (root / "images/front/view_2.png").unlink()
        with pytest.raises(UserError, match=r"1 of 4 views .*front/view_2.png: no such file in images"):
            read_scene(f"colmap:{root}")
        with pytest.warns(UserWarning, match="front/view_2.png is left out"):
            scene = read_scene(f"colmap:{root}", missing="leave_out")
        written(scene, tmp_path / f"new{text}")
        after = pycolmap.Reconstruction(str(tmp_path / f"new{text}/sparse/0"))
        before = pycolmap.Reconstruction(str(root / "sparse/0"))
        assert sorted(x.name for x in after.images.values()) == [f"front/view_{i}.png" for i in (1, 3, 4)]
        for i, image in after.images.items():
            assert np.array_equal(image.cam_from_world().matrix(), before.images[i].cam_from_world().matrix())
        assert len(after.points3D) == 1
        assert (tmp_path / f"new{text}/sparse/0/images.txt").is_file() == text


def test_frames_without_extension_with_backslashes_absolute_paths_or_no_pose_are_understood_or_named(tmp_path):
    root = nerfstudio(tmp_path / "ns")
    content = json.loads((root / "transforms.json").read_text())
    frames = content["frames"]
    frames[0]["file_path"] = "./images/frame_00001"  # as of Blender's data sets
    frames[1]["file_path"] = "images\\frame_00002.png"  # written on Windows
    frames[1]["mask_path"] = "masks\\frame_00002.png"
    frames[2]["file_path"] = str(root / "images/frame_00003.png")
    frames[3]["transform_matrix"] = None  # not placed
    frames.append(dict(frames[0]))  # one picture twice
    (root / "transforms.json").write_text("\ufeff" + json.dumps(content))
    with pytest.warns(UserWarning, match="frame_00004.png is left out: frame 3 has no pose"):
        scene = read_scene(f"nerfstudio:{root}", missing="leave_out")
    assert [view.name for view in scene.views] == [f"images/frame_0000{i}.png" for i in (1, 2, 3)]
    assert [view.mask.name for view in scene.views] == [f"frame_0000{i}.png" for i in (1, 2, 3)]
    written(scene, tmp_path / "new")
    new = json.loads((tmp_path / "new/transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in new] == [
        "./images/frame_00001",
        "images/frame_00002.png",
        "images/frame_00003.png",
        "./images/frame_00001",
    ]
    assert new[1]["mask_path"] == "masks/frame_00002.png"
    assert len(read_scene(f"nerfstudio:{tmp_path / 'new'}").views) == 3


def test_one_file_for_each_of_train_val_and_test_is_a_scene(tmp_path):
    root = tmp_path / "blender"
    for part in ("train", "val", "test"):
        (root / part).mkdir(parents=True)
        frames = []
        for i in range(2):
            clear = np.dstack([photo(i, 16, 16), np.zeros((16, 16), np.uint8)])
            clear[4:12, 4:12, 3] = [128, 255, 255, 255, 255, 255, 255, 128]
            Image.fromarray(clear).save(root / f"{part}/r_{i}.png")
            frames.append({"file_path": f"./{part}/r_{i}", "rotation": 0.1, "transform_matrix": pose(i)})
        (root / f"transforms_{part}.json").write_text(json.dumps({"camera_angle_x": 0.69, "frames": frames}))
    scene = read_scene(f"nerfstudio:{root}")
    assert len(scene.views) == 6
    scene.write(tmp_path / "new", {view.name: read_view(view) for view in scene.views}, "unchanged")
    for view in scene.views:
        before, after = np.asarray(Image.open(view.path)), np.asarray(Image.open(tmp_path / "new" / view.name))
        assert np.array_equal(after[..., 3], before[..., 3])
        assert np.abs(after.astype(int) - before).max() <= 1  # what half transparent pixels lose to eight bits
    assert sorted(p.name for p in (tmp_path / "new").glob("*.json")) == sorted(p.name for p in root.glob("*.json"))


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_picture_turned_by_the_cameras_tag_is_edited_upright_and_written_as_it_was_stored(tmp_path, tag):
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    stored = photo(3)
    (tmp_path / "in").mkdir()
    Image.fromarray(stored).save(tmp_path / "in/a.png", exif=exif)
    (view,) = read_scene(f"folder:{tmp_path / 'in'}").views
    upright = read_view(view)
    assert upright.shape[:2] == ((WIDTH, HEIGHT) if tag >= 5 else (HEIGHT, WIDTH))
    assert stored_size(view) == (WIDTH, HEIGHT)
    assert np.allclose(upright_mask(stored[..., 0] / 255, view), upright[..., 0] / 255, atol=1e-6)
    read_scene(f"folder:{tmp_path / 'in'}").write(tmp_path / "out", {"a.png": upright}, "unchanged")
    new = Image.open(tmp_path / "out/a.png")
    assert new.getexif().get(ORIENTATION, 1) == tag
    assert np.array_equal(np.asarray(new), stored)
    assert np.array_equal(read_image(tmp_path / "out/a.png"), upright)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "ppm"])
def test_a_picture_keeps_its_format_and_its_notes_say_that_it_was_edited(tmp_path, suffix):
    (tmp_path / "in").mkdir()
    Image.fromarray(photo(1)).save(tmp_path / f"in/a.{suffix}")
    scene = read_scene(f"folder:{tmp_path / 'in'}")
    picture = photo(2)
    scene.write(tmp_path / "out", {f"a.{suffix}": picture}, "edited")
    new = Image.open(tmp_path / f"out/a.{suffix}")
    assert new.format == Image.open(tmp_path / f"in/a.{suffix}").format
    error = np.abs(np.asarray(new.convert("RGB")).astype(int) - picture)
    assert error.max() == 0 or (suffix == "jpg" and error.max() < 12)
    if suffix in {"jpg", "png"}:
        assert "edited" in str(new.info.get("comment", new.info.get("Comment")))


def test_several_models_and_pictures_without_a_pose_are_said(tmp_path):
    root = colmap(tmp_path / "cm")
    shutil.copytree(root / "sparse/0", root / "sparse/1")
    Image.fromarray(photo(0)).save(root / "images/left.png")
    scene = read_scene(f"colmap:{root}")
    assert [remark.partition(" ")[2] for remark in scene.remarks] == [
        "holds further models, 1 (4 pictures): 0 (4 pictures) was taken; --reconstruction names another",
        f"pictures in {root / 'images'} have no pose in the model and are not written",
    ]
    assert read_scene(f"colmap:{root}", reconstruction="sparse/1").model == "sparse/1"


def test_masks_beside_colmaps_pictures_are_taken_by_the_pictures_whole_name(tmp_path):
    root = colmap(tmp_path / "cm", names="{}/view.jpg")
    for i in (1, 2):
        (root / f"masks/{i}").mkdir(parents=True)
        Image.fromarray(np.full((HEIGHT, WIDTH), 255 * (i - 1), np.uint8)).save(root / f"masks/{i}/view.jpg.png")
    scene = read_scene(f"colmap:{root}")
    assert [view.mask and view.mask.parent.name for view in scene.views] == ["1", "2", None, None]
    written(scene, tmp_path / "new")
    assert (tmp_path / "new/masks/2/view.jpg.png").is_file()


def test_a_folders_pictures_come_in_the_order_of_their_numbers_and_what_is_none_is_said(tmp_path):
    for name in ("v10.png", "v2.png", "b/v1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(0)).save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("x")
    scene = read_scene(f"folder:{tmp_path / 'in'}")
    assert [view.name for view in scene.views] == ["b/v1.png", "v2.png", "v10.png"]
    assert len(scene.remarks) == 1


def test_pictures_in_folders_that_are_links_are_found_and_a_link_to_itself_ends(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "scene").mkdir()
    Image.fromarray(photo(0)).save(tmp_path / "raw/a.png")
    (tmp_path / "scene/images").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/again").symlink_to(tmp_path / "scene")
    assert [view.name for view in read_scene(f"folder:{tmp_path / 'scene'}").views] == ["images/a.png"]


def test_what_is_no_scene_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = colmap(tmp_path / "nothing")
    shutil.rmtree(nothing / "images")
    broken = colmap(tmp_path / "broken")
    (broken / "sparse/0/images.bin").write_bytes((broken / "sparse/0/images.bin").read_bytes()[:40])
    unplaced = colmap(tmp_path / "unplaced", text=True)
    (unplaced / "sparse/0/images.txt").write_text("")
    outside = nerfstudio(tmp_path / "outside")
    content = json.loads((outside / "transforms.json").read_text())

    def changed(name, **changes):
        folder = tmp_path / name
        shutil.copytree(outside, folder)
        (folder / "transforms.json").write_text(json.dumps(content | changes))
        return f"nerfstudio:{folder}"

    frame = content["frames"][0]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/transforms.json").write_text('{"frames": [')
    cases = {
        "scene:x": "unknown kind 'scene'",
        f"colmap:{tmp_path / 'none'}": "no such file or folder",
        f"nerfstudio:{tmp_path / 'empty'}": "no transforms.json",
        f"colmap:{tmp_path / 'empty'}": "no COLMAP model",
        f"folder:{tmp_path / 'empty'}": "no picture is there",
        f"colmap:{nothing}": "no folder images",
        f"colmap:{broken}": "COLMAP cannot read this model",
        f"colmap:{unplaced}": "the model has placed no pictures",
        f"nerfstudio:{tmp_path / 'bad'}": "not a file of JSON",
        changed("a", frames=[]): "at least one frame",
        changed("b", frames=[{"transform_matrix": pose(0)}]): "expected a 'file_path'",
        changed("c", frames=[frame | {"file_path": "../x.png"}]): "leads out of the scene's folder",
        changed(
            "g", frames=[frame | {"file_path": "./..\\nerf_dataset\\rgb/000013.png"}]
        ): "leads out of the scene's folder",
        changed("d", frames=[frame | {"file_path": "C:\\scans\\x.png"}]): "leads out of the scene's folder",
        changed("e", frames=[frame | {"mask_path": "/etc/passwd"}]): "mask_path: /etc/passwd leads out",
        changed("f", frames=[frame | {"transform_matrix": [[float("nan")] * 4] * 4}]): "has no pose",
    }
    for source, said in cases.items():
        with warnings.catch_warnings(), pytest.raises(UserError) as caught:
            warnings.simplefilter("error")
            read_scene(source)
        assert said in str(caught.value), source
        assert "\n" not in str(caught.value)
