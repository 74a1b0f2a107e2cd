"""What people have reported of this kind of software, tried here; each case names the public thread."""

import csv

import numpy as np
import pytest
import torch
from handmstn import ControlPointGrid, HandMSTN, Identification, PartSpec, Verification, people_and_views, preset
from handmstn.cli import main
from handmstn.config import HandReading
from handmstn.data import load
from handmstn.landmarks import read_json
from PIL import Image

from tenfold import UserError


def test_a_spline_through_random_points_does_not_give_a_black_picture():
    """kornia issue 3459: any points gave zeros, since pixels and half widths were mixed."""
    rng = np.random.default_rng(0)
    part = PartSpec("p", tuple(map(tuple, rng.uniform(-1, 1, (25, 2)).tolist())), (64, 64))
    grid = ControlPointGrid([part])
    found = grid.crops(
        torch.rand(1, 3, 64, 64) + 0.1, grid(torch.from_numpy(rng.uniform(-0.9, 0.9, (1, 25, 2))).float())
    )
    assert (found[0] > 0).float().mean() > 0.3


def test_points_in_pixels_are_refused_where_they_would_give_black_crops():
    """kornia issue 2934: keypoints in pixels gave a black picture without a word."""
    parts = preset("eeprnet", 16)
    model = HandMSTN(parts, "hand:cnn4", "hand:cnn4", 8)
    pixels = 100 * torch.rand(2, 9, 2) + 20
    with pytest.raises(ValueError, match="pixels would give black crops"):
        model(torch.rand(2, 3, 64, 64), pixels)


def test_control_points_of_a_large_picture_keep_the_identity():
    """opencv-python issue 1139: these nine points turned the picture into one color, although nothing was to move."""
    pixels = np.asarray(
        [
            (121, 5213),
            (6197, 5197),
            (1627, 3481),
            (3146, 3477),
            (4668, 3473),
            (1616, 1752),
            (4655, 1744),
            (6179, 1742),
            (87, 29),
        ]
    )
    points = tuple(map(tuple, (pixels / 3200 - 1).tolist()))
    grid = ControlPointGrid([PartSpec("p", points, (32, 32))])
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    found = grid(torch.tensor(points)[None])[0]
    assert (found - torch.stack([x, y], -1).view(-1, 2)).abs().max() < 1e-4


def test_mediapipes_left_is_not_believed(tmp_path):
    """mediapipe issues 1374 and 4803: its handedness assumes a mirrored camera, so files of both kinds say Left."""
    spots = [{"x": 0.5, "y": 0.01 * i} for i in range(21)]
    for name in ("Left", "Right"):
        (tmp_path / "m.json").write_text(
            __import__("json").dumps({"landmarks": [spots], "handedness": [[{"categoryName": name}]]})
        )
        assert read_json(tmp_path / "m.json").side == "unknown"


def test_probes_and_gallery_without_a_common_identity_are_one_line():
    """deep-person-reid issues 207, 348 and 497: an assertion, and nobody knew which ids."""
    one = Identification()
    one.update(np.zeros((2, 2)), ["1", "2"], ["01", "02"])
    with pytest.raises(UserError, match="are its ids written alike"):
        one.compute()


def test_a_gallery_that_is_smaller_than_the_longest_rank_ends_at_one():
    """reid-strong-baseline issue 92: rows of unequal length when pictures are left out of a small gallery."""
    one = Identification(unit="image", ranks=50)
    scores = np.asarray([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1]])
    exclude = np.asarray([[True, False, False], [False, False, False]])
    one.update(scores, ["a", "b"], ["a", "b", "a"], exclude)
    found = one.compute()
    assert found.cmc.shape == (50,)
    assert found.cmc[0] == 1.0
    assert found.cmc[-1] == 1.0


def test_every_identity_comes_within_two_passes():
    """pytorch-metric-learning issues 684 and 725: batches repeated some classes and left out others."""
    classes = np.repeat([f"p{i}" for i in range(10)], 4)
    order = people_and_views(classes, 4, 2, batches=10)
    batches = order(torch.Generator().manual_seed(0))
    seen = [set(classes[b].tolist()) for b in batches]
    for first, second in zip(seen[0::2], seen[1::2], strict=True):
        assert not first & second
    assert set().union(*seen) == set(classes.tolist())


def test_one_picture_per_identity_is_refused_and_not_nan():
    """pytorch-metric-learning issue 588: accuracy was NaN where no query had a mate but itself."""
    one = Verification()
    one.update(np.zeros(3), np.zeros(3, bool))
    with pytest.raises(UserError, match="got 0 and 3"):
        one.compute()


def test_a_list_of_another_program_with_semicolons_and_windows_paths(tmp_path):
    """Excel's lists: semicolons, a byte-order mark, backslashes, columns in another order, an empty column."""
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (20, 30), "tan").save(tmp_path / "pics/a.png")
    text = "\ufeffID;Path;note\r\n0042;pics\\a.png;\r\n"
    (tmp_path / "l.csv").write_text(text, encoding="utf-8", newline="")
    hands = load(f"csv:{tmp_path / 'l.csv'}", HandReading(size=32))
    assert hands.persons.tolist() == ["0042"]
    (tmp_path / "latin.csv").write_bytes("path,id\npics/a.png,Müller\n".encode("latin1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load(f"csv:{tmp_path / 'latin.csv'}", HandReading(size=32))


def test_quoted_paths_with_commas_are_read(tmp_path):
    Image.new("RGB", (20, 30), "tan").save(tmp_path / "a, b.png")
    with (tmp_path / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "id"], ["a, b.png", "x"]])
    assert len(load(f"csv:{tmp_path / 'l.csv'}", HandReading(size=32))) == 1


def test_the_command_says_in_one_line_that_nothing_is_there(tmp_path, capsys):
    assert main(["inspect", "--data", f"imagefolder:{tmp_path}"]) == 2
    assert "no picture in it" in capsys.readouterr().err
