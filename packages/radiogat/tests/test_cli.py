"""The commands as a person at a terminal uses them, typos included; a killed training goes on to the same bits."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from radiogat.cli import main
from radiogat.config import (
    EvaluateSettings,
    Optimizer,
    RadioGATConfig,
    RadioGATxConfig,
    ReproduceSettings,
    TrainSettings,
)
from radiogat.estimator import RadioMapEstimator

from tenfold.testing import assert_user_error

STEPS = ["--steps", "30"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "city"
    assert (
        main(["simulate", "--city.size", "60", "--city.freq_mhz", "1750,5750", "--rate", "0.1", "--out", str(folder)])
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def trained(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    files = ["--data", f"csv:{simulated / 'samples.csv'}", "--transmitters", str(simulated / "transmitters.csv")]
    assert (
        main(
            [
                "train",
                *files,
                "--cell",
                "4",
                *STEPS,
                "--method",
                "radiogatx",
                "--fallback",
                "false",
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    return folder


def test_simulate_writes_maps_samples_and_pictures(simulated):
    for name in ("maps.npz", "samples.csv", "transmitters.csv", "figures/maps.png", "config.yaml"):
        assert (simulated / name).stat().st_size > 20


def test_train_makes_a_model_a_map_and_a_report(trained):
    for name in (
        "model.safetensors",
        "config.json",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "summary.json",
        "report.html",
    ):
        assert (trained / name).exists(), name
    for name in ("map.tif", "figures/map.png", "figures/error-bars.png", "figures/calibration.png"):
        assert (trained / name).exists(), name
    assert json.loads((trained / "config.json").read_text())["chosen"] == "radiogatx"


def test_the_command_trains_as_the_estimator_does(trained, simulated):
    from radiogat.commands._files import grid_for
    from radiogat.data import read_samples, read_scene

    samples = read_samples(simulated / "samples.csv")
    scene = read_scene(None, simulated / "transmitters.csv", samples, 4.0)
    estimator = RadioMapEstimator("radiogatx", RadioGATxConfig(steps=30), fallback=False)
    estimator.fit(samples, scene, where=grid_for(samples, scene, 4.0))
    xy = samples.xy[:20] + 0.3
    assert np.array_equal(RadioMapEstimator.load(trained).predict(xy), estimator.predict(xy))


def test_predict_maps_any_cell_and_frequency_and_points(trained, simulated, tmp_path, capsys):
    from radiogat.maps import read_netcdf

    arguments = ["--run", str(trained), "--freq_mhz", "2600", "--cell", "8", "--format", "netcdf"]
    assert main(["predict", *arguments, "--out", str(tmp_path / "m")]) == 0
    found = read_netcdf(tmp_path / "m/map.nc")
    assert found.layout.freq_mhz == (2600.0,)
    assert found.layout.grid.cell == 8
    assert (
        main(
            [
                "predict",
                "--run",
                str(trained / "model.safetensors"),
                "--points",
                str(simulated / "samples.csv"),
                "--out",
                str(tmp_path / "p"),
            ]
        )
        == 0
    )
    with (tmp_path / "p/points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["rss_lo"]) < float(rows[0]["rss_dbm"]) < float(rows[0]["rss_hi"])


def test_length_rate_and_seed_are_those_of_every_network_and_by_default_each_ones_own():
    plain = TrainSettings(data="city")
    assert plain.radiogatx(0) == RadioGATxConfig()
    assert plain.radiogat() == RadioGATConfig()
    given = {"data": "city", "steps": 7, "optimizer": Optimizer(lr=0.5)}
    assert TrainSettings(**given, seed=3).radiogat() == RadioGATConfig(steps=7, lr=0.5, seed=3)
    for settings in (TrainSettings(**given), EvaluateSettings(**given), ReproduceSettings(**given)):
        assert settings.radiogatx(3) == RadioGATxConfig(steps=7, lr=0.5, seed=3)
    assert ReproduceSettings(**given).radiogat(4) == RadioGATConfig(steps=7, lr=0.5, seed=4)


def test_a_run_of_another_verb_is_refused(simulated, capsys, tmp_path):
    words = ["suggest", "--run", str(simulated), "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "holds a run of 'radiogat simulate'")


def test_a_map_that_cannot_be_written_is_refused_before_the_training(simulated, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "netCDF4", None)
    monkeypatch.setattr(RadioMapEstimator, "fit", lambda *_: pytest.fail("trained"))
    words = ["train", "--data", f"csv:{simulated / 'samples.csv'}", "--map", "netcdf", "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, 'netCDF needs netCDF4, which is not installed; pip install "radiogat[geo]"')
    assert not (tmp_path / "o").exists()


def test_suggest_lists_places(trained, tmp_path, capsys):
    assert main(["suggest", "--run", str(trained), "--count", "4", "--out", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].strip().startswith("4")
    assert (tmp_path / "s/figures/suggestions.png").exists()
    assert len((tmp_path / "s/suggestions.csv").read_text().splitlines()) == 5


def test_plot_draws_maps_and_errors(trained, simulated, tmp_path):
    from radiogat.data import read_maps
    from radiogat.estimator import RadioMapEstimator

    truth = f"npz:{simulated / 'maps.npz'}"
    grid = read_maps(truth).scene.grid
    RadioMapEstimator.load(trained).predict(grid, interval=0.9).to_netcdf(tmp_path / "m.nc")
    assert main(["plot", "--map", str(tmp_path / "m.nc"), "--truth", truth, "--out", str(tmp_path / "f")]) == 0
    names = {path.name for path in (tmp_path / "f/figures").iterdir()}
    assert names == {"map.png", "error-bars.png", "spectral-slope.png", "error.png"}
    assert main(["plot", "--map", truth, "--out", str(tmp_path / "g")]) == 0


def test_evaluate_and_compare_print_every_method(simulated, tmp_path, capsys):
    data = ["--data", f"csv:{simulated / 'samples.csv'}", *STEPS]
    arms = ["--arms", "idw,kriging,radiogatx"]
    assert main(["evaluate", *data, *arms, "--folds", "2", "--out", str(tmp_path / "e"), "--quiet"]) == 0
    assert "radiogatx" in capsys.readouterr().out
    assert json.loads((tmp_path / "e/metrics.json").read_text())["best"] in {"idw", "kriging", "radiogatx"}
    assert main(["compare", *data, *arms, "--out", str(tmp_path / "c"), "--quiet"]) == 0
    assert "RMSE of radiogatx / kriging" in capsys.readouterr().out
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert len(summary["arms"]["idw"]["rmse"]) == 3
    assert summary["level"] is None


def test_compare_measures_the_same_in_another_process(simulated, tmp_path):
    words = ["compare", "--data", f"csv:{simulated / 'samples.csv'}", "--arms", "radiogatx", "--seeds", "0"]
    words += ["--steps", "3", "--quiet"]
    arms = []
    for name, more in (("here", []), ("there", ["--executor", "processes:1"])):
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 0
        arms.append(json.loads((tmp_path / name / "summary.json").read_text())["arms"])
    assert arms[0] == arms[1]


def test_reproduce_runs_the_protocol(simulated, tmp_path, capsys):
    arguments = ["--data", f"npz:{simulated / 'maps.npz'}", "--tasks", "S,U", "--arms", "idw,shift,kriging"]
    assert (
        main(["reproduce", *arguments, "--rates", "0.2", "--out", str(tmp_path / "r"), "--quiet"]) == 2
    )  # U: no samples
    assert "no measurement at 5750 MHz" in capsys.readouterr().err
    arguments[3:] = ["S,M", "--arms", "idw,kriging"]
    assert main(["reproduce", *arguments, "--rates", "0.2", "--out", str(tmp_path / "q"), "--quiet"]) == 0
    assert "block_rmse" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["csv", "geotiff", "netcdf", "npz"])
def test_convert_goes_round(simulated, tmp_path, to):
    crs = ["--crs", "EPSG:32632"]
    assert (
        main(["convert", "--data", f"npz:{simulated / 'maps.npz'}", "--to", to, *crs, "--out", str(tmp_path / "a")])
        == 0
    )
    name = {"csv": "csv:samples.csv", "geotiff": "geotiff:map.tif", "netcdf": "netcdf:map.nc", "npz": "npz:maps.npz"}[
        to
    ]
    kind, _, file = name.partition(":")
    again = ["convert", "--data", f"{kind}:{tmp_path / 'a' / file}", "--to", "csv", "--out", str(tmp_path / "b")]
    assert main(again) == 0
    from radiogat.data import read_maps, read_samples

    truth = read_maps(f"npz:{simulated / 'maps.npz'}")
    assert len(read_samples(tmp_path / "b/samples.csv")) == np.isfinite(truth.rss_dbm).sum()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data", "csv:none.csv"], "none.csv: no such file"),
        (["train", "--data", "csw:x.csv"], "did you mean csv"),
        (["train", "--data", "city", "--method", "radiogax"], "did you mean radiogatx"),
        (["train", "--data", "city", "--rate", "2"], "--rate: expected more than 0 and at most 1, got 2"),
        (["train", "--data", "city", "--graph.delta", "-1"], "--graph.delta: expected 0 or more, got -1"),
        (["train", "--data", "city", "--interval", "90"], "--interval: expected more than 0 and less than 1, got 90"),
        (["train", "--data", "city", "--columns", "x"], "--columns: expected role=name, got 'x'"),
        (
            ["predict", "--run", "nowhere"],
            "--run nowhere: no such folder; expected the folder of a finished `radiogat train`",
        ),
        (["suggest", "--run", "nowhere"], "--run nowhere: no such folder"),
        (["plot", "--map", "none.tif"], "none.tif: no such file"),
        (["simulate", "--city.size", "10"], "--city.size: expected 40 or more, got 10"),
        (["simulate", "--backend", "sionnna"], "sionna"),
        (["reproduce", "--data", "npz:none.npz"], "no such file"),
        (["reproduce", "--data", "npz:x", "--tasks", "Q"], "--tasks: expected one of S, M, U, D, got 'Q'"),
        (["evaluate", "--data", "city", "--arms", "krigin"], "did you mean kriging"),
        (["convert", "--data", "shp:x", "--to", "npz"], "expected KIND:PATH"),
        (["convert", "--data", "city"], "expected KIND:PATH, known: csv"),
        (["compare", "--data", "city", "--executor", "threads:2"], "--executor threads:2: expected processes:N"),
        (["reproduce", "--data", "npz:x", "--arms", "radiogat,radiogat"], "--arms: expected each once"),
        (["train", "--data", "city", "--network.steps", "9"], "unknown option --network.steps"),
    ],
)
def test_what_the_user_can_mend_is_one_line(words, said, capsys, tmp_path):
    assert_user_error(main, [*words, "--out", str(tmp_path / "o")], capsys, said)


def test_the_faithful_network_is_trained_twice_and_resumable(simulated, tmp_path):
    words = [
        "train",
        "--data",
        f"npz:{simulated / 'maps.npz'}",
        "--rate",
        "0.1",
        "--method",
        "radiogat",
        "--map",
        "none",
    ]
    words += ["--gat.widths", "8,12", "--steps", "4", "--out", str(tmp_path / "g"), "--quiet"]
    assert main(words) == 0
    assert {p.name for p in (tmp_path / "g/checkpoints").iterdir()} == {"last.ckpt", "second.ckpt"}


def test_a_map_without_a_plane_can_be_drawn(trained, tmp_path):
    assert main(["plot", "--map", str(trained / "map.tif"), "--out", str(tmp_path / "f")]) == 0
    words = ["convert", "--data", f"geotiff:{trained / 'map.tif'}", "--out", str(tmp_path / "c")]
    assert main(words) == 2  # as an input it has to say where it lies


def test_an_unknown_band_is_one_line(trained, simulated, capsys, tmp_path):
    direct = [
        "--data",
        f"csv:{simulated / 'samples.csv'}",
        *STEPS,
        "--network.head",
        "direct",
        "--method",
        "radiogatx",
        "--fallback",
        "false",
    ]
    assert main(["train", *direct, "--map", "none", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    words = ["predict", "--run", str(tmp_path / "d"), "--freq_mhz", "2600", "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "no measurement at 2600 MHz; there are 1750, 5750")


def test_a_killed_training_ends_with_the_same_bits(simulated, tmp_path):
    words = [
        "train",
        "--data",
        f"csv:{simulated / 'samples.csv'}",
        "--steps",
        "30",
        "--checkpoint_every",
        "10",
    ]
    words += ["--map", "none", "--method", "radiogatx", "--fallback", "false"]
    assert main([*words, "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    command = [sys.executable, "-m", "radiogat.cli", *words, "--out", str(tmp_path / "cut"), "--quiet"]
    script = "import sys; from radiogat.cli import main; sys.exit(main(sys.argv[1:]))"
    command[1:3] = ["-c", script]
    process = subprocess.Popen(command, env=os.environ)
    checkpoint = tmp_path / "cut/checkpoints/last.ckpt"
    end = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*words, "--out", str(tmp_path / "cut"), "--resume", "--quiet"]) == 0
    for name in ("model.safetensors", "metrics.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
