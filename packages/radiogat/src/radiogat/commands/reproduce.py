"""`radiogat reproduce`: the authors' protocol on complete maps, method by method."""

import json
import sys
from typing import Any

import numpy as np

from radiogat.config import ReproduceSettings
from radiogat.data import read_maps
from radiogat.evaluation import Protocol, crop
from tenfold import UserError
from tenfold.claims import interval, mean_ci95
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table, track

METRICS = ("rmse", "block_rmse", "mae", "coverage", "width")


def run(settings: ReproduceSettings, invocation: Invocation) -> None:
    """Measure each case that has no result yet; write ``metrics.json`` and ``report.md``, and print the tables."""
    folder = invocation.folder
    device = choose_device(settings.device)
    areas = {area: crop(read_maps(settings.data, area)) for area in settings.areas}
    first = next(iter(areas.values()))
    bands = len(first.freq_mhz)
    if not -bands <= settings.target < bands:
        raise UserError(f"--target: expected {-bands} to {bands - 1}, the bands of this area, got {settings.target}")
    target = settings.target % bands
    cases = [
        (task, area, rate, seed, arm)
        for task in settings.tasks
        for area in settings.areas
        for rate in settings.rates
        for seed in settings.seeds
        for arm in settings.arms
    ]
    rows: list[dict[str, Any]] = []
    protocol: dict[Any, Protocol] = {}
    for task, area, rate, seed, arm in track(cases, "reproducing", quiet=invocation.quiet):
        name = f"results/{task}-area{area}-{rate:g}-seed{seed}-{arm}.json"
        if (folder.path / name).exists():
            row = json.loads((folder.path / name).read_text(encoding="utf-8"))
        else:
            key = (task, area, rate, seed)
            if key not in protocol:
                protocol = {key: Protocol(areas[area], task, rate, seed, target)}
            networks = settings.radiogatx(seed), settings.radiogat(seed)
            row, _ = protocol[key].measure(arm, *networks, settings.interval, device)
            folder.write_json(name, row)
        rows.append({"task": task, "area": area, "rate": rate, "seed": seed, "arm": arm, **row})
    text = tables(settings, rows, first.freq_mhz[target])
    folder.write_json("metrics.json", rows)
    folder.write_text("report.md", "```\n" + text + "```\n")
    sys.stdout.write(text)


def tables(settings: ReproduceSettings, rows: list[dict[str, Any]], freq_mhz: float) -> str:
    """Means over areas and seeds with their intervals, and the RMSE by area."""
    kinds = list(dict.fromkeys((row["task"], row["rate"], row["arm"]) for row in rows))
    body, by_area = [], []
    for kind in kinds:
        own = [row for row in rows if (row["task"], row["rate"], row["arm"]) == kind]
        label = [kind[0], f"{kind[1]:g}", kind[2]]
        found = {metric: [row[metric] for row in own if metric in row] for metric in METRICS}
        body.append([*label, *(interval(*mean_ci95(values)) if values else "-" for values in found.values())])
        means = [np.mean([row["rmse"] for row in own if row["area"] == area]) for area in settings.areas]
        by_area.append([*label, *(f"{mean:.3f}" for mean in means)])
    head = (
        f"areas {', '.join(map(str, settings.areas))}, seeds {', '.join(map(str, settings.seeds))}, target {freq_mhz:g} MHz;"
        " mean over areas and seeds [95 % interval]; dB\n\n"
    )
    return (
        f"{head}{table(['task', 'rate', 'arm', *METRICS], body)}\n\nRMSE by area, mean over seeds\n\n"
        f"{table(['task', 'rate', 'arm', *map(str, settings.areas)], by_area)}\n"
    )
