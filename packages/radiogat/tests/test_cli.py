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
from radiogat.config import RadioGATxConfig
from radiogat.estimator import RadioMapEstimator

from tenfold.testing import assert_user_error

STEPS = ["--network.steps", "30"]


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
    assert main(["train", *files, "--cell", "4", *STEPS, "--fallback", "false", "--out", str(folder)]) == 0
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
    from radiogat.data import read_samples, read_scene

    samples = read_samples(simulated / "samples.csv")
    scene = read_scene(None, simulated / "transmitters.csv", samples, 4.0)
    estimator = RadioMapEstimator(network=RadioGATxConfig(steps=30), fallback=False).fit(samples, scene)
    xy = samples.xy[:20] + 0.3
    assert np.array_equal(RadioMapEstimator.load(trained).predict(xy), estimator.predict(xy))


def test_predict_maps_any_cell_and_frequency_and_points(trained, simulated, tmp_path, capsys):
    from radiogat.maps import read_netcdf

    arguments = ["--model", str(trained), "--freq_mhz", "2600", "--cell", "8", "--format", "netcdf"]
    assert main(["predict", *arguments, "--out", str(tmp_path / "m")]) == 0
    found = read_netcdf(tmp_path / "m/map.nc")
    assert found.layout.freq_mhz == (2600.0,)
    assert found.layout.grid.cell == 8
    assert (
        main(
            [
                "predict",
                "--model",
                str(trained),
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


def test_suggest_lists_places(trained, tmp_path, capsys):
    assert main(["suggest", "--model", str(trained), "--count", "4", "--out", str(tmp_path / "s")]) == 0
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
    models = ["--models", "idw,kriging,radiogatx"]
    assert main(["evaluate", *data, *models, "--folds", "2", "--out", str(tmp_path / "e"), "--quiet"]) == 0
    assert "radiogatx" in capsys.readouterr().out
    assert json.loads((tmp_path / "e/metrics.json").read_text())["best"] in {"idw", "kriging", "radiogatx"}
    assert main(["compare", *data, *models, "--seeds", "0,1,2", "--out", str(tmp_path / "c"), "--quiet"]) == 0
    assert "RMSE of radiogatx / kriging" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "c/summary.json").read_text())["arms"]["idw"]["rmse"]) == 3


def test_reproduce_runs_the_protocol(simulated, tmp_path, capsys):
    arguments = ["--data", f"npz:{simulated / 'maps.npz'}", "--tasks", "S,U", "--models", "idw,shift,kriging"]
    assert (
        main(["reproduce", *arguments, "--rates", "0.2", "--out", str(tmp_path / "r"), "--quiet"]) == 2
    )  # U: no samples
    assert "no measurement at 5750 MHz" in capsys.readouterr().err
    arguments[3:] = ["S,M", "--models", "idw,kriging"]
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
        (["train", "--data", "city", "--model", "radiogax"], "radiogatx"),
        (["train", "--data", "city", "--rate", "2"], "rate must be in (0, 1]"),
        (["train", "--data", "city", "--graph.delta", "-1"], "delta must be at least 0"),
        (["train", "--data", "city", "--interval", "90"], "interval must be between 0 and 1"),
        (["train", "--data", "city", "--columns", "x"], "expected role=name, got 'x'"),
        (["predict", "--model", "nowhere"], "nowhere: no such file"),
        (["suggest", "--model", "nowhere"], "no such file"),
        (["plot", "--map", "none.tif"], "none.tif: no such file"),
        (["simulate", "--city.size", "10"], "size must be at least 40"),
        (["simulate", "--backend", "sionnna"], "sionna"),
        (["reproduce", "--data", "npz:none.npz"], "no such file"),
        (["reproduce", "--data", "npz:x", "--tasks", "Q"], "unknown task 'Q'"),
        (["evaluate", "--data", "city", "--models", "krigin"], "did you mean kriging"),
        (["convert", "--data", "shp:x", "--to", "npz"], "expected KIND:PATH"),
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
        "--model",
        "radiogat",
        "--map",
        "none",
    ]
    words += ["--gat.widths", "8,12", "--gat.epochs", "2", "--out", str(tmp_path / "g"), "--quiet"]
    assert main(words) == 0
    assert {p.name for p in (tmp_path / "g/checkpoints").iterdir()} == {"last.ckpt", "second.ckpt"}


def test_a_map_without_a_plane_can_be_drawn(trained, tmp_path):
    assert main(["plot", "--map", str(trained / "map.tif"), "--out", str(tmp_path / "f")]) == 0
    words = ["convert", "--data", f"geotiff:{trained / 'map.tif'}", "--out", str(tmp_path / "c")]
    assert main(words) == 2  # as an input it has to say where it lies


def test_an_unknown_band_is_one_line(trained, simulated, capsys, tmp_path):
    direct = ["--data", f"csv:{simulated / 'samples.csv'}", *STEPS, "--network.head", "direct", "--fallback", "false"]
    assert main(["train", *direct, "--map", "none", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    words = ["predict", "--model", str(tmp_path / "d"), "--freq_mhz", "2600", "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "no measurement at 2600 MHz; there are 1750, 5750")


def test_a_killed_training_ends_with_the_same_bits(simulated, tmp_path):
    words = [
        "train",
        "--data",
        f"csv:{simulated / 'samples.csv'}",
        "--network.steps",
        "60",
        "--checkpoint_every",
        "20",
    ]
    words += ["--map", "none", "--fallback", "false"]
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
