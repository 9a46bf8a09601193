"""Score against bytes, with the controls as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtalk.errors import InputError
from kvtalk.evaluation.curve import pareto
from kvtalk.evaluation.summary import floor

_COLOURS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab", "#c99a2e", "#4a9aa8")
_MARKERS = {"cache": "o", "fused": "s"}


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path, title: str, metric: str, axis: str) -> None:
    """One picture of a score against bytes (log axis): 95% intervals as bars, the best plans joined.

    Args:
        runs: per name, the arms of a run's summary.
        file: PNG to write.
        title: above it.
        metric: which score.
        axis: what the metric is called.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'kvtalk[eval]'") from error
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, rows) in zip(_COLOURS, runs.items(), strict=False):
        for kind, marker in _MARKERS.items():
            _points(axes, [row for row in rows if row["kind"] == kind], metric, colour, f"{name}: cache", marker)
        front = pareto(rows, metric)
        axes.plot([row["bytes"] for row in front], [row[metric][0] for row in front], color=colour, linewidth=1.5)
        _points(axes, [row for row in rows if row["kind"] == "text"], metric, colour, f"{name}: text", "*")
        _points(axes, [row for row in rows if row["kind"] == "relay"], metric, colour, f"{name}: text relay", "P")
        for row in rows:
            if row["kind"] == "receiver":
                axes.axhline(row[metric][0], label=f"{name}: alone", color=colour, linestyle=":", linewidth=1.2)
        band = floor(rows, metric)
        if band:
            axes.axhspan(*band, label=f"{name}: destroyed caches", color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("bytes that cross, per context")
    axes.set_ylabel(axis)
    axes.set_ylim(bottom=-3)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _points(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str, colour: str, label: str, marker: str) -> None:
    if not rows:
        return
    means = [row[metric][0] for row in rows]
    below = [row[metric][0] - row[metric][1] for row in rows]
    above = [row[metric][2] - row[metric][0] for row in rows]
    style = {"fmt": marker, "color": colour, "label": label, "elinewidth": 0.6, "capsize": 2, "alpha": 0.85}
    size = {"*": 13, "P": 8}.get(marker, 4.5)
    axes.errorbar([max(row["bytes"], 1) for row in rows], means, [below, above], markersize=size, **style)
