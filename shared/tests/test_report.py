"""Pages are read back with the standard library's HTML parser and compared with the run that they came from."""

import base64
import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from scipy import stats

from tenfold import UserError
from tenfold.claims import Study
from tenfold.figures import image_grid
from tenfold.report import write_index, write_report
from tenfold.runs import Metrics, Run

EVIL = """<script>alert("1")</script> & 'quoted' {{ 7 * 1111111 }}"""
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tables, images, links and text of a page; tags have to be balanced."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.open = set(), [], []
        self.tables, self.images, self.links, self.text = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(dict(attrs))
        elif tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def finished_run(path, package="pckd", level="full", evil=EVIL):
    run = Run.open(path, package=package, verb="demo", settings={"seed": 0, "name": evil})
    study = Study(run, level=level, data=evil, seeds=[0, 1, 2])
    ce, kd = [52.1, 53.0, 51.4], [61.9, 62.8, 61.2]
    study.over_arms(
        {"ce": lambda s: {"top1": ce[s]}, evil: lambda s: {"top1": kd[s]}, "speed": lambda s: {"images": s}}
    )
    study.difference("wins", f"KD beats {evil}", (evil, "top1"), ("ce", "top1"), required=">= 4", main=True)
    study.ratio("twice", "KD is twice as good", (evil, "top1"), ("ce", "top1"), required=">= 2")
    study.note(evil)
    study.finish(512.34)
    metrics = Metrics(run.own("metrics.csv"))
    for step in range(30):
        metrics.log(step, {evil: 1 + step / 10, **({"top1": step} if step == 27 else {})})
    metrics.flush()
    image_grid(run.own("figures/views.png"), [[np.eye(4, dtype=np.uint8)]])
    return run


def test_a_report_holds_what_the_run_folder_holds(tmp_path):
    run = finished_run(tmp_path / "run")
    write_report(run, f"Title {EVIL}", {"views": f"Caption {EVIL}"})
    page = Page(tmp_path / "run" / "report.html")
    claims, arms, speed, metrics = page.tables
    difference = np.array([61.9, 62.8, 61.2]) - [52.1, 53.0, 51.4]
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    assert claims[1] == [f"KD beats {EVIL}", f"{difference.mean():.3g} [{low:.3g}, {high:.3g}]", ">= 4", "yes"]
    assert claims[2][0] == "KD is twice as good"
    assert claims[2][-1] == "NO"
    assert [row[0] for row in arms] == ["arm", "ce", EVIL]
    sample = [52.1, 53.0, 51.4]
    low, high = stats.t.interval(0.95, 2, np.mean(sample), stats.sem(sample))
    assert arms[1] == ["ce", f"{np.mean(sample):.3g} [{low:.3g}, {high:.3g}]"]
    assert speed[0] == ["arm", "images"], "arms with other metrics have a table of their own"
    with (tmp_path / "run/metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert metrics == [
        ["step", EVIL, "top1"],
        *([f"{s}", f"{1 + s / 10:.5g}", "27" * (s == 27)] for s in range(25, 30)),
    ]
    assert metrics[0] == rows[0]
    assert [float(row[1]) for row in metrics[1:]] == [float(row[1]) for row in rows[-5:]]
    (image,) = page.images
    assert image["alt"] == f"Caption {EVIL}"
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "run/figures/views.png").read_bytes()
    whole = "".join(page.text)
    for name in ("config.yaml", "environment.json"):
        assert (tmp_path / "run" / name).read_text(encoding="utf-8").strip() in whole
    assert "level full, seeds 0, 1, 2, 512 s" in whole
    assert whole.count(f"Title {EVIL}") == 2
    assert EVIL in whole.split("Notes")[1]
    assert "report.html" in json.loads((tmp_path / "run/run.json").read_text())["files"]


def test_a_page_is_escaped_and_refers_to_nothing_outside(tmp_path):
    write_report(finished_run(tmp_path / "pckd"), EVIL)
    write_index(tmp_path)
    for path in (tmp_path / "pckd/report.html", tmp_path / "index.html"):
        page = Page(path)
        assert not page.tags & {"script", "link", "iframe", "object"}
        urls = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")]
        assert all(url.startswith("data:image/png;base64,") or url == "pckd/report.html" for url in urls)
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|url\(|@import", text)
        assert "7777777" not in "".join(page.text), "a template came in through the data"
        policy = [value for name, value in page.attributes if name == "content" and "default-src" in value]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        assert "color-scheme: light dark" in text
        assert "@media print" in text


def test_missing_parts_are_left_out(tmp_path):
    write_report(tmp_path, "Nothing")
    page = Page(tmp_path / "report.html")
    assert (page.tables, page.images, page.links) == ([], [], [])
    assert not page.tags & {"h2", "details", "figure", "ul"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 1}))
    write_report(str(tmp_path), "Settings")
    assert "seed: 1" in "".join(Page(tmp_path / "report.html").text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "report.html", "report.json"]
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "absent", "")
    with pytest.raises(AssertionError, match="typo"):
        write_report(tmp_path, "", {"typo": "caption"})


