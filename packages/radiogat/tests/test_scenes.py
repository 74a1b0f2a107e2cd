"""Rasters and shapes as planners have them: what is in them counts, and what was made of them is said."""

import json
import warnings

import numpy as np
import pytest
from radiogat.cli import main
from radiogat.config import CityConfig
from radiogat.data import read_maps, read_points, read_samples, read_scene, write_maps
from radiogat.estimator import RadioMapEstimator
from radiogat.maps import MapLayout, RadioMap, read_netcdf
from radiogat.planes import moved, project, unproject
from radiogat.rasters import read_buildings, read_cells, read_geotiff
from radiogat.samples import Grid, RadioSamples
from radiogat.shapes import polygons_on
from radiogat.simulate import city

from tenfold import UserError
from tenfold.testing import assert_user_error

X, Y = 691000.0, 5335000.0
UTM = "EPSG:32632"
MUNICH = (11.57, 48.14)
TWO = RadioSamples([[X + 50, Y - 50], [X + 150, Y - 150]], 1800.0, [-70.0, -80.0], UTM)


def raster(path, values, crs=UTM, transform=(10.0, 0.0, X, 0.0, -10.0, Y), **more):
    """A GeoTIFF of values (H, W) or (bands, H, W); ``more`` are scales, offsets, units, descriptions, tags, nodata."""
    import rasterio
    from rasterio.transform import Affine

    values = np.asarray(values)
    bands = values if values.ndim == 3 else values[None]
    profile = {"driver": "GTiff", "height": bands.shape[1], "width": bands.shape[2], "count": len(bands)}
    profile |= {"dtype": str(bands.dtype), "crs": crs, "nodata": more.pop("nodata", None)}
    with rasterio.open(path, "w", transform=Affine(*transform), **profile) as file:
        file.write(bands)
        for name, value in more.items():
            setattr(file, name, value)
    return path


def said(call):
    """What a call returns, and its warnings as one text."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = call()
    return out, " | ".join(str(w.message) for w in found if w.category is UserWarning)


def geojson(path, *geometries, properties=None, **more):
    properties = properties or [{}] * len(geometries)
    features = [
        {"type": "Feature", "properties": p, "geometry": g} for g, p in zip(geometries, properties, strict=True)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}), encoding="utf-8")
    return path


def box(x, y, width, height, z=None):
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    ring = ring if z is None else [[*p, z] for p in ring]
    return {"type": "Polygon", "coordinates": [ring]}


def lonlat(geometry):
    """A geometry of UTM in degrees."""
    rings = [unproject(np.array(ring)[:, :2], UTM).tolist() for ring in geometry["coordinates"]]
    return {"type": "Polygon", "coordinates": rings}


# Rasters of power


def test_scale_offset_and_nodata_of_a_band_are_applied_and_its_unit_is_read(tmp_path):
    """Centi-dB above -100 dBm as 16-bit numbers, as GDAL's users pack them."""
    raw = np.array([[0, 1000, 2550], [-32768, 4000, 1]], dtype=np.int16)
    more = {"scales": [0.01], "offsets": [-100.0], "units": ["dBm"], "descriptions": ["1.8 GHz"], "nodata": -32768}
    path = raster(tmp_path / "p.tif", raw, **more)
    expected = [[-100, -90, -74.5], [np.nan, -60, -99.99]]
    found = read_geotiff(path)
    assert found.layout.freq_mhz == (1800.0,)
    assert np.allclose(found.rss_dbm[0], expected, equal_nan=True)
    assert np.allclose(np.sort(read_cells(path).rss_dbm), [-100, -99.99, -90, -74.5, -60])
    watts = raster(tmp_path / "w.tif", raw, **(more | {"units": ["mW"]}))
    with pytest.raises(UserError, match="band 1 is in mW, expected dBm"):
        read_geotiff(watts)


