import json
import shutil

import pytest
from head_kd import rendered
from head_kd.coco import check_coco, image_size
from head_kd.commands._files import student_config
from head_kd.configs import resolve_config
from head_kd.data import coco_folder, read_splits, write_drawn
from head_kd.rendered import CLASSES
from head_kd.voc import voc_folder
from mmdet.registry import DATASETS
from PIL import Image

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
        (lambda c: c["annotations"][0].update(bbox=[10, 10, float("nan"), 10]), "box that is not finite"),
        (lambda c: [a.update(bbox=[0.1, 0.2, 0.3, 0.25]) for a in c["annotations"]], "box between 0 and 1"),
        (lambda c: c["images"][0].update(width=100), "is 128 x 128, the annotations say 100 x 128"),
        (lambda c: c["categories"][1].update(name=c["categories"][0]["name"]), "are all named"),
        (lambda c: c["annotations"][0].update(bbox=[10, "a", 3, 10]), "is not x, y, width, height"),
        (lambda c: c["annotations"][0].update(image_id=77), "image_id 77 is no image"),
        (lambda c: c["images"][1].update(id=1), "id 1 stands more than once"),
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
    assert check_coco(split.annotations, split.images, classes=["star", "disc"]).classes == ("disc", "star")
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
    Image.new("RGB", size).save(root / "JPEGImages/a.jpg")
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


def test_objects_of_classes_that_a_config_does_not_name_are_left_out_and_counted(tmp_path):
    voc(tmp_path / "v", [("dog", (1, 1, 50, 40), 0), ("cat", (11, 21, 30, 60), 0)])
    some = voc_folder(tmp_path / "v", "train", tmp_path / "some.json", classes=("dog",))
    assert some.classes == ("dog",)
    assert some.notes == ("train: left out: 1 x object of a class that the config does not name (cat)",)
    assert [a["bbox"] for a in json.loads((tmp_path / "some.json").read_text())["annotations"]] == [[0, 0, 50, 40]]
    with pytest.raises(UserError, match="no objects"):
        voc_folder(tmp_path / "v", "train", tmp_path / "none.json", classes=("nothing",))


