"""Layouts as people have them, landmark files of other tools, and one line for each fault."""

import csv
import json

import numpy as np
import pytest
import torch
from handmstn.config import HandReading
from handmstn.data import listed, load, with_parts
from handmstn.landmarks import from_columns, read_json, read_mat
from handmstn.lists import as_rows, picture_size
from handmstn.parts import landmarks_21, preset
from handmstn.protocols import check_disjoint, drawn_galleries, first_each, halves, odd_even, strangers
from handmstn.records import letterboxed, to_unit
from handmstn.sampling import people_and_views
from PIL import Image
from scipy.io import savemat

from tenfold import UserError

HAND6 = preset("hand6")
PLAIN = HandReading(size=32)


def picture(path, size=(40, 30), color=(200, 120, 90), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **how)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_folders_of_people_with_sides_and_parts(tmp_path):
    picture(tmp_path / "a/001/left/x.JPG")
    picture(tmp_path / "a/001/Right/x.jpeg")
    picture(tmp_path / "a/002/y.png")
    (tmp_path / "a/.hidden").mkdir()
    picture(tmp_path / "a/.hidden/z.png")
    hands = load(f"imagefolder:{tmp_path / 'a'}", PLAIN)
    assert hands.persons.tolist() == ["001", "001", "002"]
    assert sorted(hands.classes.tolist()) == ["001:left", "001:right", "002"]
    assert hands.guessed.tolist()[2] == "side unknown: taken as a right hand"
    as_person = load(f"imagefolder:{tmp_path / 'a'}", HandReading(size=32, identity="person"))
    assert set(as_person.classes.tolist()) == {"001", "002"}
    picture(tmp_path / "b/gallery/001/x.png")
    picture(tmp_path / "b/query/001/y.png")
    parted = load(f"imagefolder:{tmp_path / 'b'}", PLAIN)
    assert parted.splits.tolist() == ["gallery", "probe"]
    picture(tmp_path / "a/loose.png")
    with pytest.raises(UserError, match="outside of any person's folder"):
        load(f"imagefolder:{tmp_path / 'a'}", PLAIN)


def test_left_hands_are_mirrored_with_their_points_and_mirrored_cameras_exchange_sides(tmp_path):
    image = Image.new("RGB", (32, 32), "black")
    image.putpixel((4, 10), (255, 255, 255))
    image.save(tmp_path / "x.png")
    points = ",".join(f"{n},{n}" for n in range(9))
    names = ",".join(f"x{n},y{n}" for n in range(1, 10))
    for side, where in (("left", 27), ("right", 4)):
        write(tmp_path / "l.csv", f"path,id,side,{names}\nx.png,p,{side},{points}\n")
        hands = load(f"csv:{tmp_path / 'l.csv'}", PLAIN, preset("eeprnet"))
        assert hands.images[0, 0, 10, where] == 255
        expected = to_unit(np.asarray([[n, n] for n in range(9)], float), 32, 32)
        if side == "left":
            expected = expected[[2, 1, 0, 5, 4, 3, 8, 7, 6]] * [-1, 1]
        assert np.allclose(hands.points[0], expected, atol=1e-5)
        turned = load(f"csv:{tmp_path / 'l.csv'}", HandReading(size=32, mirrored=True), preset("eeprnet"))
        assert turned.sides.tolist() == [{"left": "right", "right": "left"}[side]]


def test_pictures_stand_upright_by_the_cameras_tag_and_gray_and_16_bits_are_read(tmp_path):
    for tag in range(1, 9):
        image = Image.new("RGB", (40, 20), "black")
        image.paste((255, 255, 255), (0, 0, 20, 10))
        exif = Image.Exif()
        exif[0x0112] = tag
        image.save(tmp_path / f"{tag}.png", exif=exif)
        assert picture_size(tmp_path / f"{tag}.png") == ((40, 20) if tag < 5 else (20, 40))
    Image.fromarray((np.ones((20, 30)) * 60000).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (20, 30), 90).save(tmp_path / "gray.png")
    lines = "".join(f"{n}.png a\n" for n in ("1", "6", "deep", "gray"))
    hands = load(f"list:{write(tmp_path / 'l.txt', lines)}", PLAIN)
    assert hands.images.shape == (4, 3, 32, 32)
    upright = hands.images[1, 0]
    assert upright[:16, 16:].float().mean() > upright[:16, :16].float().mean()
    assert int(hands.images[2].max()) == 60000 >> 8
    assert int(hands.images[3, 1].max()) == 90