def test_two_bands_of_one_frequency_are_never_one(tmp_path):
    path = raster(tmp_path / "p.tif", np.full((2, 3, 3), -70.0), descriptions=["1800 MHz site A", "1800 MHz site B"])
    for read in (read_geotiff, read_cells):
        with pytest.raises(UserError, match=r"bands 1 and 2 are both 1800 MHz: keep one.*gdal_translate -b 2"):
            read(path)


def test_a_band_that_says_no_frequency_takes_the_given_one(tmp_path):
    path = raster(tmp_path / "p.tif", np.full((3, 3), -70.0))
    with pytest.raises(UserError, match="describe it as '1750 MHz', or give --freq_mhz"):
        read_cells(path)
    assert read_cells(path, freq_mhz=868.0).bands == (868.0,)
    assert read_geotiff(raster(tmp_path / "l.tif", np.full((3, 3), 70.0)), freq_mhz=868.0, sign=-1).rss_dbm.max() == -70


def test_a_south_up_raster_is_turned(tmp_path):
    values = np.arange(12.0).reshape(3, 4) - 90
    up = raster(tmp_path / "n.tif", values, descriptions=["1800 MHz"])
    low = (10.0, 0.0, X, 0.0, 10.0, Y - 30)
    down = raster(tmp_path / "s.tif", values[::-1], transform=low, descriptions=["1800 MHz"])
    one, other = read_geotiff(up), read_geotiff(down)
    assert one.layout == other.layout
    assert np.array_equal(one.rss_dbm, other.rss_dbm)
    a, b = read_cells(up), read_cells(down)
    order = [np.lexsort(s.xy.T) for s in (a, b)]
    assert np.array_equal(a.xy[order[0]], b.xy[order[1]])
    assert np.array_equal(a.rss_dbm[order[0]], b.rss_dbm[order[1]])
    assert np.array_equal(read_buildings(up).mask, read_buildings(down).mask)


def test_measurements_of_a_raster_in_degrees_keep_their_own_places(tmp_path):
    """Nothing is resampled: as many values as cells, at the projected centers."""
    values = np.arange(12.0).reshape(3, 4) - 90
    step = 1e-4
    path = raster(
        tmp_path / "d.tif", values, "EPSG:4326", (step, 0, MUNICH[0], 0, -step, MUNICH[1]), descriptions=["1800 MHz"]
    )
    samples, text = said(lambda: read_cells(path))
    assert "lies in EPSG:4326: the centers of its cells are moved to EPSG:32632" in text
    lon = MUNICH[0] + (np.arange(4) + 0.5) * step
    lat = MUNICH[1] - (np.arange(3) + 0.5) * step
    expected = project(np.tile(lon, 3), np.repeat(lat, 4), UTM)
    assert np.allclose(samples.xy, expected, atol=1e-6)
    assert samples.rss_dbm.tolist() == values.ravel().tolist()
    found, text = said(lambda: read_geotiff(path))
    assert "each with the value of the nearest of the 3 x 4" in text
    at = found.layout.grid.rowcol(expected)
    assert np.array_equal(found.rss_dbm[0][at[:, 0], at[:, 1]], values.ravel())


def test_values_that_no_power_has_are_refused_or_dropped_with_a_count(tmp_path):
    values = np.array([[0.0, -70, 9999], [-80, -90, -70.5]])
    path = raster(tmp_path / "p.tif", values, descriptions=["1800 MHz"])
    with pytest.raises(UserError, match=r"2 cells hold values that no power has \(0\): --missing drop"):
        read_cells(path)
    samples, text = said(lambda: read_cells(path, missing="drop"))
    assert len(samples) == 4
    assert "2 cells are left out" in text


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crs": None}, "has no coordinate system: assign one"),
        ({"transform": (10.0, 1.0, X, 1.0, -10.0, Y)}, "is rotated"),
        ({"transform": (-10.0, 0.0, X, 0.0, -10.0, Y)}, "its columns go from east to west"),
    ],
)
def test_a_raster_that_cannot_be_placed_is_refused(tmp_path, change, message):
    path = raster(tmp_path / "b.tif", np.zeros((4, 4), np.uint8), **change)
    with pytest.raises(UserError, match=message):
        read_buildings(path)


