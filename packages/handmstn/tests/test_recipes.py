"""Each recipe runs on a tiny stand-in of the layout that it is for."""

import numpy as np
import pytest
from handmstn import SyntheticHands
from handmstn.cli import main
from PIL import Image
from scipy.io import savemat

TINY = ["--reading.size", "48", "--aligner.backbone", "hand:loc", "--aligner.loc_size", "32", "--aligner.steps", "2"]
TINY += [
    "--aligner.batch_size",
    "4",
    "--recognizer.palm",
    "hand:cnn4",
    "--recognizer.finger",
    "hand:cnn4",
    "--recognizer.dim",
    "8",
]
TINY += [
    "--recognizer.palm_size",
    "24",
    "--recognizer.finger_size",
    "16,8",
    "--people",
    "2",
    "--views",
    "2",
    "--epochs",
    "1",
]
TINY += ["--workers", "0", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def pictures():
    """Pictures of four people, four of each."""
    hands = SyntheticHands(4, 4, 48, 3, upright=True)
    return [Image.fromarray(image.transpose(1, 2, 0)) for image in hands.rendered.images], hands.rendered.points


def ntu_pi(root, pictures):
    images, points = pictures
    (root / "img").mkdir()
    (root / "landmarks").mkdir()
    for i, image in enumerate(images):
        name = f"{i // 4}-{'LR'[i // 4 % 2]}{i % 4 + 1}-Class{i // 4}"
        image.save(root / f"img/{name}.jpg")
        columns = points[i, :9].reshape(3, 3, 2).transpose(2, 1, 0).ravel()
        savemat(root / f"landmarks/{name}.mat", {"thetaTps": columns.astype(np.float64)})
    return f"ntu-pi:{root}"


def hands11k(root, pictures):
    (root / "Hands").mkdir()
    rows = ["id,age,gender,skinColor,accessories,nailPolish,aspectOfHand,imageName,irregularities"]
    for i, image in enumerate(pictures[0]):
        image.save(root / f"Hands/Hand_{i:07d}.jpg")
        rows.append(f"{1050 + i // 4:07d},30,female,fair,0,0,palmar right,Hand_{i:07d}.jpg,0")
    (root / "HandInfo.csv").write_text("\n".join(rows) + "\n")
    return f"hands11k:{root}"


def listed(root, pictures):
    names = ",".join(f"x{n},y{n}" for n in range(1, 40))
    rows = [f"path,id,side,{names}"]
    for i, (image, points) in enumerate(zip(*pictures, strict=True)):
        image.save(root / f"{i}.png")
        rows.append(f"{i}.png,{i // 4},right," + ",".join(f"{v:.1f}" for v in ((points + 1) / 2 * 47).ravel().tolist()))
    (root / "hands.csv").write_text("\n".join(rows) + "\n")
    return f"csv:{root / 'hands.csv'}"


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [("small", listed), ("ntu-pi-eeprnet", ntu_pi), ("ntu-pi-hand6", ntu_pi), ("hands11k", hands11k)],
)
def test_a_recipe_trains_and_is_evaluated_by_its_protocol(tmp_path, pictures, recipe, layout):
    (tmp_path / "data").mkdir()
    source = layout(tmp_path / "data", pictures)
    patch = pytest.MonkeyPatch()
    patch.setattr("handmstn.recognizer.SEEN", -1.0)
    more = [] if recipe == "ntu-pi-eeprnet" else ["--joint_steps", "1"]
    more += ["--recognizer.places", "1"] if recipe == "small" else []  # the crops of this test have no more
    words = ["train", "--config", f"recipe:{recipe}", "--data", source, *TINY, *more, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert (
        main(
            [
                "evaluate",
                "--run",
                str(tmp_path / "run"),
                "--data",
                source,
                "--out",
                str(tmp_path / "e"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    patch.undo()
