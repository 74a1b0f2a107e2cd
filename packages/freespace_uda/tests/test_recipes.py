"""Each recipe runs on a tiny stand-in of the layouts that it is for."""

import importlib.util
from pathlib import Path

import pytest
from freespace_uda.cli import main

spec = importlib.util.spec_from_file_location("readers_of_freespace", Path(__file__).with_name("test_data.py"))
readers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readers)

TINY = [
    "--rgb_encoder", "freespace:tiny", "--pretrained", "false", "--width", "8", "--size", "64,32", "--batch_size", "1",
    "--steps", "2", "--watched", "1", "--workers", "0", "--device", "cpu", "--align.hidden", "8", "--align.min_pixels", "1",
    "--align.start", "0", "--quiet",
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["r2d-kitti", "vkitti2-kitti", "synthia-kitti", "oracle-kitti"])
def test_a_recipe_trains_and_is_evaluated_from_above_and_exported_for_the_benchmark(tmp_path, recipe):
    kind = recipe.partition("-")[0]
    makers = {"r2d": lambda r: readers.carla(r, "r2d"), "vkitti2": readers.vkitti2, "synthia": readers.synthia}
    (tmp_path / "source").mkdir()
    (tmp_path / "kitti").mkdir()
    kitti = readers.kitti(tmp_path / "kitti")
    own = ["--reading.size", "64,32", "--reading.scenes", "2"]
    if kind in makers:
        own = ["--data", makers[kind](tmp_path / "source")]
    words = ["train", "--config", f"recipe:{recipe}", *own, "--target", kitti, *TINY, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    run, data = ["--run", str(tmp_path / "run"), "--device", "cpu"], ["--data", kitti]
    assert main(["evaluate", *run, *data, "--bev", "true", "--out", str(tmp_path / "e")]) == 0
    assert main(["export", *run, *data, "--format", "kitti", "--out", str(tmp_path / "k")]) == 0
    assert len(list((tmp_path / "k").glob("u*_road_*.png"))) == 2
