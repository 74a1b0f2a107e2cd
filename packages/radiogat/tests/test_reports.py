"""What people reported of the tools around this job, tried here: the public thread stands with each case."""

import json

import numpy as np
import pytest
from radiogat.baselines import RBF, LocalKriging, PooledKriging
from radiogat.data import read_samples
from radiogat.rasters import read_cells, read_geotiff
from radiogat.samples import Grid, RadioSamples
from radiogat.shapes import polygons_on

from tenfold import UserError

UTM = "EPSG:32632"
X, Y = 691000.0, 5335000.0


def geotiff(path, values, transform, **more):
    import rasterio
    from rasterio.transform import Affine

    profile = {"driver": "GTiff", "height": values.shape[0], "width": values.shape[1], "count": 1, "crs": UTM}
    with rasterio.open(path, "w", transform=Affine(*transform), dtype=str(values.dtype), **profile) as file:
        file.write(values, 1)
        for name, value in {"descriptions": ["1800 MHz"], **more}.items():
            setattr(file, name, value)
    return path


def lines(path, *rows):
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_scale_in_a_geotiff_is_applied(tmp_path):
    """rasterio/rasterio#2219: values came back unscaled."""
    values = np.array([[-7000, -8050]], dtype=np.int16)
    path = geotiff(tmp_path / "a.tif", values, (10.0, 0, X, 0, -10.0, Y), scales=[0.01])
    assert read_cells(path).rss_dbm.tolist() == [-70.0, -80.5]


def test_a_positive_step_in_y_does_not_turn_the_map_over(tmp_path):
    """rasterio/rasterio#1661, perrygeo/python-rasterstats#98: arrays upside down."""
    values = np.array([[-70.0], [-80.0]])
    path = geotiff(tmp_path / "a.tif", values, (10.0, 0, X, 0, 10.0, Y))
    samples = read_cells(path)
    assert samples.xy[samples.rss_dbm == -80.0][0, 1] == Y + 15
    assert read_geotiff(path).rss_dbm[0].ravel().tolist() == [-80.0, -70.0]


def test_the_first_of_several_layers_is_not_taken_unasked(tmp_path):
    """geopandas/pyogrio#355: a file with several layers gave the first."""
    import pyogrio
    import shapely

    path = tmp_path / "a.gpkg"
    for layer, shape in (("parks", shapely.box(X, Y - 9, X + 9, Y)), ("buildings", shapely.box(X, Y - 3, X + 3, Y))):
        binary = shapely.to_wkb(np.array([shape]))
        more = {"append": True} if path.exists() else {}
        pyogrio.raw.write(path, binary, [], [], geometry_type="Polygon", crs=UTM, layer=layer, **more)
    grid = Grid(X, Y, 1, 9, 9)
    with pytest.raises(UserError, match="2 layers may hold buildings"):
        polygons_on(path, grid, UTM)
    with pytest.warns(UserWarning, match="9 of 81 cells"):
        assert polygons_on(f"{path}:buildings", grid, UTM).sum() == 9


def test_features_without_a_geometry_and_rings_with_doubled_points_do_not_stop_the_rest(tmp_path):
    """datapink/robosat.pink#47, Toblerity/Fiona#789, kekscom/osmbuildings#123."""
    ring = [[0, 0], [0, 0], [4, 0], [4, 4], [4, 4], [4, 4], [0, 4], [0, 0]]
    shapes = [None, {"type": "Polygon", "coordinates": [ring]}, {"type": "Polygon", "coordinates": []}]
    features = [{"type": "Feature", "properties": {}, "geometry": shape} for shape in shapes]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    with pytest.warns(UserWarning, match="16 of 81 cells are built up, by 1 of 1 shapes .2 without a geometry."):
        assert polygons_on(path, Grid(0, 9, 1, 9, 9), None).sum() == 16


def test_places_that_repeat_or_almost_do_make_no_singular_system():
    """GeoStat-Framework/PyKrige#150, #87, #160: LinAlgError: singular matrix."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 100, (40, 2))
    twice = np.concatenate([xy, xy + 1e-9, np.stack([np.linspace(0, 100, 40), np.full(40, 50.0)], axis=1)])
    samples = RadioSamples(twice, 1800.0, -70 + rng.normal(0, 3, len(twice)))
    at = np.concatenate([rng.uniform(0, 100, (200, 2)), twice])
    for method in (LocalKriging(), PooledKriging(), RBF(neighbors=20)):
        found = method.fit(samples).predict(at, 1800.0)
        assert np.isfinite(found).all(), method
        if not isinstance(method, RBF):
            assert found.min() > -100
            assert found.max() < -40


def test_rows_of_an_export_without_a_position_are_counted(tmp_path):
    """mozilla/ichnaea#335: the last rows of an export had no latitude, longitude and time."""
    rows = [
        f"LTE,310,120,23318,19089766{i},,-81.5{i},28.5{i},100,9,1,1415319088,1415319088,{-90 - i}" for i in range(3)
    ]
    rows += ["LTE,310,120,23318,190897666,,,,,1,1,1415319088,,", "LTE,310,410,3335,204849928,309,,,,11,1,1415319164,,"]
    path = lines(tmp_path / "mls.csv", *rows)
    with pytest.raises(UserError, match=r"line 4, column lon: is empty \(and 1 more rows\).*--missing drop"):
        read_samples(path, freq_mhz=1900.0, by="cell", only=["190897660", "190897666", "204849928"])
    with pytest.warns(UserWarning, match="2 of 5 rows are left out"):
        samples = read_samples(path, freq_mhz=1900.0, missing="drop", by="unit")
    assert samples.rss_dbm.tolist() == [-90, -91, -92]


def test_rows_with_one_field_less_than_the_header_are_read_by_position(tmp_path):
    """ttnmapper/ttnmapper-web#13: twenty names, nineteen fields."""
    head = "time,nodeaddr,latitude,longitude,frequency,rssi,snr,hdop,sats,location_provider,user_agent,experiment_name"
    rows = [f"2021-09-19T10:00:0{i}Z,n1,48.14,11.5{i},868.1,{-100 - i},5,,,,android" for i in range(3)]
    samples = read_samples(lines(tmp_path / "t.csv", head, *rows))
    assert samples.rss_dbm.tolist() == [-100, -101, -102]
    assert samples.bands == (868.1,)


def test_wigles_older_export_without_frequencies_and_with_cells_of_channel_zero(tmp_path):
    """CellularPrivacy/Android-IMSI-Catcher-Detector#751: eleven columns, Wi-Fi and GSM in one table."""
    head = (
        "MAC,SSID,AuthMode,FirstSeen,Channel,RSSI,CurrentLatitude,CurrentLongitude,AltitudeMeters,AccuracyMeters,Type"
    )
    rows = [
        f"a0:00:00:00:00:01,net,[ESS],2016-01-14 10:00:0{i},6,{-50 - i},48.140{i},11.57,520,4,WIFI" for i in range(3)
    ]
    rows.append("310260_275_20082,T-Mobile,GSM;us,2016-01-14 10:00:03,0,-91,48.1404,11.57,520,4,GSM")
    path = lines(tmp_path / "w.csv", "WigleWifi-1.4,appRelease=2.8", head, *rows)
    with pytest.raises(UserError, match="line 6, column Channel: is 0, no channel"):
        read_samples(path)
    with pytest.warns(UserWarning, match="1 of 4 rows are left out"):
        samples = read_samples(path, missing="drop")
    assert samples.bands == (2437.0,)
    assert len(samples) == 3