def test_a_netcdf_with_rising_y_and_gigahertz_is_the_same_map(tmp_path):
    import netCDF4

    grid = Grid(X, Y, 5.0, 3, 4)
    power = np.arange(12.0).reshape(1, 3, 4) - 90
    RadioMap(MapLayout(grid, (1800.0,), None, UTM), {"rss_dbm": power}).to_netcdf(tmp_path / "m.nc")
    with netCDF4.Dataset(tmp_path / "m.nc", "a") as file:
        file["y"][:] = file["y"][::-1]
        file["rss_dbm"][:] = file["rss_dbm"][:, ::-1]
        file["freq"][:], file["freq"].units = [1.8], "GHz"
        file.delncattr("crs")  # as other software writes it: the grid mapping alone
    again = read_netcdf(tmp_path / "m.nc")
    assert again.layout == MapLayout(grid, (1800.0,), None, UTM)
    assert np.array_equal(again.rss_dbm, power)


# Buildings from rasters


def test_buildings_come_from_a_raster(tmp_path):
    values = np.zeros((20, 30), np.uint8)
    values[5:9, 10:15] = 1
    path = raster(tmp_path / "b.tif", values)
    masts = tmp_path / "masts.csv"
    masts.write_text(f"x,y\n{X + 100},{Y - 100}\n", encoding="utf-8")
    scene, text = said(lambda: read_scene(path, masts, TWO))
    assert "20 of 600 cells are built up" in text
    assert np.array_equal(scene.building, values != 0)
    assert scene.grid == Grid(X, Y, 10.0, 20, 30)
    assert scene.depth.shape == (1, 20, 30)
    with pytest.raises(UserError, match="100% of the samples lie outside"):
        read_scene(path, None, RadioSamples(TWO.xy + 9e5, 1800.0, TWO.rss_dbm, UTM))


def test_buildings_in_another_plane_are_moved_and_it_is_said(tmp_path):
    """The same blocks from a raster of the next zone, from one in degrees, and from one whose cells are not square."""
    values = np.zeros((40, 40), np.uint8)
    values[10:20, 5:25] = 1
    area = 200 * 100.0
    corner = moved([[X, Y]], UTM, "EPSG:32633")[0]
    lon, lat = unproject([[X, Y]], UTM)[0]
    cases = {
        "z": ("EPSG:32633", (10.0, 0, corner[0], 0, -10.0, corner[1]), "lies in EPSG:32633: laid on", area),
        "d": ("EPSG:4326", (1.34e-4, 0, lon, 0, -9e-5, lat), "lies in EPSG:4326: laid on", area),
        "s": (UTM, (10.0, 0, X, 0, -20.0, Y), "cells that are not square: laid on", 2 * area),
    }
    for name, (crs, transform, expected, size) in cases.items():
        path = raster(tmp_path / f"{name}.tif", values, crs, transform)
        scene, text = said(lambda path=path: read_scene(path, None, TWO))
        assert expected in text, name
        assert scene.crs == UTM
        assert scene.building.sum() * scene.grid.cell**2 == pytest.approx(size, rel=0.03), name
    finer, _ = said(lambda: read_scene(tmp_path / "d.tif", None, TWO, cell=4.0))
    assert finer.grid.cell == 4.0


def test_cells_without_a_value_count_as_free_and_it_is_said(tmp_path):
    values = np.zeros((20, 30), np.uint8)
    values[5:9, 10:15], values[0, :7] = 1, 255
    path = raster(tmp_path / "b.tif", values, nodata=255)
    scene, text = said(lambda: read_scene(path, None, TWO))
    assert "20 of 600 cells are built up, 7 have no value and count as free" in text
    assert scene.building.sum() == 20
    with pytest.raises(UserError, match="no cell is built up, so that it would have no effect"):
        read_scene(raster(tmp_path / "none.tif", np.zeros((20, 30), np.uint8)), None, TWO)


