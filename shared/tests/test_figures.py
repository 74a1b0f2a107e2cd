"""Pictures are reopened with Pillow and measured: what was asked for has to be found in the pixels."""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from tenfold import UserError, figures
from tenfold.figures import COLORS, Curve, Panel


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def is_color(image, color):
    return (np.abs(image - [int(color[i : i + 2], 16) for i in (1, 3, 5)]) < 12).all(-1)


def test_a_line_chart_shows_every_curve_and_its_band(tmp_path):
    x = [1, 10, 100, 1000]
    low, high = [2, 4, 6, 8], [4, 6, 8, 10]
    kd, ce = Curve(x, [3, 5, 7, 9], low, high), Curve(x, [6, 4, 3, 1])
    path = tmp_path / "figures" / "a.png"
    figures.line_chart(path, [Panel("top-1", "step", "top-1 (%)", {"ce": ce, "kd": kd}, xscale="log")])
    image = pixels(path)
    assert all(is_color(image, color).sum() > 200 for color in COLORS[:2])
    assert not is_color(image, COLORS[2]).any()
    figures.line_chart(tmp_path / "b.png", [Panel("top-1", "step", "top-1 (%)", {"ce": ce, "kd": Curve(x, kd.mean)})])
    band = [round(0.18 * int(COLORS[1][i : i + 2], 16) + 0.82 * 255) for i in (1, 3, 5)]
    assert (np.abs(image - band) < 4).all(-1).sum() > 2000
    figures.line_chart(tmp_path / "c.png", [Panel("", "", "", {"kd": kd})])  # no legend, so no other ink
    image = pixels(tmp_path / "c.png")
    in_band = (image[..., 2] > image[..., 0] + 20) & ~is_color(image, COLORS[0])
    column = np.argmax(in_band.sum(0))  # away from markers, where the band is seen whole
    curve = np.nonzero(is_color(image, COLORS[0])[:, column])[0]
    assert np.nonzero(in_band[:, column])[0][[0, -1]].mean() == pytest.approx(curve.mean(), abs=2)
    assert (np.abs(pixels(tmp_path / "b.png") - band) < 4).all(-1).sum() < 200


def ticks(path):
    """Marks below the horizontal axis."""
    dark = (pixels(path) < 100).all(-1)
    axis = np.nonzero(dark.sum(1) > dark.shape[1] / 2)[0][-1]
    below = dark[axis + 3].astype(int)
    return int((np.diff(below) == 1).sum())


def test_whole_numbers_have_no_fractions_between_them(tmp_path):
    for name, x in (("whole", [1, 2, 3]), ("not", [1, 2.5, 3])):
        figures.line_chart(tmp_path / f"{name}.png", [Panel("", "epoch", "", {"kd": Curve(x, [0, 1, 3])})])
    assert ticks(tmp_path / "whole.png") == 3 < ticks(tmp_path / "not.png")


def test_a_log_axis_makes_powers_a_straight_line(tmp_path):
    x = np.arange(60.0)  # more points than get markers
    panel = Panel("", "step", "loss", {"loss": Curve(x, 10 ** (x / 10))}, yscale="log")
    figures.line_chart(tmp_path / "a.png", [panel])
    rows, columns = np.nonzero(is_color(pixels(tmp_path / "a.png"), COLORS[0]))
    assert abs(stats.pearsonr(rows, columns).statistic) > 0.999


