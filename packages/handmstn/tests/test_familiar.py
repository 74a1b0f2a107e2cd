"""Pictures without a hand: not assessable, and said by every command alike."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from handmstn import HandMSTN, MultiSpatialTransformer, load_model, preset, save_model
from handmstn.cli import main
from handmstn.config import HandReading
from handmstn.data import rendered
from handmstn.familiar import Familiar, even
from handmstn.models import embed
from handmstn.training import familiar_of
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import mahalanobis

from tenfold.testing import assert_user_error

SIZE = 48
NETS = ["--aligner.backbone", "hand:loc", "--aligner.loc_size", "32", "--recognizer.palm", "hand:cnn4"]
NETS += ["--recognizer.finger", "hand:cnn4", "--recognizer.dim", "8", "--recognizer.palm_size", "24"]
NETS += ["--recognizer.finger_size", "16,8", "--aligner.batch_size", "8", "--device", "cpu", "--quiet"]
TINY = [*NETS, "--aligner.steps", "3", "--steps", "3", "--people", "3", "--views", "2"]


def features(count=400, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, size, generator=generator) @ mixing + 3


def test_the_distance_is_scipys_with_the_ridge_said_in_the_formula():
    x = features()
    found = Familiar.fit(x, torch.arange(400) // 10)
    covariance = np.cov(x.double().numpy().T)
    ridge = 0.3 * np.diag(covariance).mean() * np.eye(12)
    inverse = np.linalg.inv(covariance + ridge)
    wanted = [mahalanobis(row, x.double().numpy().mean(0), inverse) for row in x[:5].double().numpy()]
    assert torch.allclose(found(x[:5]) * found.bound, torch.tensor(wanted).float(), rtol=1e-4)


def test_others_of_the_same_kind_are_within_the_bound_and_what_lies_elsewhere_is_not():
    found = Familiar.fit(features(), torch.arange(400) // 10)
    assert (found(features(1000, seed=1)) > 1).float().mean() < 0.02
    assert (found(features(1000, seed=2) + 30) > 1).all()
    assert (found(-features(1000, seed=2)) > 1).float().mean() > 0.5


def test_the_bound_is_from_people_who_were_left_out_of_mean_and_covariance():
    """Many numbers and few pictures: without folds the training's own distances would be far too small a bound."""
    x = torch.randn(60, 200, generator=torch.Generator().manual_seed(0))
    found = Familiar.fit(x, torch.arange(60) // 4)
    assert (found(x) < 0.8).all()
    assert (found(torch.randn(500, 200, generator=torch.Generator().manual_seed(1))) > 1).float().mean() < 0.05


def test_few_pictures_or_one_person_say_nothing():
    assert Familiar.fit(features(39), torch.arange(39)) is None
    assert Familiar.fit(features(50), torch.zeros(50)) is None
    assert Familiar.fit(torch.ones(50, 4), torch.arange(50) // 2) is not None  # no variance at all: no division by zero


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 150, 120)])
def test_one_even_color_is_told_from_its_black_margins_and_its_noise(color):
    images = torch.zeros(3, 3, 40, 40)
    images[0] = torch.tensor(color)[:, None, None] / 255
    images[1, :, :, 10:30] = images[0, :, :, 10:30]  # beside black margins
    images[2] = (images[0] + 0.004 * torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert even(images).all()
    images[:, :, 12:20, 12:20] = 0.4
    images[:, :, 22:26, 12:20] = 0.7
    images[:, :, :, 15] = 0  # a black line inside is no margin
    assert not even(images).any()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    parts = preset("hand6", 16, (16, 8))
    aligner = MultiSpatialTransformer(parts, "hand:loc", loc_size=32)
    made = HandMSTN(parts, "hand:cnn4", "hand:cnn4", 8, aligner).eval()
    made.familiar = familiar_of(made, people())
    planted(made)
    return made


HALF = torch.randint(0, 256, (1, 3, SIZE, SIZE // 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
NOISE = torch.cat([HALF, HALF.flip(-1)], -1)  # its mirror image is itself


def planted(made):
    """A network of three steps tells nothing apart: distances are along what tells noise from hands, the bound between."""
    measure = made.familiar
    assert measure is not None
    with torch.no_grad():
        noise = made.locate(NOISE.float() / 255, None, None).aligned.features[0]
    direction = measure.precision @ (noise - measure.mean)
    measure.precision.copy_(direction.outer(direction))
    own, far = embed(made, people()).unlike.max(), embed(made, of_images(NOISE)).unlike[0]
    assert own < far
    measure.bound *= float(np.sqrt(own * far))


def people():
    return rendered(HandReading(size=SIZE, people=12, views=5))


def of_images(images):
    one = people().part(np.arange(len(images)))
    return dataclasses.replace(one, images=images)


def test_what_is_unlike_the_trainings_pictures_has_a_reason_and_others_have_none(model, monkeypatch):
    monkeypatch.setattr("handmstn.recognizer.SEEN", -1.0)
    hands = people()
    assert embed(model, hands).shown.mean() > 0.98
    found = embed(model, of_images(NOISE))
    assert not found.shown.any()
    assert all("unlike the hands that the model was trained on" in reason for reason in found.reasons)
    assert (found.unlike > 1).all()
    kept = embed(model, of_images(NOISE), refuse=False)
    assert kept.shown.all()
    assert np.array_equal(kept.unlike, found.unlike)
    gray = torch.full((1, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    assert embed(model, of_images(gray), refuse=False).reasons.tolist() == ["the picture is one even color"]


@pytest.mark.parametrize(
    ("mirrored", "text"), [(0.5, "the other hand of what it was taken for"), (1.5, "2.0 times as far")]
)
def test_a_hand_that_is_known_in_the_mirror_alone_is_said_to_be_of_the_other_side(model, monkeypatch, mirrored, text):
    monkeypatch.setattr("handmstn.recognizer.SEEN", -1.0)
    distances = iter([2.0, mirrored])  # of the picture, then of its mirror image
    monkeypatch.setattr(HandMSTN, "unlike", lambda self, found: torch.full((len(found.visibility),), next(distances)))
    assert text in embed(model, people().part(np.arange(3))).reasons[0]


def test_a_model_keeps_it_and_one_of_an_earlier_version_has_none(model, tmp_path, capsys):
    words = ["train", "--data", "hands", "--reading.size", "48", "--reading.people", "12", "--reading.views", "4"]
    assert main([*words, *TINY, "--out", str(tmp_path / "new")]) == 0
    made, card = load_model(tmp_path / "new")
    assert made.familiar is not None
    save_model(tmp_path / "again.safetensors", made, card)
    again, _ = load_model(tmp_path / "again.safetensors")
    assert torch.equal(again.familiar.precision, made.familiar.precision)
    path = tmp_path / "new/model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("familiar.")}, path, header)
    old, _ = load_model(path)
    assert old.familiar is None
    hands = people()
    assert np.array_equal(embed(old, hands).enrolled.parts, embed(made, hands).enrolled.parts)
    capsys.readouterr()
    assert main(["predict", "--run", str(tmp_path / "new"), "--data", "hands", "--out", str(tmp_path / "p")]) == 0
    assert "does not know which pictures show no hand" in capsys.readouterr().out


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A model, and a list of hands and of pictures without one."""
    root = tmp_path_factory.mktemp("walk")
    words = ["train", "--data", "hands", "--reading.size", str(SIZE), "--reading.people", "12", "--reading.views", "5"]
    assert main([*words, *TINY, "--out", str(root / "model")]) == 0
    made, card = load_model(root / "model")
    planted(made)
    save_model(root / "model/model.safetensors", made, card)
    hands = people()
    nothing = {
        "black": np.zeros((40, 60, 3)), "white": np.full((60, 40, 3), 255), "gray": np.full((50, 50, 3), 128),
        "noise": NOISE[0].permute(1, 2, 0).numpy(),
    }  # fmt: skip
    rows = [["path", "id", "side"]]
    (root / "pictures").mkdir()
    for number in range(20):
        Image.fromarray(hands.images[number].permute(1, 2, 0).numpy()).save(root / f"pictures/h{number}.png")
        rows.append([f"pictures/h{number}.png", hands.persons[number], "right"])
    for number, (name, pixels) in enumerate(nothing.items()):
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"pictures/{name}.png")
        rows.append([f"pictures/{name}.png", hands.persons[number], "right"])
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root, [f"pictures/{name}.png" for name in nothing]


def test_enroll_search_predict_evaluate_and_calibrate_agree_on_what_is_no_hand(walk, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("handmstn.recognizer.SEEN", -1.0)
    root, nothing = walk
    gallery = str(tmp_path / "g")

    def words(verb, *more):
        given = ["--run", str(root / "model"), "--data", f"csv:{root / 'list.csv'}", "--device", "cpu", "--quiet"]
        return [verb, *given, "--out", str(tmp_path / verb), *more]

    assert main(words("enroll", "--gallery", gallery, "--purpose", "x")) == 0
    enrolled = json.loads((tmp_path / "enroll/enrolled.json").read_text())
    left = [entry["picture"] for entry in enrolled["not assessable"]]
    assert set(nothing) <= set(left)
    assert len(left) <= len(nothing) + 1
    assert enrolled["added"] == 24 - len(left)
    assert "one even color" in capsys.readouterr().out
    assert main(words("search", "--gallery", gallery, "--sheets", "0")) == 0
    answers = json.loads((tmp_path / "search/candidates.json").read_text())["answers"]
    assert [a["picture"] for a in answers if a["not assessable"]] == left
    assert all(
        a["answer"].startswith("not assessable: ") and not a["candidates"] for a in answers if a["not assessable"]
    )
    assert main(words("predict", "--pictures", "0")) == 0
    with np.load(tmp_path / "predict/embeddings.npz") as file:
        assert file["paths"][~file["assessable"]].tolist() == left
        assert (file["reasons"] != "").tolist() == (~file["assessable"]).tolist()
    assert main(words("evaluate")) == 0
    measured = json.loads((tmp_path / "evaluate/evaluation.json").read_text())
    assert [entry["picture"] for entry in measured["not assessable"]] == left
    share = 1 - len(left) / 24
    assert measured["assessable"] == pytest.approx(share)
    product = measured["closed"]["rank-1 x share assessable"]
    assert product == pytest.approx(share * measured["closed"]["rank-1"]["value"])
    assert main(words("calibrate")) == 0
    assert [
        e["picture"] for e in json.loads((tmp_path / "calibrate/calibration.json").read_text())["not assessable"]
    ] == left


def test_nothing_but_pictures_without_a_hand_is_refused_and_keep_takes_what_is_not_even(
    walk, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("handmstn.recognizer.SEEN", -1.0)
    root, _ = walk
    (tmp_path / "only/0001").mkdir(parents=True)
    (root / "pictures/noise.png").rename(tmp_path / "only/0001/noise.png")
    words = ["enroll", "--run", str(root / "model"), "--data", f"imagefolder:{tmp_path / 'only'}", "--device", "cpu"]
    words += ["--gallery", str(tmp_path / "g"), "--purpose", "x", "--out", str(tmp_path / "e"), "--quiet"]
    assert_user_error(main, words, capsys, "none of 1 picture is assessable", "--unlike keep")
    assert not (tmp_path / "g").exists()
    capsys.readouterr()
    assert main([*words[:-1], "--unlike", "keep"]) == 0
    assert "taken for hands by --unlike keep: 1 picture, the first" in capsys.readouterr().out
    (tmp_path / "only/0001/noise.png").rename(root / "pictures/noise.png")