def test_a_raster_that_would_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = raster(tmp_path / "b.tif", np.ones((20, 30), np.uint8))
    monkeypatch.setattr("radiogat.data._MOST_GB", 1e-9)
    monkeypatch.setattr("radiogat.rasters.values_of", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="a scene of 20 x 30 cells of 10 m takes"):
        read_scene(path, None, TWO)


# Footprints


def test_polygons_with_holes_are_rasterized(tmp_path):
    square = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
    hole = [[3, 3], [7, 3], [7, 7], [3, 7], [3, 3]]
    far = [[15, 15], [20, 15], [20, 20], [15, 15]]
    path = geojson(
        tmp_path / "b.geojson",
        {"type": "Polygon", "coordinates": [square, hole]},
        {"type": "MultiPolygon", "coordinates": [[far]]},
    )
    mask, text = said(lambda: polygons_on(path, Grid(0, 20, 1, 20, 20), None))
    assert mask[10:, :10].sum() == 100 - 16
    assert not mask[13:17, 3:7].any()
    assert 8 < mask[:5, 15:].sum() < 17
    assert "by 2 of 2 shapes" in text
    (tmp_path / "c.geojson").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="not a file of shapes that can be read"):
        polygons_on(tmp_path / "c.geojson", Grid(0, 20, 1, 20, 20), None)


def test_rasterized_footprints_equal_a_literal_test_of_every_center(tmp_path):
    import shapely

    rng = np.random.default_rng(0)
    shapes = [
        shapely.convex_hull(shapely.MultiPoint(rng.uniform(0, 30, 2) + rng.normal(0, 4, (6, 2)))) for _ in range(9)
    ]
    path = geojson(tmp_path / "b.geojson", *(json.loads(shapely.to_geojson(shape)) for shape in shapes))
    grid = Grid(0, 30, 1, 30, 30)
    mask, _ = said(lambda: polygons_on(path, grid, None))
    centers = grid.centers()
    inside = np.any([shapely.contains_xy(shape, *centers.T) for shape in shapes], axis=0)
    assert (mask.ravel() != inside).mean() < 0.002  # a center on an edge may fall to either side


def test_polygons_in_degrees_meet_the_samples(tmp_path):
    lon, lat = MUNICH
    path = geojson(tmp_path / "b.geojson", box(lon, lat, 0.001, 0.001))
    drive = tmp_path / "drive.csv"
    rows = [f"{lat - 0.001},{lon - 0.001},1800,-70", f"{lat + 0.002},{lon + 0.002},1800,-80"]
    drive.write_text("\n".join(["lat,lon,freq_mhz,rss_dbm", *rows]) + "\n", encoding="utf-8")
    samples = read_samples(drive)
    scene, text = said(lambda: read_scene(path, None, samples, cell=5.0))
    assert "cells are built up, by 1 of 1 shapes" in text
    assert scene.building.sum() * 25 == pytest.approx(74.4 * 111.2, rel=0.03)
    assert np.allclose(read_points(drive, samples.crs), samples.xy)


def test_collections_null_geometries_heights_lines_and_doubled_points_are_read(tmp_path):
    inner = {"type": "GeometryCollection", "geometries": [box(0, 0, 10, 10, z=3)]}
    line = {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}
    outer = {"type": "GeometryCollection", "geometries": [inner, line]}
    doubled = {"type": "Polygon", "coordinates": [[[12, 0], [12, 0], [15, 0], [15, 4], [15, 4], [12, 4], [12, 0]]]}
    path = geojson(tmp_path / "b.geojson", outer, None, doubled)
    mask, text = said(lambda: polygons_on(path, Grid(0, 20, 1, 20, 20), None))
    assert mask.sum() == 100 + 12
    assert "1 without a geometry, 1 are points or lines" in text