def test_panels_share_colors_and_long_legends_stay_on_the_page(tmp_path):
    names = [f"an arm with a long name, number {i}" for i in range(9)]
    curves = {name: Curve([0, 1], [i, i]) for i, name in enumerate(names)}
    figures.line_chart(
        tmp_path / "a.png", [Panel("a", "x", "y", curves), Panel("b", "x", "y", {names[3]: curves[names[3]]})]
    )
    image = pixels(tmp_path / "a.png")
    right = image[:, image.shape[1] // 2 :]
    legend = image.shape[0] * 3 // 4
    assert is_color(right[:legend], COLORS[3]).any()
    assert not is_color(right[:legend], COLORS[0]).any()
    assert (np.concatenate([image[:, :3], image[:, -3:]], 1) == 255).all(), "something touches the border"


def test_an_arm_chart_draws_the_mean_and_students_interval(tmp_path):
    sample = [52.1, 53.0, 51.4, 52.2, 52.9]
    figures.arm_chart(tmp_path / "a.png", {"ce": sample, "kd": [61.9, 62.8]}, xlabel="top-1 (%)")
    columns = np.nonzero(is_color(pixels(tmp_path / "a.png"), COLORS[0]))[1]
    bar = (columns.max() - columns.min()) / 130
    low, high = stats.t.interval(0.95, 4, np.mean(sample), stats.sem(sample))
    alone = np.nonzero(is_color(pixels(tmp_path / "a.png"), COLORS[1]))[1]
    # the two means are 62.35 - 52.32 apart: the scale of the axis, from the picture itself
    inches = ((alone.min() + alone.max()) - (columns.min() + columns.max())) / 2 / 130 / (62.35 - np.mean(sample))
    assert bar == pytest.approx((high - low) * inches, rel=0.05)
    assert (alone.max() - alone.min()) / 130 < 0.12, "two seeds give a dot and no interval"


def test_an_image_grid_holds_the_pixels_in_their_places(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    ramp = np.full((6, 6), 40, np.uint8)
    ramp[:3] = levels = np.arange(40, 216, 35)  # six grays above a dark half: neither black nor white, nor stretched
    titles = {"row_titles": ["first row", "second"], "column_titles": ["a", "b", "c"]}
    figures.image_grid(tmp_path / "a.png", [[red, red[:, :4]], [ramp, ramp, red]], **titles)
    image = pixels(tmp_path / "a.png")
    is_red = is_color(image, "#ff0000")
    rows, columns = (np.nonzero(is_red.any(axis))[0] for axis in (1, 0))
    square = is_red[rows[0]].sum() / 1.5  # a whole image and one of half its width stand in the first row
    assert is_red.sum() == pytest.approx(square**2 * 2.5, rel=0.05)
    assert (rows[-1] - rows[0]) == pytest.approx(2 * square / 0.94, rel=0.05)
    assert (columns[-1] - columns[0]) == pytest.approx((2 + 0.94) * square / 0.94, rel=0.05)
    samples = columns[0] + (np.arange(6) * square / 6 + square / 12).astype(int)
    upper, lower = image[[int(rows[-1] - square * 3 / 4), int(rows[-1] - square / 4)]][:, samples]
    np.testing.assert_array_equal(upper, np.repeat(levels[:, None], 3, 1))
    assert (lower == 40).all()
    figures.image_grid(tmp_path / "c.png", [[red] * 12] * 12, row_titles=["DejaVuSansMono-BoldOblique"] * 12, cell=0.7)
    assert (pixels(tmp_path / "c.png")[:, :3] == 255).all(), "a title is cut off"
    figures.image_grid(tmp_path / "d.png", [[red, red], [red, red]], titles=[["one", "two\nlines"], ["a", "b"]])
    below = is_color(pixels(tmp_path / "d.png"), "#ff0000")
    assert below.sum() == pytest.approx(4 * square**2, rel=0.1), "words lie over an image"
    with pytest.raises(ValueError, match=r"row 1, column 0: expected uint8 .* got float64 \(8, 8, 3\)"):
        figures.image_grid(tmp_path / "b.png", [[red], [red / 255]])
    with pytest.raises(ValueError, match=r"got uint8 \(8, 8, 1\)"):
        figures.image_grid(tmp_path / "b.png", [[red[..., :1]]])
    assert not (tmp_path / "b.png").exists()


def test_equal_input_gives_equal_bytes_whatever_the_user_has_set(tmp_path):
    program = """
import sys
import numpy as np
from tenfold import figures
figures.line_chart(sys.argv[1] + "/line.png", [figures.Panel("t", "x", "y", {"a": figures.Curve([1, 2], [1, 2])})])
figures.arm_chart(sys.argv[1] + "/arm.png", {"a": [1, 2, 3]}, xlabel="x")
figures.image_grid(sys.argv[1] + "/grid.png", [[np.eye(5, dtype=np.uint8)]], row_titles=["a"])
assert "matplotlib.pyplot" not in sys.modules
"""
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: black\nsavefig.dpi: 30\n")
    rc = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "SOURCE_DATE_EPOCH": "0"}
    for folder, extra in (("a", {}), ("b", rc)):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / folder)], env={**os.environ, **extra}, check=True)
    for name in ("line.png", "arm.png", "grid.png"):
        data = (tmp_path / "a" / name).read_bytes()
        assert data == (tmp_path / "b" / name).read_bytes()
        assert b"tEXt" not in data
        assert b"atplotlib" not in data


def test_a_picture_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError):
        figures.line_chart(tmp_path / "a.png", [Panel("", "", "", {"a": Curve([1, 2], [1, 2, 3])})])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        figures.arm_chart(tmp_path / "file" / "a.png", {"a": [1, 2, 3]}, xlabel="x")


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.3, 60, ["0.5", "1", "2", "5", "10", "20", "50"]),
        (1e-4, 100, ["0.0001", "0.001", "0.01", "0.1", "1", "10", "100"]),
    ],
)
def test_a_logarithmic_axis_is_labeled_with_plain_numbers(low, high, labels):
    figure = Figure()
    axes = figure.add_subplot()
    axes.set(xscale="log", xlim=(low, high))
    figures._plain(axes.xaxis)
    figure.canvas.draw()
    shown = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == labels
    assert not any(t.get_text() for t in axes.get_xticklabels(minor=True))


def test_an_axis_of_ranks_is_labeled_from_one():
    axes = Figure().add_subplot()
    axes.plot(range(1, 19), range(18))
    figures._count(axes.xaxis, 1)
    ticks = axes.get_xticks().tolist()
    assert ticks[0] == 1
    assert all(float(t).is_integer() and t >= 1 for t in ticks)