def test_a_letterboxed_picture_and_its_points_fit(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[10, 45] = 255
    square = letterboxed(wide, 61)
    y, x = np.unravel_index(square[0].argmax(), square[0].shape)
    spot = (to_unit(np.asarray([[45.0, 10.0]]), 60, 20)[0] + 1) / 2 * 60
    assert np.abs(spot - [x, y]).max() < 1.0


def test_lists_keep_zeros_and_paths_with_spaces(tmp_path):
    picture(tmp_path / "my hands/a b.BMP")
    picture(tmp_path / "my hands/c.png")
    path = write(tmp_path / "l.txt", "\ufeffmy hands/a b.BMP 007\n\nmy hands/c.png 07\n")
    with pytest.warns(UserWarning, match="'007' and '07'"):
        hands = load(f"list:{path}", PLAIN)
    assert hands.persons.tolist() == ["007", "07"]


def test_a_broken_row_is_named_or_left_out_and_counted(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "b.png", "no picture")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    text = "path,id\na.png,1\nb.png,1\nc.png,2\nd.png,2\n"
    source = f"csv:{write(tmp_path / 'l.csv', text)}"
    with pytest.raises(UserError, match=r"l\.csv, row 5: no such picture: d\.png"):
        load(source, PLAIN)
    with pytest.warns(UserWarning, match="3 rows left out"):
        hands = load(source, HandReading(size=32, skip_bad=True))
    assert hands.names.tolist() == ["a.png"]
    assert len(hands.skipped) == 3
    write(tmp_path / "l.csv", "path,id\na.png,1\nb.png,1\n")
    with pytest.raises(UserError, match=r"row 3: .*b\.png.*skip_bad"):
        load(source, PLAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,id\na.png,1\n", "no column 'path'"),
        ("path,id\na.png\n", "row 2: expected 2 columns"),
        ("path,id,side\na.png,1,up\n", "row 2: side 'up': expected left, right or nothing"),
        ("path,id\na.png,  \n", "row 2: the id is empty"),
        ("path,id,x1\na.png,1,3\n", "there is x1 but no y1"),
        ("path,id,x1,y1\na.png,1,three,4\n", "x1 is 'three', expected a number"),
        ("path,id,x1,y1\na.png,1,3,inf\n", "y1 is 'inf', expected a number"),
        ("path,id,x1,y1\na.png,1,3,4\n", "1 points per picture, expected 39"),
        ("path,id\n../a.png,1\n", "no such picture|leads outside"),
        ("path,id\nA.PNG,1\n", r"did you mean a\.png"),
        ("", "is empty"),
    ],
)
def test_faults_of_a_list_are_named_with_file_and_row(tmp_path, text, message):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        load(f"csv:{write(tmp_path / 'in/l.csv', text)}", PLAIN, HAND6)


def test_points_far_outside_are_refused_and_their_unit_is_said(tmp_path):
    picture(tmp_path / "a.png")
    names = ",".join(f"x{n},y{n}" for n in range(1, 10))
    values = ",".join(["900,5"] + ["3,4"] * 8)
    source = f"csv:{write(tmp_path / 'l.csv', f'path,id,{names}{chr(10)}a.png,1,{values}{chr(10)}')}"
    with pytest.raises(UserError, match=r"point 1 at \[900.0, 5.0\] lies far outside of the picture of 40 x 30"):
        load(source, PLAIN, preset("eeprnet"))
    with pytest.raises(UserError, match="expected about -1 to 1"):
        load(source, HandReading(size=32, points="unit"), preset("eeprnet"))


def test_ids_with_a_space_at_their_end_are_one_person_and_a_warning_says_so(tmp_path):
    picture(tmp_path / "a.png")
    source = f"csv:{write(tmp_path / 'l.csv', 'path,id' + chr(10) + 'a.png,12 ' + chr(10) + 'a.png,12' + chr(10))}"
    with pytest.warns(UserWarning, match="'12 ' and 0 more"):
        assert set(load(source, PLAIN).persons.tolist()) == {"12"}


def test_ntu_pi_by_odd_and_even_with_the_predecessors_landmarks(tmp_path):
    for name in ("17-L1-Class3.jpg", "17-L2-Class3.JPG", "17-R1-Class4.jpg"):
        picture(tmp_path / "img" / name)
    x, y = np.meshgrid([-0.5, 0, 0.5], [-0.4, 0.1, 0.6])
    theta = np.concatenate([x.T.ravel(), y.T.ravel()])  # column by column
    (tmp_path / "landmarks").mkdir()
    savemat(tmp_path / "landmarks/17-R1-Class4.mat", {"thetaTps": theta})
    hands = load(f"ntu-pi:{tmp_path}", PLAIN, preset("eeprnet"))
    assert hands.splits.tolist() == ["gallery", "probe", "gallery"]
    assert hands.classes.tolist() == ["Class3:left", "Class3:left", "Class4:right"]
    found = hands.points[2].reshape(3, 3, 2)
    assert np.allclose(found[0, :, 0], [-0.5, 0, 0.5], atol=0.03)  # a row of the template runs from left to right
    assert np.all(np.diff(found[:, 0, 1]) > 0)
    assert np.isnan(hands.points[0]).all()
    gallery, probe = odd_even(hands.names)
    assert gallery.tolist() == [0, 2]
    assert probe.tolist() == [1]
    with pytest.raises(UserError, match="expected <subject>-L<index>"):
        odd_even(["x.jpg"])


