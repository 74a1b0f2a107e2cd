"""What the root README shows of the ten packages, from the files of their runs and never by hand.

    python docs/results.py                              # write the tables of README.md anew
    python docs/results.py demo-report bench-report     # first take over what these folders of `nox -s demo bench` hold

`docs/results/<import name>/` keeps a demonstration's `summary.json` and the benchmark's `bench.json` that holds the row
which `docs/results/headlines.yaml` names. A run of a lower level does not replace one of a higher level.
"""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from tenfold.claims import interval

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
LEVELS = ("quick", "default", "full")
VERDICT = {True: "yes", False: "**no**", None: "not decided"}


def headlines() -> dict[str, dict[str, Any]]:
    """What is shown of each package, by its import name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((RESULTS / "headlines.yaml").read_text(encoding="utf-8"))
    return found


def name_of(package: str) -> str:
    """The distribution's name."""
    text = (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["name"])


def kept(package: str, file: str) -> dict[str, Any] | None:
    """One of a package's two files; None where it is not there yet."""
    path = RESULTS / package / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def keep(package: str, file: str, found: dict[str, Any]) -> None:
    """Store one of a package's two files."""
    path = RESULTS / package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def rows_of(bench: dict[str, Any], headline: dict[str, Any]) -> list[dict[str, Any]]:
    """The row that the README shows, in a list; empty where the file does not hold it."""
    shape = headline.get("shape")
    rows = bench["comparisons"]
    return [row for row in rows if row["id"] == headline["row"] and shape in (None, row["shape"])][:1]


def take(demos: Path, benches: Path) -> None:
    """Take over the summaries of `nox -s demo` and the files of `nox -s bench` that are there."""
    for package, headline in headlines().items():
        path = demos / name_of(package) / "summary.json"
        if path.exists():
            new, old = json.loads(path.read_text(encoding="utf-8")), kept(package, "summary.json")
            if old is None or LEVELS.index(new["level"]) >= LEVELS.index(old["level"]):
                keep(package, "summary.json", new)
        for path in sorted((benches / name_of(package)).glob("*.json")):
            bench = json.loads(path.read_text(encoding="utf-8"))
            if rows_of(bench, headline):
                keep(package, "bench.json", {"script": path.stem, **bench})


def link(package: str) -> str:
    """The package's name, leading to its README."""
    return f"[`{name_of(package)}`](packages/{package}/README.md)"


def table(headers: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in [headers, ["---"] * len(headers), *rows]]


def demonstrated(package: str, headline: dict[str, Any]) -> list[str]:
    """The row of a demonstration: its claim, how many others hold, and the command that gives both."""
    summary = kept(package, "summary.json")
    if summary is None:
        return [link(package), "no run is kept", "", "", "", "", ""]
    (claim,) = [claim for claim in summary["claims"] if claim["id"] == headline["claim"]]
    decided = [each["holds"] for each in summary["claims"] if each["holds"] is not None]
    level = "" if summary["level"] == "default" else f" -- --{summary['level']}"
    return [
        link(package),
        headline.get("text", claim["text"]),
        interval(claim["estimate"], claim["ci95"]),
        claim["required"],
        VERDICT[claim["holds"]],
        f"{sum(decided)} of {len(decided)}, {len(summary['claims']) - len(decided)} open",
        f'`nox -s "demo({name_of(package)})"{level}`',
    ]


def measured(package: str, headline: dict[str, Any]) -> list[str]:
    """The row of a benchmark: the peer's time or memory over ours."""
    bench = kept(package, "bench.json")
    if bench is None:
        return [link(package), "no run is kept", "", "", "", ""]
    (row,) = rows_of(bench, headline)
    command = f"`python packages/{package}/benchmarks/{bench['script']}.py --out FILE`"
    what = f"{headline['what']}, {row['shape']}"
    return [link(package), what, interval(row["ratio"], row["ci95"]), row["required"], VERDICT[row["holds"]], command]


def tables() -> dict[str, list[str]]:
    """What stands between the README's marks, by the mark's name."""
    shown = headlines()
    jobs = [
        [link(package), each["job"], each["into"], f"`pip install ./shared ./packages/{package}`"]
        for package, each in shown.items()
    ]
    claims = ["claim", "estimate [95 % CI]", "required", "holds", "decided claims that hold", "command"]
    ratios = ["what", "peer / ours [95 % CI]", "required", "holds", "command"]
    cells = [
        f'<td width="50%"><img src="docs/images/{each["picture"]}" alt="{each["caption"]}"><br>'
        f"<b>{name_of(package)}</b>: {each['caption']}</td>"
        for package, each in shown.items()
    ]
    return {
        "jobs": table(["package", "what you hire it for", "plugs into", "from a clone"], jobs),
        "demonstrations": table(["package", *claims], [demonstrated(*each) for each in shown.items()]),
        "benchmarks": table(["package", *ratios], [measured(*each) for each in shown.items()]),
        "gallery": [
            "<table>",
            *(f"<tr>{''.join(cells[i : i + 2])}</tr>" for i in range(0, len(cells), 2)),
            "</table>",
        ],
    }


def filled(text: str) -> str:
    """A README's text with all tables written anew."""
    for mark, lines in tables().items():
        begin, end = f"<!-- {mark}: docs/results.py -->\n", f"<!-- end of {mark} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md has no marks {begin.strip()} and {end}")
        text = before + begin + "\n" + "\n".join(lines) + "\n\n" + end + after
    return text


def main(folders: list[str]) -> int:
    """Take over what is new, then write the README."""
    if folders:
        demos, benches = map(Path, folders)
        take(demos, benches)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
