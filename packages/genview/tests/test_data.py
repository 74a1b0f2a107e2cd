"""Readers, pairs of views, augmentation."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from genview import augment
from genview.config import ViewSettings
from genview.data import GeneratedViews, PairedViewDataset, load, read_manifest
from PIL import Image

from tenfold import UserError
from tenfold.loading import KeyedLoader


def picture(path, color=(200, 30, 40), size=(20, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def test_a_folder_of_pictures_with_any_names_is_read_in_a_fixed_order(tmp_path):
    for name in ("b/x.png", "a/x.png", "a/Ü ж.jpg", "a/c d/日本.png", "a/.hidden.png", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            picture(tmp_path / name)
    found = load(f"folder:{tmp_path}")
    assert found.train.keys == ("a/c d/日本.png", "a/x.png", "a/Ü ж.jpg", "b/x.png")
    assert found.train.read(0).shape == (24, 20, 3)


def test_a_broken_picture_or_link_is_an_error_of_that_picture_alone(tmp_path):
    picture(tmp_path / "d/good.png")
    (tmp_path / "d/bad.png").write_bytes(b"no picture")
    whole = picture(tmp_path / "whole.jpg", size=(64, 64)).read_bytes()
    (tmp_path / "d/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d/gone.png").symlink_to(tmp_path / "nowhere.png")
    picture(tmp_path / "outside.png")
    (tmp_path / "d/out.png").symlink_to(tmp_path / "outside.png")
    found = load(f"folder:{tmp_path / 'd'}").train
    results = {}
    for i, key in enumerate(found.keys):
        try:
            results[key] = found.read(i).shape
        except UserError as error:
            results[key] = str(error)
    assert results["good.png"] == (24, 20, 3)
    assert "bad.png" in results["bad.png"]
    assert "truncated" in results["cut.jpg"].lower()
    assert "leads outside" in results["out.png"]
    assert "gone.png" in results["gone.png"]


@pytest.mark.parametrize("kind", ["cmyk", "sixteen", "animated", "turned", "palette"])
def test_pictures_of_unusual_kinds_are_read_in_color_and_upright(tmp_path, kind):
    path = tmp_path / "d/x.png"
    path.parent.mkdir()
    if kind == "cmyk":
        path = path.with_suffix(".jpg")
        Image.new("CMYK", (8, 6)).save(path)
    elif kind == "sixteen":
        Image.fromarray(np.full((6, 8), 40000, np.uint16)).save(path)
    elif kind == "animated":
        path = path.with_suffix(".gif")
        frames = [Image.new("RGB", (8, 6), (i, 0, 0)) for i in (10, 200)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "turned":
        path = path.with_suffix(".jpg")
        image = Image.new("RGB", (6, 8))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    else:
        Image.new("P", (8, 6)).save(path)
    assert load(f"folder:{path.parent}").train.read(0).shape == (6, 8, 3)


def test_a_list_holds_one_path_a_line_with_spaces(tmp_path):
    picture(tmp_path / "a b/x y.png")
    (tmp_path / "l.txt").write_text("a b/x y.png\n\n")
    assert load(f"list:{tmp_path / 'l.txt'}").train.read(0).shape == (24, 20, 3)
    for text, expected in (("../x.png", "below"), ("a b/x y.png\na b/x y.png", "twice")):
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(UserError, match=expected):
            load(f"list:{tmp_path / 'l.txt'}")


def test_a_csv_gives_captions_levels_and_scales(tmp_path):
    picture(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text('image,prompt,noise_level,guidance_scale\nx.png,"a red, round thing",300,\n')
    found = load(f"csv:{tmp_path / 't.csv'}").train
    assert found.captions == ("a red, round thing",)
    assert found.levels == (300,)
    assert math.isnan(found.guidance[0])
    for row, expected in (
        ("x.png,,1000,", "noise_level"),
        ("x.png,,many,", "expected a number"),
        ("/x.png,,,", "below"),
    ):
        (tmp_path / "t.csv").write_text(f"image,prompt,noise_level,guidance_scale\n{row}\n")
        with pytest.raises(UserError, match=f"line 2.*{expected}"):
            load(f"csv:{tmp_path / 't.csv'}")


def test_a_tar_of_webdataset_gives_pictures_and_captions(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (9, 7)).save(content, "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        picture_of = content.getvalue()
        dotted = (("v1.0/22.05.png", picture_of), ("v1.0/22.05.txt", b"a dotted name"))
        for name, raw in (("0001.png", picture_of), ("0001.txt", b"a cat"), ("0002.png", b"broken"), *dotted):
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    found = load(f"webdataset:{tmp_path / 's.tar'}").train
    assert found.keys == ("s/0001.png", "s/0002.png", "s/v1.0/22.05.png")
    assert found.captions == ("a cat", "", "a dotted name")
    assert found.read(0).shape == (7, 9, 3)
    with pytest.raises(UserError, match=r"0002\.png"):
        found.read(1)
    (tmp_path / "n.tar").write_bytes(b"x" * 600)
    with pytest.raises(UserError, match="not a whole"):
        load(f"webdataset:{tmp_path / 'n.tar'}")


def test_folders_of_classes_hold_out_a_fifth_where_there_is_no_test_part(tmp_path):
    for label in ("cat", "dog"):
        for i in range(10):
            picture(tmp_path / f"{label}/{i}.png")
    found = load(f"imagefolder:{tmp_path}")
    assert (len(found.train), len(found.test)) == (16, 4)
    assert found.classes == ("cat", "dog")
    assert not set(found.train.keys) & set(found.test.keys)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no picture there"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"key": "a"}, "not a row"),
        ({"key": "a", "status": "ok", "variation": 0, "path": "../x"}, "outside"),
        ("[]", "object"),
    ],
)
def test_a_manifest_that_is_none_or_leads_outside_is_refused(tmp_path, row, expected):
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"views": "views"}) + "\n" + text + "\n")
    with pytest.raises(UserError, match=expected):
        read_manifest(tmp_path)


@pytest.fixture
def paired(data, tmp_path):
    pictures = load(f"npz:{data}").train
    files = {
        key: (picture(tmp_path / f"{i}.png", (i, i, i), (16, 16)),) for i, key in enumerate(pictures.keys) if i % 3
    }
    return PairedViewDataset(pictures, GeneratedViews(files), 16)


def batch_of(dataset, epoch=0, workers=0):
    loader = KeyedLoader(dataset, batch_size=8, num_workers=workers)
    loader.seek(epoch)
    return list(loader)


def test_pictures_without_a_view_give_two_views_of_themselves(paired):
    assert paired.with_view.tolist() == [bool(i % 3) for i in range(24)]
    _, image, view, has = paired[3]
    assert not has
    assert torch.equal(image, view)
    _, image, view, has = paired[4]
    assert has
    assert int(view.max()) == 4


def test_keys_that_do_not_meet_are_told_with_an_example(data, tmp_path):
    with pytest.raises(UserError, match="'train/0000000' in the data, 'other' in the views"):
        PairedViewDataset(load(f"npz:{data}").train, GeneratedViews({"other": (tmp_path,)}), 16)


def pairs(dataset, batch, settings, epoch=0):
    u = augment.uniforms(0, epoch, batch[0].tolist())
    return augment.make_pairs(*batch[1:], u, settings, size=16)


def test_with_probability_zero_the_pairs_are_the_plain_ones_to_the_bit(paired):
    plain = PairedViewDataset(paired.pictures, None, 16)
    for a, b in zip(batch_of(paired), batch_of(plain), strict=True):
        x, y = pairs(paired, a, ViewSettings(generated=0.0)), pairs(plain, b, ViewSettings())
        assert torch.equal(x.first.images, y.first.images)
        assert torch.equal(x.second.images, y.second.images)
        assert bool((x.generated == -1).all())


def test_with_probability_one_each_pair_has_one_generated_view_in_a_slot_at_random(paired):
    slots = []
    for epoch in range(40):
        for batch in batch_of(paired, epoch):
            pair = pairs(paired, batch, ViewSettings(), epoch)
            assert torch.equal(pair.generated >= 0, batch[3])
            slots += pair.generated[batch[3]].tolist()
    assert abs(np.mean(slots) - 0.5) < 4 * 0.5 / len(slots) ** 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_picture_gets_depends_on_seed_epoch_and_index_alone(paired, workers):
    found = {}
    for batch in batch_of(paired, 3, workers):
        pair = pairs(paired, batch, ViewSettings(), 3)
        found |= dict(zip(batch[0].tolist(), pair.first.images, strict=True))
    alone = [torch.stack([torch.as_tensor(part)]) for part in paired[7]]
    again = pairs(paired, alone, ViewSettings(), 3).first.images[0]
    assert torch.allclose(found[7], again, atol=1e-6)


def test_a_whole_box_gives_the_picture_and_a_mirrored_one_its_mirror():
    x = torch.rand(2, 3, 8, 8)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)
    out = augment.crop(x, box, torch.tensor([False, True]), 8)
    assert torch.allclose(out[0], x[0], atol=1e-5)
    assert torch.allclose(out[1], x[1].flip(2), atol=1e-5)


def test_crops_stay_inside_and_cover_at_least_their_area():
    u = torch.rand(500, 4)
    boxes = augment.crop_boxes(u, (0.2, 1.0))
    assert bool((boxes >= 0).all())
    assert bool((boxes[:, 0] + boxes[:, 2] <= 1 + 1e-6).all())
    areas = boxes[:, 2] * boxes[:, 3]
    assert float(areas.min()) > 0.19


def test_colors_blur_and_solarization_do_what_they_say():
    x = torch.rand(3, 3, 16, 16)
    no, yes = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    assert torch.equal(augment.jitter(x, torch.rand(3, 4), (0.4, 0.4, 0.4, 0.1), no), x)
    assert torch.allclose(augment.jitter(x, torch.full((3, 4), 0.5), (0.4, 0.4, 0.4, 0.1), yes), x, atol=1e-5)
    out = augment.blur(x, torch.full((3,), 1.5), torch.tensor([True, False, True]))
    assert torch.equal(out[1], x[1])
    assert float(out[0].std()) < float(x[0].std())
    gray = augment.augment(x, torch.rand(3, 20), ViewSettings(gray=1.0, jitter_share=0, blur=0), size=16).images
    assert torch.allclose(gray[:, 0], gray[:, 2], atol=1e-6)
    u = torch.zeros(3, 20)
    u[:, 4] = 0.9
    plain = ViewSettings(least_area=1.0, jitter_share=0, gray=0, blur=0, second_solarize=1.0)
    one, two = (augment.augment(x, u, plain, size=16, second=second).images for second in (False, True))
    assert torch.allclose(two, torch.where(one >= 128 / 255, 1 - one, one))


def test_with_a_least_area_of_one_pictures_are_whole_whatever_is_drawn():
    x, u = torch.rand(9, 3, 16, 16), torch.rand(9, 20)
    whole = ViewSettings(least_area=1.0, flip=0, jitter_share=0, gray=0, blur=0)
    found = augment.augment(x, u, whole, size=16)
    assert torch.allclose(found.images, x, atol=1e-5)
    assert torch.allclose(found.boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(9, 4), atol=1e-6)
