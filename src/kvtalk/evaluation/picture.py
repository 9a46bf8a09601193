"""Score against bytes, with the controls as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtalk.errors import InputError

_COLOURS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab")
_LABELS = {"none": "no context", "wrong": "another text's cache"}
_STYLES = {"none": ":", "wrong": "--"}


def draw(runs: Mapping[str, Sequence[dict[str, Any]]], file: Path, title: str, metric: str, axis: str) -> None:
    """One picture of a score against bytes (log axis), 95% intervals as bars, best plans joined.

    Args:
        runs: per name, the arms of a run's summary.
        file: PNG to write.
        title: above it.
        metric: ``f1``, ``em`` or ``contains``.
        axis: what the metric is called.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'kvtalk[plot]'") from error
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, rows) in zip(_COLOURS, runs.items(), strict=False):
        caches = sorted((row for row in rows if row["kind"] == "cache"), key=lambda row: row["bytes"])
        _points(axes, caches, metric, colour, f"{name}: cache", "o")
        front = _front(caches, metric)
        axes.plot([row["bytes"] for row in front], [row[metric][0] for row in front], color=colour, linewidth=1.5)
        _points(axes, [row for row in rows if row["kind"] == "text"], metric, colour, f"{name}: text", "*")
        for row in rows:
            if row["kind"] in _LABELS:
                label, style = f"{name}: {_LABELS[row['kind']]}", _STYLES[row["kind"]]
                axes.axhline(row[metric][0], label=label, color=colour, linestyle=style, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlabel("bytes that cross, per context")
    axes.set_ylabel(axis)
    axes.set_ylim(bottom=-3)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _points(axes: Any, rows: Sequence[dict[str, Any]], metric: str, colour: str, label: str, marker: str) -> None:
    means = [row[metric][0] for row in rows]
    below = [row[metric][0] - row[metric][1] for row in rows]
    above = [row[metric][2] - row[metric][0] for row in rows]
    style = {"fmt": marker, "color": colour, "label": label, "elinewidth": 0.6, "capsize": 2, "alpha": 0.85}
    size = 13 if marker == "*" else 4.5
    axes.errorbar([row["bytes"] for row in rows], means, [below, above], markersize=size, **style)


def _front(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The rows that no row of fewer bytes matches; ``rows`` ascend in bytes."""
    front: list[dict[str, Any]] = []
    for row in rows:
        if not front or row[metric][0] > front[-1][metric][0]:
            front.append(row)
    return front
