import json

import pytest
from head_kd import rendered
from head_kd.data import check_coco, coco_folder, voc_folder, write_drawn

from tenfold import UserError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, write_drawn(folder, "train", 0, 6)


def changed(drawn, tmp_path, change):
    split = drawn[1]
    content = json.loads(split.annotations.read_text())
    change(content)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(content))
    return file, split.images


def test_drawing_is_the_same_every_time_and_boxes_hold_their_objects(drawn):
    image, objects = rendered.draw(5)
    again, _ = rendered.draw(5)
    assert (image == again).all()
    assert image.shape == (128, 128, 3)
    for _, (x, y, w, h) in objects:
        assert x >= 0
        assert y >= 0
        assert x + w <= 128
        assert y + h <= 128
        assert 12 < (w * h) ** 0.5 < 62
    sizes = [((o[1][2] * o[1][3]) ** 0.5, len(rendered.draw(i)[1])) for i in range(60) for o in rendered.draw(i)[1]]
    assert 25 < sorted(s for s, _ in sizes)[len(sizes) // 2] < 36
    assert drawn[1].classes == rendered.CLASSES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["images"].append({"id": 99, "file_name": "gone.png", "width": 9, "height": 9}),
            "image 99: no file",
        ),
        (lambda c: c["annotations"].clear(), "annotations is empty"),
        (
            lambda c: c["annotations"][0].update(category_id=42),
            "category_id 42 is unknown, expected one of 1, 2, 3, 4, 5, 6",
        ),
        (lambda c: c["annotations"][0].update(bbox=[100, 100, 50, 10]), "leaves its image of 128 x 128"),
        (lambda c: c["annotations"][0].update(bbox=[10, 10, 0, 10]), "has no area"),
        (lambda c: c["annotations"][0].update(bbox=[10, "a", 3, 10]), "is not x, y, width, height"),
        (lambda c: c["annotations"][0].update(image_id=77), "image_id 77 is no image"),
        (lambda c: c["images"][1].update(id=1), "id 1 stands more than once"),
        (lambda c: c["images"][1].pop("width"), "has no width"),
        (lambda c: c.pop("categories"), "expected COCO's lists"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(drawn, tmp_path, change, message):
    file, images = changed(drawn, tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        check_coco(file, images)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wanted_classes_have_to_be_there(drawn):
    folder, split = drawn
    with pytest.raises(UserError, match="no category 'hearrt': did you mean heart"):
        check_coco(split.annotations, split.images, classes=["hearrt"])
    assert check_coco(split.annotations, split.images, classes=["star", "disc"]).classes == ("star", "disc")
    with pytest.raises(UserError, match="no annotations of the split 'val'"):
        coco_folder(folder, "val")
    assert coco_folder(folder, "train").count == 6
    for text, message in [("{", "is not JSON"), ("[]", "expected COCO's lists")]:
        (folder / "bad.json").write_text(text)
        with pytest.raises(UserError, match=message):
            check_coco(folder / "bad.json", folder)
    with pytest.raises(UserError, match="No such file"):
        check_coco(folder / "none.json", folder)


def voc(root, objects, size=(100, 80)):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "JPEGImages/a.jpg").write_bytes(b"")
    body = "".join(
        f"<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for n, b, d in objects
    )
    size_tag = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation><filename>a.jpg</filename>{size_tag}{body}</annotation>"
    (root / "Annotations/a.xml").write_text(text)


def test_voc_becomes_coco(tmp_path):
    voc(tmp_path / "v", [("dog", (1, 1, 50, 40), 0), ("cat", (11, 21, 30, 60), 1)])
    split = voc_folder(tmp_path / "v", "train", tmp_path / "train.json")
    content = json.loads((tmp_path / "train.json").read_text())
    assert split.classes == ("cat", "dog")
    assert [a["bbox"] for a in content["annotations"]] == [[0, 0, 50, 40], [10, 20, 20, 40]]
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 1]
    assert [a["category_id"] for a in content["annotations"]] == [2, 1]


def test_damaged_voc_names_the_file(tmp_path):
    voc(tmp_path / "v", [("dog", ("x", 1, 50, 40), 0)])
    with pytest.raises(UserError, match=r"a.xml: xmin is 'x', expected a number"):
        voc_folder(tmp_path / "v", "train", tmp_path / "t.json")
    (tmp_path / "v/Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"a.xml: no element found|a.xml"):
        voc_folder(tmp_path / "v", "train", tmp_path / "t.json")
    with pytest.raises(UserError, match=r"val.txt: No such file"):
        voc_folder(tmp_path / "v", "val", tmp_path / "t.json")
