"""Lists, ids, landmark files and pictures as they come from spreadsheets, phones and other tools."""

import csv
import json
import warnings

import numpy as np
import pytest
from handmstn.config import HandReading
from handmstn.data import load, with_landmark_files
from handmstn.landmarks import read_json, read_mat
from handmstn.lists import bare
from handmstn.parts import landmarks_21, preset
from PIL import Image
from scipy.io import savemat

from tenfold import UserError

PLAIN = HandReading(size=32)
PALM = preset("eeprnet")
SPOTS = (landmarks_21() + 1) / 2


@pytest.fixture
def folder(tmp_path):
    """Pictures under names with spaces and commas."""
    for name in ("a.png", "my pics/b c.png", "my pics/d, e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (200, 120, 90)).save(tmp_path / name)
    return tmp_path


def listed_as(folder, text, kind="list", reading=PLAIN, parts=()):
    path = folder / f"l.{kind}"
    path.write_bytes(text.encode("utf-8"))
    return load(f"{kind}:{path}", reading, parts)


@pytest.mark.parametrize(
    ("line", "person"),
    [
        ("my pics/b c.png\t0012", "0012"),
        ("my pics/b c.png \t 0012\t", "0012"),
        ("my pics/b c.png\tP07 left hand", "P07 left hand"),
        ('"my pics/d, e.png" 0012', "0012"),
        ("'my pics/d, e.png' 0012", "0012"),
        ("my pics/b c.png   0012  ", "0012"),
        ("a.png\u00a00012\u00a0", "0012"),
        ("\ufeffa.png 0012\u200b", "0012"),
        ("my pics\\b c.png 0012", "0012"),
        ("a.png 0012\r", "0012"),
    ],
)
def test_a_line_of_path_and_label_in_every_writing(folder, line, person):
    assert listed_as(folder, f"{line}\n").persons.tolist() == [person]


def test_lines_that_cannot_be_read_are_named_by_their_number(folder):
    for line, message in (
        ("a.png", r"row 2: expected 'path label', found 'a\.png'"),
        ("C:\\Users\\x\\a.png 3", r"row 2: no such picture: C:\\Users\\x\\a\.png: paths of another machine"),
        ("a.png,3", "row 2: expected 'path label'"),
    ):
        with pytest.raises(UserError, match=message):
            listed_as(folder, f"a.png 1\n{line}\n")


def test_a_spreadsheets_first_line_decimal_commas_and_quoted_cells_are_read(folder):
    names = ";".join(f"x{n};y{n}" for n in range(1, 10))
    values = ";".join(f"{n},5;{n},25" for n in range(9))
    text = (
        f'\ufeffsep=;\r\nPath;\u00a0ID ;Side;{names}\r\n"my pics/d, e.png";0012;Left hand;{values}\r\n;;;{";" * 17}\r\n'
    )
    hands = listed_as(folder, text, "csv", parts=PALM)
    assert hands.classes.tolist() == ["0012:left"]
    assert hands.rows.tolist() == [3]
    pixels = np.asarray([[n + 0.5, n + 0.25] for n in range(9)])
    expected = (pixels - [19.5, 14.5]) / 19.5
    assert np.allclose(hands.points[0, 0], expected[2] * [-1, 1], atol=1e-5)  # mirrored, as left hands are


def test_tabs_part_columns_and_a_comma_is_then_part_of_a_path(folder):
    hands = listed_as(folder, "path\tid\nmy pics/d, e.png\t7\n", "csv")
    assert hands.names.tolist() == ["my pics/d, e.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,id,ID\na.png,1,2\n", "two columns are called 'id'"),
        ("path,id,x1,y1,x3,y3\na.png,1,2,3,4,5\n", "no x2, expected x1, y1 to x3, y3"),
        ("path,id,x1,y1,y2\na.png,1,2,3,4\n", "there is y2 but no x2"),
        ("path,id\n\u00a0,1\n", "row 2: the path is empty"),
        ("path,id\na.png,\u200b\n", "row 2: the id is empty"),
        ("\npath,id\na.png,1\n", "its first line is empty, expected path, id"),
        ('path,id\n"a.png,1\n', "row 2: expected 2 columns, found 1"),
    ],
)
def test_faults_of_a_table_are_named(folder, text, message):
    with pytest.raises(UserError, match=message):
        listed_as(folder, text, "csv")