def test_the_predecessors_columns_become_rows_and_back():
    rows = np.asarray([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], float)
    template_x = np.asarray([-1, -1, -1, 0, 0, 0, 1, 1, 1], float)
    template_y = np.asarray([-1, 0, 1, -1, 0, 1, -1, 0, 1], float)
    assert np.array_equal(from_columns(np.concatenate([template_x, template_y])), rows)


def test_11k_hands_leaves_out_accessories_and_halves_people(tmp_path):
    for name in ("H1.jpg", "H2.jpg", "H3.jpg"):
        picture(tmp_path / "Hands" / name)
    header = "id,age,gender,skinColor,accessories,nailPolish,aspectOfHand,imageName,irregularities\n"
    rows = "0000001,2,m,fair,0,0,dorsal right,H1.jpg,0\n0000002 ,2,m,fair,1,0,palmar left,H2.jpg,0\n"
    rows += "0001052,2,m,fair,0,0,palmar left,H3.jpg,0\n"
    write(tmp_path / "HandInfo.csv", header + rows)
    with pytest.warns(UserWarning, match="1 rows left out"):
        hands = load(f"hands11k:{tmp_path}", PLAIN)
    assert hands.persons.tolist() == ["0000001", "0001052"]
    assert hands.views.tolist() == ["dorsal", "palmar"]
    assert hands.splits.tolist() == ["train", "test"]
    assert halves(hands.persons, 1050).tolist() == [True, False]
    assert halves(["b", "a", "c", "d"]).tolist() == [True, True, False, False]
    write(tmp_path / "HandInfo.csv", header + rows.replace("dorsal right", "dorsal"))
    with pytest.raises(UserError, match=r"row 2: aspectOfHand 'dorsal', expected such as 'palmar right'"):
        load(f"hands11k:{tmp_path}", PLAIN)


def test_hd_and_cut_palms_by_their_names(tmp_path):
    picture(tmp_path / "hd/1-501/17_1.jpg")
    picture(tmp_path / "hd/502-712/600_1.jpg")
    hands = load(f"hd:{tmp_path / 'hd'}", PLAIN)
    assert hands.splits.tolist() == ["test", "distractor"]
    picture(tmp_path / "hd/1-501/18_1.jpg")
    assert load(f"hd:{tmp_path / 'hd'}", PLAIN).splits.tolist() == ["train", "test", "distractor"]
    picture(tmp_path / "roi/casia/0001_m_l_05.jpg")
    picture(tmp_path / "roi/iitd/Left Hand/001_5.bmp")
    picture(tmp_path / "roi/iitd/Right/001_5.bmp")
    with pytest.warns(UserWarning, match="'0001' and '001'"):
        palms = load(f"palm-roi:{tmp_path / 'roi'}", PLAIN)
    assert palms.classes.tolist() == ["0001:left", "001:left", "001:right"]
    picture(tmp_path / "roi/readme.png")
    with pytest.raises(UserError, match=r"readme\.png: expected a name like 0001_m_l_05\.jpg"):
        load(f"palm-roi:{tmp_path / 'roi'}", PLAIN)
    with pytest.warns(UserWarning, match="1 rows left out"):
        assert len(load(f"palm-roi:{tmp_path / 'roi'}", HandReading(size=32, skip_bad=True))) == 3


SPOTS = (landmarks_21() + 1) / 2


def mediapipe():
    return [{"x": float(x), "y": float(y), "z": 0.0} for x, y in SPOTS]


@pytest.mark.parametrize(
    "content",
    [
        mediapipe(),
        {"landmarks": mediapipe()},
        {"hand_landmarks": [mediapipe()], "handedness": [[{"categoryName": "Left"}]]},
        {"multi_hand_landmarks": [{"landmark": mediapipe()}]},
        [[float(x), float(y), 0.0] for x, y in SPOTS],
    ],
)
def test_mediapipes_forms_are_read(tmp_path, content):
    found = read_json(write(tmp_path / "m.json", json.dumps(content)))
    assert found.unit == "share"
    assert found.side == "unknown"
    assert np.allclose(found.points, SPOTS)


