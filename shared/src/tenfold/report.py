"""One self-contained HTML page from a run folder, and an index of several; no part of a page is fetched from elsewhere.

``python -m tenfold.report FOLDER`` rebuilds ``FOLDER/index.html`` over the runs below it and prints all their claims.
"""

import base64
import csv
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tenfold.claims import claim_rows, interval, mean_ci95
from tenfold.errors import UserError, needs
from tenfold.files import replacing
from tenfold.runs import Run

_LAST_STEPS = 5
_ABOUT = "report.json"
"""What a page shows first, for the index: its title, its main picture, the caption."""


_Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headers, rows


def write_report(run: Run | str | os.PathLike[str], title: str, captions: Mapping[str, str] | None = None) -> None:
    """Write ``report.html`` into a run's folder: claims, notes, figures, arms, last metrics, settings, environment.

    Each part comes from its file (``summary.json``, ``figures/*.png``, ``metrics.csv``, ``config.yaml``,
    ``environment.json``); what is not there is left out.

    Args:
        run: a run, which then remembers the page as its own, or the path of a finished one.
        title: of the page.
        captions: what a figure shows, by its file name without ``.png``, the one that matters most first; a figure without
            a caption comes after those, under its name.

    Raises:
        UserError: no such folder, or a ``summary.json`` that cannot be read.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder")
    captions = captions or {}
    parts: dict[str, Any] = {"title": title}
    if (path / "summary.json").exists():
        summary = _summary(path / "summary.json")
        parts["lead"] = f"{_what_ran(summary)}. Data: {summary['data']}."
        headers, rows = claim_rows([summary])
        start = headers.index("claim")  # what stands before is the same for all claims of a run
        parts["claims"] = (headers[start:], [row[start:] for row in rows])
        parts |= {"arms": _arms(summary["arms"]), "notes": summary["notes"]}
    pictures = sorted(picture.stem for picture in (path / "figures").glob("*.png"))
    unknown = set(captions) - set(pictures)
    assert not unknown, f"captions for figures that are not there: {sorted(unknown)}"
    shown = [*captions, *(name for name in pictures if name not in captions)]
    parts["pictures"] = [(captions.get(name, name), _data(path / f"figures/{name}.png")) for name in shown]
    parts["metrics"] = _last_steps(path / "metrics.csv")
    names = [name for name in ("config.yaml", "environment.json") if (path / name).exists()]
    parts["files"] = [(name, (path / name).read_text(encoding="utf-8")) for name in names]
    picture = f"figures/{shown[0]}.png" if shown else ""
    about = {"title": title, "picture": picture, "caption": captions.get(shown[0], "") if shown else ""}
    for name, text in {"report.html": _render(parts), _ABOUT: json.dumps(about, ensure_ascii=False) + "\n"}.items():
        if isinstance(run, Run):
            run.write_text(name, text)
        else:
            with replacing(path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _what_ran(summary: Mapping[str, Any]) -> str:
    """``pckd 0.1.0, demo, level full, seeds 0, 1, 512 s``."""
    level = f", level {summary['level']}" if summary["level"] else ""
    seeds = ", ".join(map(str, summary["seeds"]))
    return f"{summary['package']} {summary['version']}, {summary['command']}{level}, seeds {seeds}, {summary['seconds']:.0f} s"


def _data(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def write_index(
    folder: str | os.PathLike[str], reports: Sequence[str | os.PathLike[str]] | None = None
) -> list[dict[str, Any]]:
    """Write ``index.html``, a card per run.

    A card holds one sentence about the package, its main picture, the claims that the run's level decides, and the
    command; the claims that are not decided are folded.

    Args:
        folder: where ``index.html`` goes.
        reports: run folders; default: all folders directly below ``folder`` that hold a ``summary.json``.

    Returns:
        The runs' summaries, in the order of the page.

    Raises:
        UserError: no run with a summary is there, or a ``summary.json`` cannot be read.
    """
    folder = Path(folder)
    runs = sorted(p.parent for p in folder.glob("*/summary.json")) if reports is None else [Path(p) for p in reports]
    if not runs:
        raise UserError(f"{folder}: no summary.json in a folder below it")
    summaries = [_summary(run / "summary.json") for run in runs]
    cards = [_card(folder, run, summary) for run, summary in zip(runs, summaries, strict=True)]
    decided = [claim["holds"] for summary in summaries for claim in summary["claims"] if claim["holds"] is not None]
    lead = f"{len(cards)} report{'s' * (len(cards) != 1)}; {sum(decided)} of {len(decided)} decided claims hold."
    page = _render({"title": "Tenfold: what the demonstrations show", "lead": lead, "cards": cards})
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return summaries


def _card(folder: Path, run: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the index shows of a run."""
    try:
        sentence = importlib.metadata.metadata(summary["package"])["Summary"]
    except importlib.metadata.PackageNotFoundError:
        sentence = ""
    try:
        about = json.loads((run / _ABOUT).read_text(encoding="utf-8"))
        picture = run / about["picture"] if about["picture"] else None
    except (OSError, ValueError, KeyError, TypeError):  # no page, or one of an older version
        about, picture = {"title": "", "caption": ""}, None
    page = quote(Path(os.path.relpath(run / "report.html", folder)).as_posix())
    headers, rows = claim_rows([summary])
    start = headers.index("claim")
    decided = [row[start:] for row in rows if row[-1] != "not decided"]
    open_ones = [row[start:] for row in rows if row[-1] == "not decided"]
    level = f" --{summary['level']}" if summary["level"] in {"quick", "full"} else ""
    return {
        "package": summary["package"],
        "sentence": sentence,
        "what": _what_ran(summary),
        "data": summary["data"],
        "page": page if (run / "report.html").exists() else "",
        "picture": _data(picture) if picture is not None and picture.exists() else "",
        "caption": about["caption"] or about["title"],
        "claims": (headers[start:], decided) if decided else None,
        "undecided": (headers[start:], open_ones) if open_ones else None,
        "command": f"{summary['package']} {summary['command']}{level} --out DIR",
    }


