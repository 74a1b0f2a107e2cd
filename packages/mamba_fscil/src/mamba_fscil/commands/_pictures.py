"""The pictures of several commands."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mamba_fscil.data import SessionData
from mamba_fscil.metrics import SessionScores
from tenfold.claims import mean_ci95
from tenfold.figures import Curve, Panel, image_grid, line_chart
from tenfold.runs import Run


def _curve(rows: Sequence[Sequence[float]], first: int = 0) -> Curve:
    """Mean over seeds, with its interval from three seeds on, of the columns from ``first`` on."""
    columns = [mean_ci95(column) for column in zip(*(row[first:] for row in rows), strict=True)]
    x = list(range(first, first + len(columns)))
    intervals = [interval for _, interval in columns if interval is not None]
    if len(intervals) < len(columns):
        return Curve(x, [mean for mean, _ in columns])
    return Curve(x, [mean for mean, _ in columns], [low for low, _ in intervals], [high for _, high in intervals])


def draw_sessions(run: Run, scores: Mapping[Any, Sequence[Sequence[SessionScores]]], name: str = "sessions") -> None:
    """Draw accuracy over the sessions: all classes seen, base classes, novel classes; per arm one row per seed."""
    panels = []
    for title, key, first in (
        ("all classes seen", "all", 0),
        ("base classes", "base", 0),
        ("novel classes", "novel", 1),
    ):
        curves = {}
        for arm, rows in scores.items():
            values = [[getattr(s, key) for s in row] for row in rows]
            if len(values[0]) > first and np.isfinite([row[first:] for row in values]).all():
                curves[arm] = _curve(values, first)
        if curves:
            panels.append(Panel(title, "session", "accuracy (%)", curves))
    line_chart(run.figure(name), panels)


def draw_shots(run: Run, data: SessionData, name: str = "shots", most: int = 8) -> None:
    """Draw the pictures that sessions learn from: one row per new class."""
    rows: list[Any] = []
    titles = []
    for number, part in enumerate(data.shots, 1):
        if part.split is None:
            return
        for k in torch.unique(part.labels).tolist():
            index = (part.labels == k).nonzero()[:8, 0]
            rows.append(part.split.pixels(index).permute(0, 2, 3, 1).numpy())
            titles.append(f"session {number}: {data.classes[k]}")
    image_grid(run.figure(name), rows[:most], row_titles=titles[:most], cell=0.7)


def draw_mechanism(run: Run, traces: Mapping[str, Mapping[str, np.ndarray]], name: str = "mechanism") -> None:
    """Draw cosines and gates over the steps of the last session, one arm per line."""
    panels = []
    shown = (
        ("|cos| of delta, B and C, base against novel", "cosine", "mean |cos|"),
        ("gate on base rows", "gate_base", "root mean square"),
        ("gate on novel rows", "gate_novel", "root mean square"),
    )
    for title, key, label in shown:
        curves = {arm: Curve(trace["steps"].tolist(), trace[key].tolist()) for arm, trace in traces.items()}
        panels.append(Panel(title, "step of the last session", label, curves))
    line_chart(run.figure(name), panels)
