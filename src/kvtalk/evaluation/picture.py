"""Right answers against bytes, with the controls as lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtalk.errors import InputError

_COLOURS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab")


def draw(rows: dict[str, list[dict[str, Any]]], file: Path, title: str) -> None:
    """One picture of the share of right answers against bytes (log axis).

    Args:
        rows: per model, the arms of a run's summary.
        file: PNG to write.
        title: above it.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install 'kvtalk[plot]'") from error
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, group) in zip(_COLOURS, rows.items(), strict=False):
        arms = {row["arm"]: row for row in group}
        caches = sorted(
            (row for arm, row in arms.items() if arm not in ("none", "text", "wrong")),
            key=lambda row: row["bytes"],
        )
        _points(axes, caches, colour, f"{name}: cache", "o-")
        _points(axes, [arms["text"]], colour, f"{name}: context as text", "*")
        axes.axhline(
            arms["none"]["contains"][0],
            color=colour,
            linestyle=":",
            linewidth=1.2,
            label=f"{name}: no context",
        )
        axes.axhline(
            arms["wrong"]["contains"][0],
            color=colour,
            linestyle="--",
            linewidth=1.2,
            label=f"{name}: another text's cache",
        )
    axes.set_xscale("log")
    axes.set_xlabel("bytes that cross, per context")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _points(axes: Any, rows: list[dict[str, Any]], colour: str, label: str, style: str) -> None:
    means = [row["contains"][0] for row in rows]
    below = [row["contains"][0] - row["contains"][1] for row in rows]
    above = [row["contains"][2] - row["contains"][0] for row in rows]
    axes.errorbar(
        [row["bytes"] for row in rows],
        means,
        [below, above],
        fmt=style,
        color=colour,
        label=label,
        capsize=3,
        markersize=12 if style == "*" else 5,
        linewidth=1.5,
        elinewidth=0.8,
    )
