"""Files in and out, planes, and what is said about files that cannot be read."""

import numpy as np
import pytest
from radiogat.data import (
    read_maps,
    read_samples,
    read_scene,
    write_maps,
    write_samples,
)
from radiogat.maps import MapLayout, RadioMap, read_netcdf, samples_of
from radiogat.planes import plane_for, project, unproject
from radiogat.rasters import read_geotiff
from radiogat.samples import Grid, RadioMaps, RadioSamples
from radiogat.shapes import polygons_on

from tenfold import UserError
from tenfold.errors import MissingExtraError

MUNICH = (11.57, 48.14)


def csv_file(tmp_path, text, name="drive.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def a_map(crs="EPSG:32632", level=0.9):
    grid = Grid(691000.0, 5335000.0, 5.0, 7, 9)
    rng = np.random.default_rng(0)
    power = rng.uniform(-90, -50, (2, 7, 9)).astype(np.float32).astype(float)
    power[:, 2, 3] = np.nan
    layout = MapLayout(grid, (1750.0, 3500.5), level, crs)
    return RadioMap(layout, {"rss_dbm": power, "rss_lo": power - 3, "rss_hi": power + 4})


def test_measurements_survive_csv(tmp_path):
    rng = np.random.default_rng(0)
    samples = RadioSamples(rng.uniform(0, 1e6, (40, 2)), np.resize([700.5, 1800.0], 40), rng.uniform(-99, -40, 40))
    write_samples(tmp_path / "s.csv", samples)
    again = read_samples(tmp_path / "s.csv")
    for name in ("xy", "freq_mhz", "rss_dbm"):
        assert np.array_equal(getattr(again, name), getattr(samples, name))


def test_degrees_are_projected_and_come_back(tmp_path):
    path = csv_file(tmp_path, "Latitude;Longitude;Frequency;RSRP\n48.14;11.57;1800;-80\n48.15;11.58;1800;-85\n")
    samples = read_samples(path)
    assert samples.crs == "EPSG:32632"
    assert np.allclose(unproject(samples.xy, samples.crs), [[11.57, 48.14], [11.58, 48.15]], atol=1e-9)
    assert np.linalg.norm(samples.xy[1] - samples.xy[0]) == pytest.approx(1338, rel=0.01)
    write_samples(tmp_path / "out.csv", samples)
    assert "lon" in (tmp_path / "out.csv").read_text().splitlines()[0]


def test_the_plane_without_pyproj_agrees_with_utm(monkeypatch):
    lon, lat = MUNICH[0] + np.linspace(0, 0.05, 9), MUNICH[1] + np.linspace(0, 0.03, 9) ** 1.1
    utm = project(lon, lat, plane_for(lon, lat))
    monkeypatch.setitem(__import__("sys").modules, "pyproj", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    crs = plane_for(lon, lat)
    assert crs.startswith("+proj=eqc")
    plain = project(lon, lat, crs)
    assert np.allclose(unproject(plain, crs), np.stack([lon, lat], 1))
    apart = [np.sqrt(((xy[:, None] - xy) ** 2).sum(axis=2)) for xy in (plain, utm)]
    assert np.allclose(apart[0], apart[1], rtol=4e-3, atol=1e-6)
    with pytest.raises(UserError, match="more than 50 km needs pyproj"):
        plane_for(np.array([10.0, 11.0]), np.array([48.0, 48.5]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x,y,freq_mhz,rss_dbm\n1,2,1800,-80\n1,2,1800\n", "line 3, column rss_dbm: is empty: --missing drop"),
        ("x,y,freq_mhz,rss_dbm\n1,2,1800,-80\n1,2,1800,-80,5\n", "line 3: more than 4 fields"),
        ("x,y,freq_mhz,rss_dbm\n1,2,1800,-80\n1,3,1800,abc\n", "line 3, column rss_dbm: 'abc' is no number"),
        ("x,y,freq_mhz,rss_dbm\n1,2,1800,-80\n1,3,,-70\n", "line 3, column freq_mhz: is empty"),
        ("x,y,freq_mhz\n1,2,1800\n", "no column of received power"),
        ("x,y,rss_dbm\n1,2,-80\n", "no column of frequencies"),
        ("x,freq_mhz,rss_dbm\n1,1800,-80\n", "no columns x and y, nor lat and lon"),
        ("x,y,freq_mhz,rss_dbm\n", "expected a line of column names"),
        ("x,y,freq_mhz,rss_dbm\n1,2,1.8,-80\n", "give MHz, not GHz"),
        ("x,y,freq_mhz,rss_dbm\n1,2,1800,0\n2,2,1800,-70\n", "line 2, column rss_dbm: 0 dBm or out of range"),
        ("x,y,freq_mhz,rss_dbm\n1,2,1800,80\n2,2,1800,90\n", "looks like path loss"),
        ("lat,lon,freq_mhz,rss_dbm\n111.57,48.14,1800,-80\n", "are latitude and longitude swapped"),
        ("lat,lon,freq_mhz,rss_dbm\nnan,48.14,1800,-80\n", "line 2, column lat: is empty"),
        ("lat,lon,freq_mhz,rss_dbm\n10,179.9,1800,-80\n10,-179.9,1800,-80\n", "antimeridian"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_samples(csv_file(tmp_path, text))


def test_columns_can_be_named_and_negated(tmp_path):
    path = csv_file(tmp_path, "x,y,Loss\n0,0,80\n1,1,90\n")
    samples = read_samples(path, columns={"rss_dbm": "Loss"}, sign=-1, freq_mhz=868.0)
    assert samples.rss_dbm.tolist() == [-80, -90]
    with pytest.raises(UserError, match="no column 'Los': did you mean Loss"):
        read_samples(path, columns={"rss_dbm": "Los"})
    with pytest.raises(UserError, match="unknown column role 'power'"):
        read_samples(path, columns={"power": "Loss"})
    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "none.csv")


def test_parquet_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"x": [0.0, 1.0], "y": [0.0, 2.0], "freq_mhz": [1800, 1800], "rsrp": [-70.0, -75.5]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert read_samples(tmp_path / "d.parquet").rss_dbm.tolist() == [-70.0, -75.5]
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match="not a parquet file"):
        read_samples(tmp_path / "bad.parquet")


@pytest.mark.parametrize("save", ["to_geotiff", "to_cog"])
def test_a_map_that_does_not_fit_on_the_disk_is_refused(save, tmp_path):
    """GDAL alone closes a file that is cut short without a word."""
    resource = pytest.importorskip("resource", reason="limits of files are POSIX's")
    power = np.random.default_rng(0).normal(-90, 9, (1, 60, 70)).astype(np.float32)
    grid = Grid(500000.0, 5300600.0, 10.0, 60, 70)
    found = RadioMap(MapLayout(grid, (1750.0,), None, "EPSG:32632"), {"rss_dbm": power})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(UserError, match="is the disk full"):
            getattr(found, save)(tmp_path / "m.tif")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_map_survives_geotiff(tmp_path):
    """Plane, north-up transform, frequencies, NaN."""
    import rasterio

    found = a_map()
    found.to_geotiff(tmp_path / "m.tif")
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.crs.to_epsg() == 32632
        assert tuple(file.transform)[:6] == (5.0, 0.0, 691000.0, 0.0, -5.0, 5335000.0)
        assert file.descriptions[:3] == ("1750 MHz rss_dbm", "1750 MHz rss_lo", "1750 MHz rss_hi")
    again = read_geotiff(tmp_path / "m.tif")
    assert again.layout == found.layout
    for name, layer in found.layers.items():
        assert np.allclose(again.layers[name], layer, atol=1e-5, equal_nan=True)


def test_a_map_survives_netcdf(tmp_path):
    found = a_map()
    found.to_netcdf(tmp_path / "m.nc")
    again = read_netcdf(tmp_path / "m.nc")
    assert again.layout == found.layout
    for name, layer in found.layers.items():
        assert np.allclose(again.layers[name], layer, atol=1e-5, equal_nan=True)
    dataset = found.to_xarray()
    assert dataset["rss_dbm"].attrs["units"] == "dBm"
    assert float(dataset["rss_dbm"].sel(freq=1750.0, x=691002.5, y=5334997.5)) == found.rss_dbm[0, 0, 0]


def test_netcdf_opens_in_xarray_and_gdal_where_it_lies(tmp_path):
    import pyproj
    import xarray

    found = a_map()
    found.to_netcdf(tmp_path / "m.nc")
    with xarray.open_dataset(tmp_path / "m.nc", decode_coords="all") as opened:
        assert opened["rss_dbm"].encoding["grid_mapping"] == "spatial_ref"
        plane = pyproj.CRS.from_cf(opened["spatial_ref"].attrs)
        assert plane.to_epsg() == 32632
        assert opened["x"].attrs["standard_name"] == "projection_x_coordinate"
        assert opened["rss_dbm"].attrs["units"] == "dBm"
        assert np.allclose(opened["rss_dbm"], found.rss_dbm, atol=1e-5, equal_nan=True)
        assert opened.attrs["Conventions"].startswith("CF-")
    assert found.to_xarray()["spatial_ref"].attrs["grid_mapping_name"] == "transverse_mercator"
    a_map(crs=None).to_netcdf(tmp_path / "n.nc")
    assert read_netcdf(tmp_path / "n.nc").layout.crs is None


def test_a_large_geotiff_is_tiled_with_overviews_and_units(tmp_path):
    import rasterio

    grid = Grid(691000.0, 5335000.0, 5.0, 600, 700)
    power = np.random.default_rng(0).uniform(-90, -50, (1, 600, 700))
    RadioMap(MapLayout(grid, (1750.0,), None, "EPSG:32632"), {"rss_dbm": power}).to_geotiff(tmp_path / "m.tif")
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.profile["tiled"]
        assert file.block_shapes[0] == (256, 256)
        assert file.overviews(1) == [2, 4]
        assert file.units == ("dBm",)
        assert np.allclose(file.read(1), power[0], atol=1e-5)


def test_a_map_as_csv_has_a_line_for_each_free_cell(tmp_path):
    found = a_map(level=None)
    found = RadioMap(found.layout, {"rss_dbm": found.rss_dbm})
    found.to_csv(tmp_path / "m.csv")
    samples = read_samples(tmp_path / "m.csv")
    assert len(samples) == 2 * (63 - 1)
    assert np.array_equal(np.sort(samples.rss_dbm), np.sort(samples_of(found).rss_dbm))
    with pytest.raises(UserError, match="without error bars"):
        _ = found.error_bar


def test_tiles_are_streamed_to_the_same_file(tmp_path):
    found = a_map()
    tiles = [(slice(r, min(7, r + 3)), {n: v[:, r : r + 3] for n, v in found.layers.items()}) for r in (0, 3, 6)]
    from radiogat.maps import write_geotiff, write_netcdf

    write_geotiff(tmp_path / "m.tif", found.layout, iter(tiles))
    write_netcdf(tmp_path / "m.nc", found.layout, iter(tiles))
    for again in (read_geotiff(tmp_path / "m.tif"), read_netcdf(tmp_path / "m.nc")):
        assert np.allclose(again.layers["rss_hi"], found.layers["rss_hi"], atol=1e-5, equal_nan=True)


def test_a_scene_that_would_not_fit_is_refused_with_the_cell_that_would(tmp_path):
    samples = RadioSamples([[0.0, 0], [90000.0, 80000]], 1800.0, [-70.0, -80.0])
    masts = csv_file(tmp_path, "x,y\n10,10\n20,20\n30,30\n", "masts.csv")
    with pytest.raises(UserError, match=r"takes 17\.1 GB with 3 masts, more than 4: give --cell 7\.8"):
        read_scene(None, masts, samples, cell=3.6)
    assert read_scene(None, masts, samples, cell=400.0).grid.cell == 400.0


@pytest.mark.parametrize(
    ("crs", "said"),
    [
        ("EPSG:4326", "is in degrees"),
        ("EPSG:2263", "is in US survey foot"),
        ("EPSG:99999", "not a known"),
        ("utm32", "not a known"),
    ],
)
def test_a_plane_that_is_none_is_refused_before_anything_is_read(tmp_path, crs, said):
    with pytest.raises(UserError, match=said):
        read_samples(tmp_path / "none.csv", crs=crs)


def test_complete_maps_survive_npz(town, tmp_path):
    write_maps(tmp_path / "m.npz", town)
    again = read_maps(f"npz:{tmp_path / 'm.npz'}")
    assert np.allclose(again.rss_dbm, town.rss_dbm, atol=1e-5, equal_nan=True)
    assert again.scene.grid == town.scene.grid
    assert np.array_equal(again.transmitters, town.transmitters)


def test_maps_that_are_cut_short_are_refused(town, tmp_path):
    write_maps(tmp_path / "m.npz", town)
    whole = (tmp_path / "m.npz").read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.npz").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a file of radio maps"):
            read_maps(f"npz:{tmp_path / 'm.npz'}")


def test_the_released_npz_and_the_authors_tree_hold_the_same(released, tmp_path):
    maps = read_maps(f"npz:{released}", 3)
    assert maps.rss_dbm.shape == (5, 433, 531)
    assert 0.05 < maps.building.mean() < 0.062
    with pytest.raises(UserError, match="no area 7; there are 1, 2, 3, 4, 5, 6"):
        read_maps(f"npz:{released}", 7)


def official_tree(root, maps):
    (root / "Strength/2").mkdir(parents=True)
    for f, rss in zip((1750, 2750, 3750, 4750, 5750), maps, strict=True):
        np.savetxt(root / f"Strength/2/{f}.txt", np.nan_to_num(rss), fmt="%.4f")
    np.savetxt(root / "stations_position.txt", [[1, 1, 2, 2, 3, 3], [4, 5, 6, 7, 8, 9]], fmt="%d")
    return root


def test_the_authors_tree_is_read(tmp_path):
    rng = np.random.default_rng(0)
    rss = rng.uniform(-90, -40, (5, 10, 12)).round(4)
    rss[:, 3, 4] = np.nan
    root = official_tree(tmp_path / "tree", rss)
    maps = read_maps(f"official:{root}", 2)
    assert np.array_equal(maps.rss_dbm, rss, equal_nan=True)
    assert maps.transmitters.tolist() == [[3, 4], [5, 6], [7, 8]]
    (root / "Strength/2/3750.txt").write_text("10.5 -")
    with pytest.raises(UserError, match="tree: not the authors' tree of radio maps"):
        read_maps(f"official:{root}", 2)
    (root / "Strength/2/3750.txt").unlink()
    with pytest.raises(UserError, match=r"3750.txt: this band is missing; expected the tree Strength/AREA"):
        read_maps(f"official:{root}", 2)
    with pytest.raises(UserError, match="stations_position.txt: no such file"):
        read_maps(f"official:{tmp_path}", 1)


def test_files_that_are_something_else_are_refused(tmp_path):
    text = csv_file(tmp_path, "no", "x.npz")
    for call, said in (
        (lambda: read_maps(f"npz:{text}"), "not a file of radio maps"),
        (lambda: read_maps("npz:none.npz"), "no such file"),
        (lambda: read_maps("zip:x"), "expected npz:FILE or official:FOLDER"),
        (lambda: read_geotiff(text), "not a raster"),
        (lambda: read_netcdf(text), "not a netCDF file"),
        (lambda: RadioMaps(np.zeros((1, 2, 2)), (1750.0,), np.empty((0, 2))), "mark missing ones by NaN"),
    ):
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.parametrize("module", ["rasterio", "netCDF4", "pyarrow", "pyogrio", "xarray"])
def test_a_missing_library_is_named_with_its_extra(module, tmp_path, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == module else real(name, *a))
    found = a_map()
    (tmp_path / "d.parquet").write_text("x")
    calls = {
        "rasterio": lambda: found.to_geotiff(tmp_path / "m.tif"),
        "netCDF4": lambda: found.to_netcdf(tmp_path / "m.nc"),
        "pyarrow": lambda: read_samples(tmp_path / "d.parquet"),
        "pyogrio": lambda: polygons_on(tmp_path / "b.shp", found.layout.grid, None),
        "xarray": found.to_xarray,
    }
    with pytest.raises(
        MissingExtraError, match=rf'needs {module}, which is not installed; pip install "radiogat\[geo\]"'
    ):
        calls[module]()