def test_a_broken_picture_is_named_by_its_line_also_after_rows_that_were_left_out(folder):
    (folder / "bad.png").write_text("no picture")
    text = "path,id\nnone.png,1\n\na.png,1\nbad.png,2\n"
    with pytest.raises(UserError, match=r"row 5: .*bad\.png"):
        listed_as(folder, text.replace("none.png,1\n", "a.png,1\n"), "csv")
    with pytest.warns(UserWarning, match="2 rows left out"):
        hands = listed_as(folder, text, "csv", HandReading(size=32, skip_bad=True))
    assert [line.split(":")[0].split(",")[-1].strip() for line in hands.skipped] == ["row 2", "row 5"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("0012", "12"), "'0012' and '12'"),
        (("P07_L", "p07_l"), "'P07_L' and 'p07_l'"),
        (("Anna M", "Anna\u00a0M"), "Anna"),
        (("s01", "s001"), "'s001' and 's01'"),
        (("P07_L", "P07_R"), "seem to tell the side"),
        (("3-left", "3-RIGHT"), "seem to tell the side"),
    ],
)
def test_ids_that_are_easily_mixed_up_are_warned_of_and_kept_apart(folder, ids, message):
    with pytest.warns(UserWarning, match=message):
        hands = listed_as(folder, f"path,id\na.png,{ids[0]}\nmy pics/b c.png,{ids[1]}\n", "csv")
    assert hands.persons.tolist() == list(ids)


