"""Maps in tiles on a dask cluster of two workers: equal to the whole, in one file, within the memory that was said."""

import subprocess
import sys

import numpy as np
import pytest
from radiogat.cli import main
from radiogat.config import CityConfig, TreesConfig
from radiogat.estimator import RadioMapEstimator
from radiogat.maps import MapLayout
from radiogat.rasters import read_geotiff
from radiogat.samples import Grid, RadioSamples, RadioScene
from radiogat.simulate import city
from radiogat.tiling import check_memory, lazy_map, predict_tile, task_bytes, windows

from tenfold import UserError
from tenfold.testing import assert_user_error

UTM = "EPSG:32632"


@pytest.fixture(scope="module")
def cluster():
    """Two processes of one thread."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="3GB") as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training: trees over a small city with buildings."""
    folder = tmp_path_factory.mktemp("tiling")
    words = [
        "simulate",
        "--city.size",
        "60",
        "--city.freq_mhz",
        "1750,3500",
        "--rate",
        "0.1",
        "--out",
        str(folder / "city"),
    ]
    assert main(words) == 0
    words = ["train", "--data", f"npz:{folder / 'city/maps.npz'}", "--rate", "0.1", "--method", "trees", "--fallback"]
    words += ["false", "--trees.iterations", "8", "--map", "none", "--out", str(folder / "run"), "--quiet"]
    assert main(words) == 0
    return folder / "run"


def whole(run):
    estimator = RadioMapEstimator.load(run)
    return estimator.predict(estimator.scene_.grid, interval=0.9)