def test_damaged_voc_names_the_file(tmp_path):
    voc(tmp_path / "v", [("dog", ("x", 1, 50, 40), 0)])
    with pytest.raises(UserError, match=r"a.xml: xmin is 'x', expected a number"):
        voc_folder(tmp_path / "v", "train", tmp_path / "t.json")
    with pytest.raises(UserError, match="nothing|no objects"):
        voc_folder(tmp_path / "v", "train", tmp_path / "t.json", skip_bad=True)
    (tmp_path / "v/Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"a.xml: no element found|a.xml"):
        voc_folder(tmp_path / "v", "train", tmp_path / "t.json")
    with pytest.raises(UserError, match=r"val.txt: No such file"):
        voc_folder(tmp_path / "v", "val", tmp_path / "t.json")


def test_val_stands_for_what_other_tools_call_it_and_other_names_are_listed(drawn, tmp_path):
    """Roboflow's layout; its pictures lie beside the annotations."""
    content = json.loads(drawn[1].annotations.read_text())
    for name in ("train", "valid"):
        shutil.copytree(drawn[1].images, tmp_path / "r" / name)
        (tmp_path / "r" / name / "_annotations.coco.json").write_text(json.dumps(content))
    train, val = read_splits(f"coco:{tmp_path / 'r'}", tmp_path)
    assert (train.images.name, val.images.name) == ("train", "valid")
    with pytest.raises(UserError, match="it has train, valid: name two with --split"):
        read_splits(f"coco:{tmp_path / 'r'}", tmp_path, names=("train", "test"))
    (tmp_path / "r/train.json").write_text("{}")
    with pytest.raises(UserError, match="train.json and train/_annotations.coco.json may both be the split 'train'"):
        read_splits(f"coco:{tmp_path / 'r'}", tmp_path)


@pytest.fixture
def grouped(drawn, tmp_path):
    """Roboflow's export: its first category names the group and has no box."""
    content = json.loads(drawn[1].annotations.read_text())
    content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
    for name in ("train", "valid"):
        shutil.copytree(drawn[1].images, tmp_path / "r" / name)
        (tmp_path / "r" / name / "_annotations.coco.json").write_text(json.dumps(content))
    return f"coco:{tmp_path / 'r'}"


def test_a_class_without_a_box_is_said_and_the_configs_own_classes_are_what_is_trained_on(grouped, tmp_path):
    train, _ = read_splits(grouped, tmp_path)
    assert train.classes == ("shapes", *CLASSES)
    assert any("class without a box (shapes, heart): a config" in note for note in train.notes)
    named = CLASSES[::-1]  # mmdet numbers classes as the file does, in whatever order a config names them
    train, val = read_splits(grouped, tmp_path, classes=named)
    assert train.classes == val.classes == CLASSES
    assert not train.notes
    train, val = read_splits(grouped, tmp_path, classes=CLASSES[1:])
    assert train.classes == val.classes == CLASSES[1:]
    assert any(f"box of a class that the config does not name ({CLASSES[0]}" in note for note in train.notes)
    with pytest.raises(UserError, match="no category 'dics': did you mean disc"):
        read_splits(grouped, tmp_path, classes=("dics",))


def test_a_student_config_says_which_classes_of_other_data_are_learned(grouped, tmp_path):
    cfg = resolve_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    for classes in (None, CLASSES[1:]):
        if classes is not None:
            cfg.train_dataloader.dataset.metainfo = {"classes": classes}
        used = student_config(cfg, grouped, None, tmp_path)
        assert used.model.bbox_head.num_classes == (7 if classes is None else 5)
        items = DATASETS.build({**used.train_dataloader.dataset, "pipeline": []})
        assert items.metainfo["classes"] == (("shapes", *CLASSES) if classes is None else classes)
        labels = {i["bbox_label"] for n in range(len(items)) for i in items.get_data_info(n)["instances"]}
        assert labels == ({1, 2, 3, 4, 5} if classes is None else {0, 1, 2, 3})  # no heart is drawn


@pytest.mark.parametrize(
    ("annotations", "images", "split"),
    [
        ("annotations/instances_default.json", "images/default", "default"),  # CVAT, a task
        ("annotations/instances_default.json", "images", "default"),  # CVAT 1.1
        ("result.json", "images", "result"),  # Label Studio
    ],
)
def test_exports_of_one_split_are_read_by_its_name(drawn, tmp_path, annotations, images, split):
    content = json.loads(drawn[1].annotations.read_text())
    if split == "result":  # Label Studio on Windows
        for entry in content["images"]:
            entry["file_name"] = "images\\" + entry["file_name"]
    shutil.copytree(drawn[1].images, tmp_path / "e" / images)
    (tmp_path / "e" / annotations).parent.mkdir(exist_ok=True)
    (tmp_path / "e" / annotations).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"it has {split}: name two with --split"):
        read_splits(f"coco:{tmp_path / 'e'}", tmp_path / "out")
    train, val = read_splits(f"coco:{tmp_path / 'e'}", tmp_path / "out", names=(split, split))
    assert train is val
    names = [entry["file_name"] for entry in json.loads(train.annotations.read_text())["images"]]
    assert all((train.images / name).is_file() for name in names)


def test_what_mmdet_leaves_out_is_counted_and_listed_not_refused(drawn, tmp_path):
    """The two boxes without area of COCO's train2017 are of this kind."""

    def change(content):
        content["annotations"][0].update(bbox=[10, 10, 0, 10])
        content["annotations"][1].update(bbox=[10, 10, 5, 0.5])
        content["annotations"][2].update(bbox=[200, 10, 5, 5])

    file, images = changed(drawn, tmp_path, change)
    split = check_coco(file, images)
    assert split.annotations == file
    assert any("2 x box without area (annotation 1: [10, 10, 0, 10]; annotation 2" in note for note in split.notes)
    assert any("1 x box outside of its image" in note for note in split.notes)
    from head_kd.stack import said_nothing
    from mmdet.registry import DATASETS

    with said_nothing():
        data = DATASETS.build(
            {
                "type": "CocoDataset",
                "ann_file": str(file),
                "data_prefix": {"img": str(images)},
                "metainfo": {"classes": split.classes},
                "pipeline": [],
            }
        )
    kept = sum(len(data.get_data_info(i)["instances"]) for i in range(len(data)))
    assert kept == len(json.loads(file.read_text())["annotations"]) - 3