def _render(parts: Mapping[str, Any]) -> str:
    needs("jinja2", "report")
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("tenfold").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(parts)


def _summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        claim_rows([summary])
        missing = {"version", "command", "data", "seconds", "seeds", "arms", "notes"} - set(summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a summary of a run ({type(error).__name__}: {error})") from error
    if missing:
        raise UserError(f"{path}: not a summary of a run (no {', '.join(sorted(missing))})")
    return dict(summary)


def _arms(arms: Mapping[str, Mapping[str, Sequence[float]]]) -> list[_Table]:
    """One table for all arms with the same metrics, so that none has gaps; what is more numerous goes down the page."""
    needs("scipy", "demo")
    groups: dict[tuple[str, ...], list[str]] = {}
    for arm, values in arms.items():
        groups.setdefault(tuple(values), []).append(arm)
    tables: list[_Table] = []
    for metrics, names in groups.items():
        cells = [[interval(*mean_ci95(arms[arm][metric])) for metric in metrics] for arm in names]
        if len(metrics) > max(len(names), 4):
            turned = [[metric, *column] for metric, column in zip(metrics, zip(*cells, strict=True), strict=True)]
            tables.append((["metric", *names], turned))
        else:
            tables.append((["arm", *metrics], [[arm, *row] for arm, row in zip(names, cells, strict=True)]))
    return tables


def _last_steps(path: Path) -> _Table | None:
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        headers, *rows = csv.reader(file)
    shown = [[step, *(f"{float(x):.5g}" if x else "" for x in values)] for step, *values in rows[-_LAST_STEPS:]]
    return (headers, shown) if rows else None


if __name__ == "__main__":
    from tenfold.terminal import claims_table

    found = write_index(sys.argv[1])
    sys.stdout.write("\n".join(map(claims_table, found)) + "\n")
    sys.stdout.write(f"{len(found)} report{'s' * (len(found) != 1)}: {Path(sys.argv[1]) / 'index.html'}\n")