def test_many_metrics_go_down_the_page(tmp_path):
    run = Run.open(tmp_path, package="tenfold", verb="demo", settings={})
    study = Study(run, level="quick", data="d", seeds=[0])
    study.over_seeds(lambda seed: {arm: {f"m{i}": i / 8 for i in range(9)} for arm in ("a", "b")})
    study.finish()
    write_report(run, "")
    (table,) = Page(tmp_path / "report.html").tables
    assert table == [["metric", "a", "b"], *([f"m{i}", f"{i / 8:.3g}", f"{i / 8:.3g}"] for i in range(9))]


def test_the_index_has_a_card_per_run_with_what_its_level_decides(tmp_path):
    write_report(finished_run(tmp_path / "b", "tenfold", level="default"), "Ours", {"views": "What it sees"})
    finished_run(tmp_path / "a b%", "pckd")
    (tmp_path / "no run").mkdir()
    summaries = write_index(tmp_path)
    assert [s["package"] for s in summaries] == ["pckd", "tenfold"]
    page = Page(tmp_path / "index.html")
    text = " ".join("".join(page.text).split())
    assert page.links == ["b/report.html"]
    assert "pckd (no page)" in text
    assert "2 reports; 2 of 3 decided claims hold." in text
    first, second, undecided = page.tables
    assert first[0] == ["claim", "estimate [95 % CI]", "required", "holds"]
    assert [row[-1] for row in first[1:]] == ["yes", "NO"]
    assert [row[-1] for row in second[1:]] == ["yes"]
    assert [row[-1] for row in undecided[1:]] == ["not decided"]
    assert undecided[1][0] == "KD is twice as good"
    assert "1 claim that this level does not decide" in text
    (image,) = page.images
    assert image["alt"] == "What it sees"
    assert base64.b64decode(image["src"].split(",")[1]) == (tmp_path / "b/figures/views.png").read_bytes()
    assert "The thin library under Tenfold" in text, "the sentence is the distribution's own"
    assert "pckd demo --full --out DIR" in text
    assert "tenfold demo --out DIR" in text
    write_report(tmp_path / "a b%", "pckd")
    (tmp_path / "site").mkdir()
    write_index(tmp_path / "site", [tmp_path / "a b%"])
    assert Page(tmp_path / "site/index.html").links == ["../a%20b%25/report.html"]


def test_the_figure_that_is_captioned_first_comes_first(tmp_path):
    run = finished_run(tmp_path / "run")
    for name in ("arms", "zoo"):
        image_grid(run.figure(name), [[np.eye(4, dtype=np.uint8)]])
    write_report(run, "Title", {"zoo": "The main one", "arms": "The second"})
    assert [image["alt"] for image in Page(tmp_path / "run/report.html").images] == [
        "The main one",
        "The second",
        "views",
    ]


def test_a_broken_summary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no summary.json in a folder below"):
        write_index(tmp_path)
    (tmp_path / "a").mkdir()
    no_estimate = json.dumps(
        {"package": "p", "version": "1", "command": "demo", "level": "full", "data": "d", "seconds": 1, "seeds": [0]}
        | {"arms": {}, "notes": [], "claims": [{"text": "t"}]}
    )
    for content in ("{", "[]", "{}", '{"claims": [], "package": "p"}', no_estimate):
        (tmp_path / "a/summary.json").write_text(content)
        for write in (lambda: write_index(tmp_path), lambda: write_report(tmp_path / "a", "")):
            with pytest.raises(UserError, match="summary.json: not a summary of a run") as caught:
                write()
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "index.html").exists()
    with pytest.raises(UserError, match="summary.json"):
        write_index(tmp_path, [tmp_path / "absent"])


def test_the_module_rebuilds_the_index_and_prints_all_claims(tmp_path):
    finished_run(tmp_path / "pckd", evil="b")
    command = [sys.executable, "-m", "tenfold.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "KD is twice as good" in done.stdout
    assert f"1 report: {tmp_path / 'index.html'}" in done.stdout
    assert len(Page(tmp_path / "index.html").tables[0]) == 3