def test_projected_geojson_is_placed_by_the_plane_that_it_names(tmp_path):
    named = {"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}}
    corner = moved([[X + 5, Y - 15]], UTM, "EPSG:32633")[0]
    path = geojson(tmp_path / "b.geojson", box(*corner, 10, 10), **named)
    mask, text = said(lambda: polygons_on(path, Grid(X, Y, 1, 20, 20), UTM))
    assert mask.sum() == pytest.approx(100, abs=8)
    assert "100 of" in text or mask.sum() != 100


def test_positions_that_are_no_degrees_need_a_plane_or_must_lie_on_the_map(tmp_path):
    path = geojson(tmp_path / "b.geojson", box(X + 5, Y - 15, 10, 10))
    mask, text = said(lambda: polygons_on(path, Grid(X, Y, 1, 20, 20), UTM))
    assert mask.sum() == 100
    assert "names no coordinate system: its positions are taken as those of EPSG:32632" in text
    away = geojson(tmp_path / "c.geojson", box(4468000, 5333000, 10, 10))
    with pytest.raises(UserError, match="do not lie on the map as positions of EPSG:32632: give it one"):
        polygons_on(away, Grid(X, Y, 1, 20, 20), UTM)


def test_what_lies_outside_or_is_too_small_is_counted(tmp_path):
    shapes = [box(X + 5, Y - 15, 10, 10), box(X + 900, Y, 10, 9), box(X + 2.6, Y - 18.4, 0.3, 0.3)]
    shapes.append(box(X + 6, Y - 14, 2, 2))  # within the first
    path = geojson(tmp_path / "b.geojson", *map(lonlat, shapes))
    mask, text = said(lambda: polygons_on(path, Grid(X, Y, 1, 20, 20), UTM))
    assert mask.sum() == 100
    assert "100 of 400 cells are built up, by 2 of 4 shapes (1 outside of the map, 1 cover no cell's center)" in text


def test_buildings_without_any_effect_are_an_error(tmp_path):
    path = geojson(tmp_path / "b.geojson", box(20, 50, 0.1, 0.1))
    with pytest.raises(UserError, match=r"none of its 1 shapes covers.*\(1 outside of the map\).*no effect"):
        read_scene(path, None, TWO)


def test_of_openstreetmaps_shapes_those_with_the_tag_building_count(tmp_path):
    shapes = [box(X + 5, Y - 15, 10, 10), box(X, Y - 20, 20, 20), box(X + 1, Y - 2, 1, 1)]
    tags = [{"building": "yes"}, {"landuse": "grass"}, {"building": "no"}]
    path = geojson(tmp_path / "b.geojson", *map(lonlat, shapes), properties=tags)
    mask, text = said(lambda: polygons_on(path, Grid(X, Y, 1, 20, 20), UTM))
    assert mask.sum() == 100
    assert "2 without the tag building" in text


def written(path, geometries, crs, layer=None, **more):
    """A file of pyogrio's."""
    import pyogrio
    import shapely

    shapes = np.array([shapely.from_geojson(json.dumps(g)) for g in geometries])
    kind = more.pop("geometry_type", "Polygon")
    pyogrio.raw.write(
        path, shapely.to_wkb(shapes), [], np.array([], dtype=object), geometry_type=kind, crs=crs, layer=layer, **more
    )
    return path


@pytest.mark.parametrize("ending", ["shp", "gpkg", "fgb"])
def test_footprints_of_every_format_give_the_same_buildings(tmp_path, ending):
    shapes = [box(X + 5, Y - 15, 10, 10)]
    grid = Grid(X, Y, 1, 20, 20)
    path = written(tmp_path / f"b.{ending}", shapes, UTM)
    mask, _ = said(lambda: polygons_on(path, grid, UTM))
    other, _ = said(lambda: polygons_on(geojson(tmp_path / "b.geojson", *map(lonlat, shapes)), grid, UTM))
    assert mask.sum() == 100
    assert np.array_equal(mask, other)
    if ending == "shp":
        (tmp_path / "b.prj").unlink()  # a shapefile without its plane
        again, text = said(lambda: polygons_on(path, grid, UTM))
        assert np.array_equal(again, mask)
        assert "names no coordinate system" in text


def test_a_geopackage_with_several_layers_asks_which(tmp_path):
    path = written(tmp_path / "city.gpkg", [box(X + 5, Y - 15, 10, 10)], UTM, "houses")
    written(path, [box(X, Y - 20, 20, 20)], UTM, "parks", append=True)
    line = [{"type": "LineString", "coordinates": [[X, Y], [X + 5, Y]]}]
    written(path, line, UTM, "roads", append=True, geometry_type="LineString")
    grid = Grid(X, Y, 1, 20, 20)
    with pytest.raises(UserError, match=r"2 layers may hold buildings, houses, parks: give .*city.gpkg:LAYER"):
        polygons_on(path, grid, UTM)
    assert said(lambda: polygons_on(f"{path}:houses", grid, UTM))[0].sum() == 100
    with pytest.raises(UserError, match="no layer 'house': did you mean houses"):
        polygons_on(f"{path}:house", grid, UTM)
    with pytest.raises(UserError, match="no such file"):
        polygons_on(tmp_path / "none.gpkg", grid, UTM)


def test_masts_far_from_the_measurements_are_said(tmp_path):
    masts = tmp_path / "masts.csv"
    masts.write_text(f"x,y\n{X + 100},{Y - 100}\n{X + 5000},{Y}\n", encoding="utf-8")
    scene, text = said(lambda: read_scene(None, masts, TWO, cell=10.0))
    assert "1 of 2 masts lie farther from the measurements than these extend, up to 4.85e+03 m" in text
    assert len(scene.transmitters) == 2


# Through the commands


@pytest.mark.parametrize(
    ("crs", "message"),
    [
        ("EPSG:4326", "is in degrees, expected a plane in meters"),
        ("EPSG:2263", "is in US survey foot"),
        ("EPSG:99999", "not a known coordinate system"),
        ("utm32", "not a known coordinate system"),
    ],
)
@pytest.mark.parametrize("data", ["city", "csv:none.csv", "geotiff:none.tif", "npz:none.npz"])
def test_the_plane_is_checked_before_anything_is_read_or_computed(crs, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RadioMapEstimator, "fit", lambda *_: pytest.fail("trained"))
    verbs = ["convert"] if data != "city" else []
    for verb in [*verbs, "train", "evaluate"]:
        words = [verb, "--data", data, "--crs", crs, "--out", str(tmp_path / "o")]
        assert_user_error(main, words, capsys, message)


def test_a_plane_that_stretches_distances_is_named():
    from radiogat.planes import check_plane

    with pytest.warns(UserWarning, match="Pseudo-Mercator. stretches distances"):
        check_plane("EPSG:3857")


@pytest.mark.filterwarnings("default::UserWarning")  # said, not raised
def test_converting_keeps_every_measurement_or_says_what_it_merged(tmp_path, capsys):
    rows = [f"{X + 3 * i},{Y},1800,{-60 - i}" for i in range(40)] + [f"{X},{Y},1800,-62"]
    drive = tmp_path / "drive.csv"
    drive.write_text("\n".join(["x,y,freq_mhz,rss_dbm", *rows]) + "\n", encoding="utf-8")
    words = ["convert", "--data", f"csv:{drive}", "--crs", UTM]
    assert main([*words, "--to", "csv", "--out", str(tmp_path / "c")]) == 0
    captured = capsys.readouterr()
    assert "40 measurements" in captured.out
    assert (
        "1 places were measured several times at one frequency: their medians are taken, 40 values of 41"
        in captured.err
    )
    assert main([*words, "--to", "geotiff", "--cell", "6", "--out", str(tmp_path / "t")]) == 0
    assert "40 measurements became 21 cells, by their medians" in capsys.readouterr().err
    assert main([*words, "--to", "geotiff", "--cell", "1.5", "--out", str(tmp_path / "f")]) == 0
    assert "became" not in capsys.readouterr().err
    again = read_cells(tmp_path / "f/map.tif")
    assert sorted(again.rss_dbm) == pytest.approx(sorted([-61.0, *(-60.0 - i for i in range(1, 40))]), abs=1e-4)


@pytest.mark.filterwarnings("default::UserWarning")
def test_no_value_and_building_are_two_things(tmp_path, capsys):
    """A map with unmeasured cells and buildings comes back from each format with both; without buildings nothing is built."""
    maps = city(CityConfig(size=40, freq_mhz=(1800.0,), seed=1))
    rss = maps.rss_dbm.copy()
    rss[0, :5, :5] = np.nan  # nobody measured here
    write_maps(tmp_path / "m.npz", type(maps)(rss, maps.freq_mhz, maps.transmitters, "m", maps.cell, maps.building))
    assert not maps.building[:5, :5].all()
    source = f"npz:{tmp_path / 'm.npz'}"
    for to, name in (("geotiff", "map.tif"), ("netcdf", "map.nc")):
        words = ["convert", "--data", source, "--crs", UTM, "--to", to, "--out", str(tmp_path / to)]
        assert main(words) == 0
        words = ["convert", "--data", f"{to}:{tmp_path / to / name}", "--to", "npz", "--out", str(tmp_path / f"{to}2")]
        assert main(words) == 0
        again = read_maps(f"npz:{tmp_path / f'{to}2' / 'maps.npz'}")
        assert np.array_equal(again.building, maps.building)
        assert np.allclose(again.rss_dbm, rss, atol=1e-4, equal_nan=True)
    plain = RadioMap(MapLayout(maps.scene.grid, maps.freq_mhz, None, UTM), {"rss_dbm": rss})
    plain.to_geotiff(tmp_path / "plain.tif")
    capsys.readouterr()
    words = ["convert", "--data", f"geotiff:{tmp_path / 'plain.tif'}", "--to", "npz"]
    assert main([*words, "--out", str(tmp_path / "n")]) == 0
    empty = int(np.isnan(rss).sum())
    assert f"its {empty} cells without a value count as unmeasured; --buildings FILE" in capsys.readouterr().err
    assert not read_maps(f"npz:{tmp_path / 'n/maps.npz'}").building.any()
    values = maps.building.astype(np.uint8)
    raster(tmp_path / "b.tif", values, UTM, (maps.cell, 0, 0.0, 0, -maps.cell, 0.0))
    assert main([*words, "--buildings", str(tmp_path / "b.tif"), "--out", str(tmp_path / "w")]) == 0
    assert np.array_equal(read_maps(f"npz:{tmp_path / 'w/maps.npz'}").building, maps.building)


@pytest.mark.filterwarnings("default::UserWarning")
def test_measurements_outside_of_the_buildings_raster_are_counted(tmp_path, capsys):
    values = np.zeros((20, 30), np.uint8)
    values[5:9, 10:15] = 1
    path = raster(tmp_path / "b.tif", values)
    drive = tmp_path / "drive.csv"
    rows = [f"{X + 10 * i + 5},{Y - 25},1800,{-60 - i}" for i in range(32)]
    drive.write_text("\n".join(["x,y,freq_mhz,rss_dbm", *rows]) + "\n", encoding="utf-8")
    words = ["convert", "--data", f"csv:{drive}", "--crs", UTM, "--buildings", str(path), "--to", "geotiff"]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    assert "2 of 32 measurements lie outside of the buildings' raster and are left out" in capsys.readouterr().err
    found = read_geotiff(tmp_path / "o/map.tif")
    assert np.isfinite(found.rss_dbm).sum() == 30
    assert np.array_equal(found.layout.building, values != 0)


def test_a_netcdf_with_its_dimensions_in_another_order_is_the_same_map(tmp_path):
    """A cube of equal sides would have been read transposed, in silence."""
    import netCDF4

    power = np.arange(27.0).reshape(3, 3, 3) - 90
    with netCDF4.Dataset(tmp_path / "m.nc", "w") as file:
        for name, values in (
            ("freq", [2600, 1800, 800]),
            ("y", Y - 5 - 10 * np.arange(3.0)),
            ("x", X + 5 + 10 * np.arange(3.0)),
        ):
            file.createDimension(name, 3)
            file.createVariable(name, "f8", (name,))[:] = values
        file.createVariable("rss_dbm", "f8", ("y", "x", "freq"))[:] = power.transpose(1, 2, 0)
    found = read_netcdf(tmp_path / "m.nc")
    assert found.layout.freq_mhz == (800.0, 1800.0, 2600.0)
    assert np.array_equal(found.rss_dbm, power[::-1])


@pytest.mark.parametrize(
    ("name", "unit", "said"),
    [
        ("rss_dbm", "mW", "rss_dbm is in mW, expected dBm"),
        ("x", "km", "x is in km, expected meters"),
        ("y", "degrees_north", "y is in degrees_north, expected meters"),
        ("freq", "THz", "freq is in THz, expected MHz"),
    ],
)
def test_a_netcdf_in_other_units_is_refused(tmp_path, name, unit, said):
    import netCDF4

    RadioMap(MapLayout(Grid(X, Y, 5.0, 3, 4), (1800.0,), None, UTM), {"rss_dbm": np.full((1, 3, 4), -70.0)}).to_netcdf(
        tmp_path / "m.nc"
    )
    with netCDF4.Dataset(tmp_path / "m.nc", "a") as file:
        file[name].units = unit
    with pytest.raises(UserError, match=said):
        read_netcdf(tmp_path / "m.nc")


@pytest.mark.parametrize(
    ("description", "mhz"),
    [
        ("1842.5 MHz", 1842.5),
        ("1,8 GHz", 1800.0),
        ("RSRP_1800MHz", 1800.0),
        ("868000 kHz, dBm", 868.0),
        ("20 MHz at 1842.5 MHz", None),
        ("1,842.5 MHz", None),
        ("n78", None),
    ],
)
def test_the_frequency_in_a_bands_description_is_one_or_none(tmp_path, description, mhz):
    """With a decimal comma 1,8 GHz was 8 GHz, and of several frequencies the first counted."""
    path = raster(tmp_path / "p.tif", np.full((3, 3), -70.0), descriptions=[description])
    if mhz is None:
        with pytest.raises(UserError, match="no frequency; describe it as"):
            read_geotiff(path)
    else:
        assert read_geotiff(path).layout.freq_mhz == (mhz,)


def test_values_outside_of_a_given_range_are_no_measurements_of_a_raster(tmp_path):
    path = raster(tmp_path / "p.tif", np.array([[-140.0, -70, -80]]), descriptions=["1800 MHz"])
    samples, text = said(lambda: read_cells(path, missing="drop", range=(-120.0, -20.0)))
    assert samples.rss_dbm.tolist() == [-70, -80]
    assert "1 cells are left out" in text
    marked = raster(tmp_path / "m.tif", np.array([[-128.0, -70, -128, -80, -128]]), descriptions=["1800 MHz"])
    assert "-128 stands 3 times, 48 dB from every other value" in said(lambda: read_cells(marked))[1]


def test_measurements_in_buildings_are_said_where_they_are_many(tmp_path):
    """As where footprints are shifted."""
    inside = geojson(tmp_path / "b.geojson", lonlat(box(X + 40, Y - 60, 20, 20)))
    _, text = said(lambda: read_scene(inside, None, TWO, cell=5.0))
    assert "1 of 2 measurements lie in buildings: are both of one place and plane?" in text
    beside = geojson(tmp_path / "c.geojson", lonlat(box(X + 90, Y - 120, 20, 20)))
    assert "lie in buildings" not in said(lambda: read_scene(beside, None, TWO, cell=5.0))[1]