def test_tiles_of_a_cluster_equal_the_whole_in_one_cloud_optimized_geotiff(run, cluster, tmp_path, capsys):
    import rasterio

    words = ["predict", "--run", str(run), "--dask", cluster.scheduler_address, "--tile", "16", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "tiles of 16 x 16 cells; each takes a worker's thread up to 8 MB of the 3000 MB that it has" in out
    with rasterio.open(tmp_path / "m/map.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.descriptions[0] == "1750 MHz rss_dbm"
    found, expected = read_geotiff(tmp_path / "m/map.tif", need_crs=False), whole(run)
    assert found.layout == expected.layout
    assert np.array_equal(found.layout.building, expected.layout.building)
    for name, layer in expected.layers.items():
        assert np.allclose(found.layers[name], layer, atol=2e-5, equal_nan=True), name
    left = [path.name for path in (tmp_path / "m").rglob("*plain*")]
    assert not left


def test_tiles_of_a_cluster_equal_the_whole_in_zarr(run, cluster, tmp_path):
    import xarray

    words = ["predict", "--run", str(run), "--dask", cluster.scheduler_address, "--tile", "25", "--format", "zarr"]
    assert main([*words, "--freq_mhz", "1750,2600", "--out", str(tmp_path / "z")]) == 0
    expected = RadioMapEstimator.load(run).predict(whole(run).layout.grid, [1750.0, 2600.0], 0.9)
    with xarray.open_zarr(tmp_path / "z/map.zarr", consolidated=False) as opened:
        assert opened["rss_dbm"].chunks[1:] == ((25, 25, 10), (25, 25, 10))
        assert opened["rss_dbm"].attrs["units"] == "dBm"
        assert np.array_equal(opened["building"].values != 0, expected.layout.building)
        for name, layer in expected.layers.items():
            assert np.allclose(opened[name].values, layer, atol=2e-5, equal_nan=True), name


def test_a_lazy_map_predicts_what_is_taken_from_it(run, monkeypatch):
    estimator = RadioMapEstimator.load(run)
    layout = MapLayout(estimator.scene_.grid, (1750.0,), None, UTM)
    taken = []
    monkeypatch.setattr("radiogat.tiling.predict_tile", lambda *a: taken.append(a[2]) or predict_tile(*a))
    lazy = lazy_map(run / "model.safetensors", layout, 20)
    assert not taken
    part = lazy["rss_dbm"][0, 5:10, 41:45].compute(scheduler="synchronous")
    assert len(taken) == 1
    assert np.allclose(part, whole(run).rss_dbm[0, 5:10, 41:45], atol=2e-5, equal_nan=True)
    assert lazy["spatial_ref"].attrs["grid_mapping_name"] == "transverse_mercator"


def test_tiles_cover_every_cell_once():
    seen = np.zeros((37, 50), dtype=int)
    for rows, columns in windows(seen.shape, 16):
        seen[rows, columns] += 1
    assert (seen == 1).all()


def test_what_cannot_be_done_on_a_cluster_is_one_line(run, cluster, tmp_path, capsys):
    words = ["predict", "--run", str(run), "--out", str(tmp_path / "o")]
    address = ["--dask", cluster.scheduler_address]
    for more, said in (
        (["--dask", "tcp://127.0.0.1:1"], "--dask tcp://127.0.0.1:1: no scheduler of dask answers there"),
        ([*address, "--format", "csv"], "--format: expected cog or zarr with --dask, got csv"),
        (["--tile", "64"], "--tile: expected with --dask"),
        ([*address, "--points", "p.csv"], "--dask: expected a map"),
        ([*address, "--tile", "20000", "--cell", "0.01"], "give a smaller --tile, or workers with more memory"),
    ):
        assert_user_error(main, [*words, *more], capsys, said)
    with pytest.raises(UserError, match="a worker does not see this file"):
        predict_tile(str(tmp_path / "none"), MapLayout(Grid(0, 4, 1, 4, 4), (1750.0,)), (slice(0, 4), slice(0, 4)))


MEASURE = """
import ctypes, gc, sys
from radiogat.maps import MapLayout
from radiogat.samples import Grid
from radiogat.tiling import estimator_at, predict_tile, task_bytes


def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


path, tile = sys.argv[1], int(sys.argv[2])
layout = MapLayout(Grid(0.0, 0.0, 1.0, 4096, 4096), (1750.0, 3500.0), 0.9)
estimator_at(path)
predict_tile(path, layout, (slice(0, 8), slice(0, 8)))
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
predict_tile(path, layout, (slice(0, tile), slice(0, tile)))
print((kilobytes("VmHWM") - before) * 1024, task_bytes(layout, tile))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_a_task_takes_no_more_memory_than_was_said(tmp_path):
    """The stack with three masts and buildings, at two sizes of tiles."""
    maps = city(CityConfig(size=120, freq_mhz=(1750.0, 3500.0), seed=3))
    estimator = RadioMapEstimator(trees=TreesConfig(iterations=20), network=None)
    estimator.set_params(network__steps=20)
    estimator.fit(maps.samples(maps.draw(0.1, 0)), maps.scene)
    estimator.save(tmp_path / "model.safetensors")
    for tile in (128, 512):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "model.safetensors"), str(tile)]
        grown, said = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert grown < said, (tile, grown, said)
        assert grown > said / 8  # the bound means something


def test_workers_with_too_little_memory_are_refused():
    class Client:
        def scheduler_info(self, n_workers):
            return {"workers": {"a": {"memory_limit": 2e8, "nthreads": 4}, "b": {"memory_limit": 0, "nthreads": 1}}}

    layout = MapLayout(Grid(0, 1, 1, 10, 10), (1750.0,), 0.9)
    with pytest.raises(UserError, match="a thread of a worker has 50 MB: give a smaller --tile"):
        check_memory(Client(), layout, 256)
    assert task_bytes(layout, 16) < 50e6
    assert "of the 50 MB" in check_memory(Client(), layout, 16)


def test_a_scene_is_known_on_other_grids():
    building = np.zeros((4, 4), dtype=bool)
    building[1, 2] = True
    scene = RadioScene(Grid(0, 40, 10, 4, 4), building)
    finer = scene.building_on(Grid(-10, 50, 5, 12, 12))
    assert finer.sum() == 4
    assert finer[4:6, 6:8].all()
    assert RadioScene(Grid(0, 40, 10, 4, 4)).building_on(Grid(0, 40, 5, 8, 8)) is None
    samples = RadioSamples([[5.0, 5], [15, 5], [25, 35], [35, 5]], 1750.0, [-60.0, -61, -62, -63])
    estimator = RadioMapEstimator("idw", fallback=False).fit(samples, scene)
    assert np.isnan(estimator.predict(Grid(-10, 50, 5, 12, 12)).rss_dbm[0][finer]).all()
