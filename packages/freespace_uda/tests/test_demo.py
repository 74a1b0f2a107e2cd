"""The demonstration at its quick level: mechanics only; and its numbers through files."""

import json

import pytest
from freespace_uda.cli import main
from freespace_uda.commands._world import settings_of


def test_the_quick_demo_writes_everything_and_decides_nothing(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: rendered")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert list(summary["arms"]) == ["rgb", "normals", "both", "ccg-sfa", "oracle"]
    assert {claim["holds"] for claim in summary["claims"]} == {None}
    assert {"over_source", "gap", "of_oracle", "choice"} == {c["id"] for c in summary["claims"]}
    assert {p.stem for p in (tmp_path / "d/figures").glob("*.png")} == {"scenes", "distance", "course"}
    assert (tmp_path / "d/report.html").stat().st_size > 10000


def test_compare_on_simulated_files_gives_the_numbers_of_the_demonstration(tmp_path):
    assert main(["demo", "--quick", "--out", str(tmp_path / "d"), "--quiet"]) == 0
    for domain, test in (("roads-flat", 0), ("roads-real", 4)):
        words = ["simulate", "--domain", domain, "--scenes", "8", "--test", str(test), "--size", "96,32"]
        assert main([*words, "--out", str(tmp_path / domain)]) == 0
    s = settings_of("quick")
    settings = {
        "data": f"manifest:{tmp_path / 'roads-flat/manifest.csv'}",
        "target": f"manifest:{tmp_path / 'roads-real/manifest.csv'}",
        "arms": "both,ccg-sfa",
        "seeds": "0",
        "rgb_encoder": s.rgb_encoder,
        "width": s.width,
        "size": "96,32",
        "steps": s.steps,
        "batch_size": s.batch_size,
        "watched": s.watched,
        "log_every": s.log_every,
        "device": "cpu",
        **{f"align.{k}": getattr(s.align, k) for k in ("weight", "tau", "min_pixels", "hidden")},
        "general.width": s.general.width,
        **{
            f"optimizer.{k}": getattr(s.optimizer, k)
            for k in ("kind", "lr", "head", "weight_decay", "discriminator", "ema")
        },
    }
    words = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    assert main(["compare", *words, "--out", str(tmp_path / "c"), "--quiet"]) == 0
    demo, compared = (json.loads((tmp_path / f / "summary.json").read_text())["arms"] for f in ("d", "c"))
    for arm in ("both", "ccg-sfa"):
        for metric in ("F1", "MaxF", "AP"):
            assert compared[arm][metric] == pytest.approx(demo[arm][metric], abs=1e-9), (arm, metric)