@pytest.mark.parametrize("ids", [("100", "10"), ("P07", "P70"), ("Class3", "Class30"), ("a_L", "b_L")])
def test_ids_that_are_told_apart_are_not_warned_of(folder, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listed_as(folder, f"path,id\na.png,{ids[0]}\nmy pics/b c.png,{ids[1]}\n", "csv")


def test_a_picture_that_two_people_share_is_warned_of(folder):
    with pytest.warns(UserWarning, match=r"a\.png for '1' and '2'"):
        listed_as(folder, "path,id\na.png,1\na.png,2\n", "csv")


def test_what_nobody_sees_around_a_cell_is_taken_off():
    assert bare("\ufeff \u200b\u00a0 x\u00a0y \u2060\t") == "x\u00a0y"


def test_pictures_of_phones_that_are_not_read_are_counted_and_named(folder):
    root = folder / "people"
    for person in ("1", "2"):
        (root / person).mkdir(parents=True)
        (root / person / "IMG_1.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(UserError, match=r"no picture in it that can be read: 2 HEIC \(such as IMG_1\.HEIC\)"):
        load(f"imagefolder:{root}", PLAIN)
    Image.new("RGB", (9, 9)).save(root / "1/a.jpg")
    with pytest.warns(UserWarning, match="not read: 2 HEIC"):
        assert len(load(f"imagefolder:{root}", PLAIN)) == 1
    (folder / "l.txt").write_text("people/1/IMG_1.HEIC 1\n")
    with pytest.raises(UserError, match=r"row 1: .*IMG_1\.HEIC: cannot be decoded"):
        load(f"list:{folder / 'l.txt'}", PLAIN)


def test_cmyk_alpha_palette_and_deep_pictures_have_the_colors_that_a_viewer_shows(tmp_path):
    skin = (200, 120, 90)
    plain = Image.new("RGB", (32, 32), skin)
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.new("RGBA", (32, 32), (*skin, 0)).save(tmp_path / "alpha.png")
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("LA", (32, 32), (90, 255)).save(tmp_path / "la.png")
    names = ("cmyk.jpg", "alpha.png", "palette.gif", "deep.png", "la.png")
    (tmp_path / "l.txt").write_text("".join(f"{n} 1\n" for n in names))
    found = load(f"list:{tmp_path / 'l.txt'}", PLAIN).images[:, :, 16, 16].tolist()
    for color, expected in zip(found, (skin, (255,) * 3, skin, (156,) * 3, (90,) * 3), strict=True):
        assert np.abs(np.asarray(color) - expected).max() <= 4


def test_unit_points_reach_from_edge_to_edge_of_a_picture_that_is_no_square(folder):
    corners = [(-1, -1), (1, -1), (-1, 1), (1, 1)] + [(0, 0)] * 5
    with (folder / "l.csv").open("w", newline="") as file:
        names = [f"{axis}{n}" for n in range(1, 10) for axis in "xy"]
        csv.writer(file).writerows([["path", "id", *names], ["a.png", "1", *(v for p in corners for v in p)]])
    hands = load(f"csv:{folder / 'l.csv'}", HandReading(size=32, points="unit"), PALM)
    assert np.allclose(hands.points[0, :4], np.asarray(corners[:4]) * [1, 29 / 39], atol=1e-5)


# Landmark files


def mediapipe(scale=1.0):
    return [{"x": float(x) * scale, "y": float(y) * scale, "z": 0.0, "visibility": 0.0} for x, y in SPOTS]


def read(tmp_path, content, **how):
    (tmp_path / "m.json").write_text(json.dumps(content), encoding="utf-8-sig")
    return read_json(tmp_path / "m.json", **how)


@pytest.mark.parametrize(
    ("content", "unit"),
    [
        ({"multiHandLandmarks": [mediapipe()], "multiHandedness": [{"label": "Left", "score": 0.9}]}, "share"),
        ({"landmarks": [mediapipe()], "worldLandmarks": [mediapipe(0.1)], "handednesses": [["Right"]]}, "share"),
        ({"hand_world_landmarks": [mediapipe(0.1)], "hand_landmarks": [mediapipe()]}, "share"),
        ([{"landmark": mediapipe()}], "share"),
        ([{"keypoints": [{**p, "name": "wrist"} for p in mediapipe(300)], "handedness": "Left", "score": 1}], "pixels"),
        ([{"keypoints": (SPOTS * 300).tolist(), "keypoint_scores": [1.0] * 21, "bbox": [[0, 0, 300, 300]]}], "pixels"),
        ({"instance_info": 1, "instances": [{"keypoints": (SPOTS * 300).tolist()}]}, "pixels"),
    ],
)  # fmt: skip
def test_further_forms_of_landmarks_have_the_unit_that_they_say(tmp_path, content, unit):
    found = read(tmp_path, content)
    assert (found.unit, found.side) == (unit, "unknown")
    assert np.allclose(found.points, SPOTS * (300 if unit == "pixels" else 1))


def test_zeros_that_a_protocol_buffer_leaves_out_are_zeros(tmp_path):
    spots = mediapipe()
    del spots[0]["x"], spots[3]["y"]
    found = read(tmp_path, {"landmark": spots})
    assert found.points[0, 0] == 0
    assert found.points[3, 1] == 0


def test_pixels_where_shares_are_expected_are_refused_until_they_are_said_to_be_pixels(tmp_path):
    old = {"landmarks": [[*map(float, p), -3.0] for p in SPOTS * 300], "boundingBox": {}}
    with pytest.raises(UserError, match="expected shares of the picture, 0 to 1; --unit pixels"):
        read(tmp_path, old)
    assert read(tmp_path, old, unit="pixels").unit == "pixels"


def test_world_landmarks_alone_are_refused_as_meters(tmp_path):
    with pytest.raises(UserError, match="world landmarks are in meters"):
        read(tmp_path, {"hand_world_landmarks": [mediapipe(0.1)]})


def test_pictures_of_one_name_have_the_landmarks_of_the_folder_of_theirs_name(tmp_path):
    for person, shift in (("1", 0.0), ("2", 0.2)):
        (tmp_path / "p" / person).mkdir(parents=True)
        Image.new("RGB", (50, 50)).save(tmp_path / f"p/{person}/00.png")
        (tmp_path / "m" / person).mkdir(parents=True)
        marks = [{"x": float(x) + shift, "y": float(y)} for x, y in SPOTS]
        (tmp_path / f"m/{person}/00.json").write_text(json.dumps(marks))
    hands = load(f"imagefolder:{tmp_path / 'p'}", PLAIN)
    found = with_landmark_files(hands, tmp_path / "m", "json", PALM)
    assert np.allclose(found.points[1] - found.points[0], [0.4, 0], atol=0.02)
    (tmp_path / "m/1/00.json").rename(tmp_path / "m/00.json")
    with pytest.raises(UserError, match=r"2 files 00\.json for 2 pictures of that name"):
        with_landmark_files(hands, tmp_path / "m", "json", PALM)
    with pytest.raises(UserError, match="expected a folder with one .json file per picture"):
        with_landmark_files(hands, tmp_path / "m/00.json", "json", PALM)


def test_landmarks_of_a_picture_of_another_size_are_refused(tmp_path):
    (tmp_path / "p/1").mkdir(parents=True)
    Image.new("RGB", (50, 50)).save(tmp_path / "p/1/a.png")
    (tmp_path / "a.json").write_text(json.dumps({"hand_pts": (SPOTS * 4000).tolist()}))
    with pytest.raises(UserError, match="made for another size of it"):
        with_landmark_files(load(f"imagefolder:{tmp_path / 'p'}", PLAIN), tmp_path, "json", PALM)


def test_the_predecessors_numbers_as_two_columns_or_two_rows_mean_the_same(tmp_path):
    x, y = (v.ravel(order="F") for v in np.meshgrid([-0.5, 0, 0.5], [-0.4, 0.1, 0.6]))
    flat = np.concatenate([x, y])
    found = []
    for name, value in (("flat", flat), ("columns", np.stack([x, y], 1)), ("rows", np.stack([x, y]))):
        savemat(tmp_path / f"{name}.mat", {"thetaTps": value})
        found.append(read_mat(tmp_path / f"{name}.mat").points)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    savemat(tmp_path / "old.mat", {"thetaTps": flat}, format="4")
    assert np.array_equal(read_mat(tmp_path / "old.mat").points, found[0])
    savemat(tmp_path / "pixels.mat", {"thetaTps": flat * 100})
    with pytest.raises(UserError, match="expected about -1 to 1"):
        read_mat(tmp_path / "pixels.mat")
    savemat(tmp_path / "cell.mat", {"thetaTps": np.asarray([{"a": 1}] * 18, object)})
    with pytest.raises(UserError, match="18 values of object, expected 18 numbers"):
        read_mat(tmp_path / "cell.mat")
