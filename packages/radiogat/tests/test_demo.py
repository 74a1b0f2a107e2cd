"""The quick demo, whole; and the city that it maps."""

import json

import numpy as np
from radiogat.cli import main
from radiogat.config import CityConfig
from radiogat.simulate import city, semivariogram
from radiogat.spectral import fit_spectrum


def test_the_quick_demo_writes_its_report_and_decides_nothing(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("data: rendered")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert {claim["holds"] for claim in summary["claims"]} == {None}
    assert summary["arms"]["joint_stack"]["rmse"][0] < summary["arms"]["idw"]["rmse"][0]
    assert {"trees", "joint_trees", "stack"} <= set(summary["arms"])
    for name in ("rmse", "maps", "errors", "error-bars", "calibration", "suggestions"):
        assert (tmp_path / f"d/figures/{name}.png").stat().st_size > 5000
    assert "<img" in (tmp_path / "d/report.html").read_text()


def test_a_city_follows_its_seed_and_physics():
    config = CityConfig(size=120, seed=7, shadowing_db=0.0)
    maps, again = city(config), city(config)
    assert np.array_equal(maps.rss_dbm, again.rss_dbm, equal_nan=True)
    assert not np.array_equal(maps.building, city(CityConfig(size=120, seed=8)).building)
    assert 0.05 < maps.building.mean() < 0.2
    assert not maps.building[tuple(maps.transmitters.T)].any()
    _, slope = fit_spectrum(maps.freq_mhz, maps.rss_dbm)
    sight = (maps.scene.depth == 1).all(axis=0)
    assert np.allclose(slope[sight], -20, atol=0.01)
    assert np.nanmin(slope) > -20.01
    assert -16 < np.nanmax(slope) < -10  # flatter in shadow
    gamma = list(semivariogram(maps.rss_dbm[0], (1, 2, 4, 8)).values())
    assert gamma == sorted(gamma)