def test_what_has_one_right_reading_is_filled_in_in_a_copy(drawn, tmp_path):
    def change(content):
        content["annotations"][0].pop("area")
        content["annotations"][0].pop("iscrowd")
        content["annotations"][1].pop("id")
        content["images"][0].update(width=None, height=None)
        for entry in content["images"]:
            entry["id"] = f"img-{entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"img-{entry['image_id']}"
            entry["category_id"] = str(entry["category_id"])

    file, images = changed(drawn, tmp_path, change)
    split = check_coco(file, images, mended=tmp_path / "mended" / "train.json")
    assert split.annotations == tmp_path / "mended" / "train.json"
    mended, original = json.loads(split.annotations.read_text()), json.loads(drawn[1].annotations.read_text())
    assert [a["bbox"] for a in mended["annotations"]] == [a["bbox"] for a in original["annotations"]]
    assert [a["image_id"] for a in mended["annotations"]] == [a["image_id"] for a in original["annotations"]]
    assert [a["category_id"] for a in mended["annotations"]] == [a["category_id"] for a in original["annotations"]]
    assert mended["images"] == original["images"]
    assert mended["annotations"][0]["area"] == original["annotations"][0]["area"]
    said = " ".join(split.notes)
    for kind in (
        "without area",
        "without iscrowd",
        "annotation id that is missing",
        "without width and height",
        "id in images",
    ):
        assert kind in said, kind


def test_all_faults_stand_in_one_message_and_can_be_left_out(drawn, tmp_path):
    def change(content):
        content["annotations"][0].update(category_id=42)
        content["annotations"][1].update(bbox=[100, 100, 50, 10])
        content["annotations"][2].update(bbox=[100, 100, 60, 10])
        content["images"].append({"id": 99, "file_name": "gone.png", "width": 9, "height": 9})

    file, images = changed(drawn, tmp_path, change)
    with pytest.raises(
        UserError, match=r"1 x image without file.*1 x unknown category.*2 x box that leaves its image"
    ) as caught:
        check_coco(file, images)
    assert str(caught.value).endswith("--skip_bad true leaves them out")
    split = check_coco(file, images, mended=tmp_path / "m.json", skip_bad=True)
    kept = json.loads(split.annotations.read_text())
    assert split.count == 6
    assert len(kept["annotations"]) == len(json.loads(drawn[1].annotations.read_text())["annotations"]) - 3
    assert any("left out: 2 x box that leaves" in note for note in split.notes)


def test_labels_follow_the_files_order_and_the_measured_split_follows_the_training_one(drawn, tmp_path):
    """mmdet numbers labels in the order of the file's categories, whatever their ids."""
    content = json.loads(drawn[1].annotations.read_text())
    root = tmp_path / "o"
    shutil.copytree(drawn[1].images, root / "train")
    shutil.copytree(drawn[1].images, root / "val")
    other = content["categories"][::-1]
    (root / "train.json").write_text(json.dumps({**content, "categories": other}))
    used = {a["category_id"] for a in content["annotations"]} - {6}
    lacking = {**content, "categories": [c for c in content["categories"] if c["id"] in used]}
    lacking["annotations"] = [a for a in content["annotations"] if a["category_id"] in used]
    (root / "val.json").write_text(json.dumps(lacking))
    train, val = read_splits(f"coco:{root}", tmp_path / "out")
    assert train.classes == tuple(c["name"] for c in other)
    assert val.classes == train.classes
    assert any("class of the training data that this split lacks" in note for note in val.notes)
    content["categories"].append({"id": 77, "name": "comet"})
    content["annotations"][0]["category_id"] = 77
    (root / "val.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has boxes of classes that the training data do not know: comet"):
        read_splits(f"coco:{root}", tmp_path / "out")


def test_a_cut_off_picture_is_named_and_a_turned_one_is_measured_as_it_is_read(tmp_path):
    picture = tmp_path / "a.jpg"
    Image.effect_noise((60, 40), 90).convert("RGB").save(picture, exif=_turned())
    assert image_size(picture, turned=True) == (40, 60)
    assert image_size(picture, turned=False) == (60, 40)
    whole = picture.read_bytes()
    picture.write_bytes(whole + b"appended by a camera")
    assert image_size(picture, turned=True) == (40, 60)
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        image_size(picture, turned=True)


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_voc_as_other_tools_write_it(tmp_path):
    """Roboflow's folder of pictures and XML side by side, ``difficult`` unspecified, a set that lacks a class."""
    voc(tmp_path / "v", [("dog", (1, 1, 50, 40), "Unspecified"), ("cat", (11, 21, 30, 60), 1)])
    for name in ("train", "valid"):
        (tmp_path / "r" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "v/JPEGImages/a.jpg", tmp_path / "r" / name / "a.jpg")
        text = (tmp_path / "v/Annotations/a.xml").read_text().replace("a.jpg", "C:\\pictures\\a.jpg")
        if name == "valid":
            text = text.replace("cat", "dog")
        (tmp_path / "r" / name / "a.xml").write_text(text)
    train, val = read_splits(f"voc:{tmp_path / 'r'}", tmp_path / "out")
    assert train.classes == val.classes == ("cat", "dog")
    assert [a["iscrowd"] for a in json.loads(train.annotations.read_text())["annotations"]] == [0, 1]