def test_openpose_and_cmu_are_read_and_several_hands_are_refused(tmp_path):
    flat = np.concatenate([SPOTS * 100, np.ones((21, 1))], 1).ravel().tolist()
    people = {"people": [{"hand_left_keypoints_2d": flat, "hand_right_keypoints_2d": [0.0] * 63}]}
    found = read_json(write(tmp_path / "o.json", json.dumps(people)))
    assert (found.side, found.unit) == ("left", "pixels")
    cmu = {"hand_pts": [[float(x), float(y), 1.0] for x, y in SPOTS * 100], "is_left": 0.0}
    assert read_json(write(tmp_path / "c.json", json.dumps(cmu))).side == "right"
    two = {"hand_landmarks": [mediapipe(), mediapipe()]}
    with pytest.raises(UserError, match="holds 2 hands"):
        read_json(write(tmp_path / "t.json", json.dumps(two)))
    for text, message in (
        (json.dumps(mediapipe()[:20]), "expected 21 landmarks, found 20"),
        (json.dumps({"a": 1}), "found none"),
        ("{", "is not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            read_json(write(tmp_path / "x.json", text))


def test_mat_files_that_are_none_are_refused_in_one_line(tmp_path):
    for name, content, message in (
        ("a", {"other": np.zeros(4)}, "expected 'thetaTps'"),
        ("b", {"thetaTps": np.full(18, np.nan)}, "landmark 1 is not finite"),
    ):
        savemat(tmp_path / f"{name}.mat", content)
        with pytest.raises(UserError, match=message):
            read_mat(tmp_path / f"{name}.mat")
    write(tmp_path / "c.mat", "x")
    with pytest.raises(UserError, match="is not a MATLAB file"):
        read_mat(tmp_path / "c.mat")
    (tmp_path / "d.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF" + bytes(400))
    with pytest.raises(UserError, match="format 7.3"):
        read_mat(tmp_path / "d.mat")


def test_a_list_that_we_write_is_taken_back(tmp_path):
    hands = load("hands", HandReading(size=48, people=2, views=2), HAND6)
    for name, image in zip(hands.names, hands.images, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name)
    headers, rows = as_rows(hands, [(48, 48)] * 4)
    with (tmp_path / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([headers, *rows])
    again = load(f"csv:{tmp_path / 'l.csv'}", HandReading(size=48), HAND6)
    assert np.allclose(again.points, hands.points, atol=2e-3)
    assert torch.equal(again.images, hands.images)


def test_rendered_points_become_those_of_other_presets():
    hands = listed("hands", HandReading(size=32, people=2, views=2))
    palm = with_parts(hands, preset("eeprnet"))
    assert np.array_equal(palm.points, hands.points[:, :9])
    segments = with_parts(hands, preset("hand21"))
    assert segments.points.shape == (4, 40, 2)
    assert np.isfinite(segments.points).all()


def test_batches_hold_p_people_with_k_pictures_and_name_who_has_too_few():
    classes = np.repeat([f"p{i}" for i in range(7)], 5)
    order = people_and_views(classes, 3, 4, batches=9)
    made = order(torch.Generator().manual_seed(0))
    assert len(made) == 9
    for batch in made:
        names, counts = np.unique(classes[batch], return_counts=True)
        assert len(names) == 3
        assert set(counts) == {4}
        assert len(set(batch)) == 12
    first = np.concatenate([classes[b] for b in made[:2]])
    assert len(set(first)) == 6  # one pass repeats nobody
    with pytest.raises(UserError, match="'lonely' has 1 picture, batches of --views 4"):
        people_and_views([*classes, "lonely"], 3, 4)
    with pytest.raises(UserError, match="7 identities do not fill a batch of --people 8"):
        people_and_views(classes, 8, 4)


def test_protocols_draw_galleries_and_refuse_shared_identities():
    classes = np.asarray(list("aaabbbcc"))
    draws = list(drawn_galleries(classes, 3, 0))
    for gallery, probes in draws:
        assert sorted(classes[gallery]) == list("abc")
        assert len(set(gallery) | set(probes)) == 8
    assert any(not np.array_equal(draws[0][0], g) for g, _ in draws[1:])
    g, p = first_each(classes, 2)
    assert g.tolist() == [0, 1, 3, 4, 6, 7]
    assert p.tolist() == [2, 5]
    with pytest.raises(UserError, match="no class has more than 3 pictures"):
        first_each(classes, 3)
    out = strangers(classes, 0.34, 0)
    assert len(set(classes[out])) == 1
    check_disjoint(["a"], ["b"])
    with pytest.raises(UserError, match="1 identities are in the training data as well: b"):
        check_disjoint(["a", "b"], ["b", "c"])


def test_unknown_kinds_and_missing_paths_are_refused():
    with pytest.raises(UserError, match="did you mean imagefolder"):
        load("imagefoldr:x", PLAIN)
    with pytest.raises(UserError, match="no such file or folder"):
        load("csv:none.csv", PLAIN)
