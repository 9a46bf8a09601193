"""One self-contained HTML page of any number of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvtalk.codecs import codec
from kvtalk.errors import InputError
from kvtalk.evaluation import timing
from kvtalk.evaluation.arms import ABOUT, KINDS, PLACED, TRANSFERS
from kvtalk.evaluation.curve import pareto
from kvtalk.evaluation.folder import read_manifest
from kvtalk.evaluation.metrics import METRICS
from kvtalk.evaluation.summary import figure, floor, label, read_records, signed, table
from kvtalk.planning import Plan
from kvtalk.transport.file import saving

SHOWN_ARMS = 10
_CONTROLS = {"wrong": "the cache of another text", "zeroed": "a zeroed one", "self": "the receiver's own in its place"}


@dataclass(frozen=True)
class Run:
    """A results folder, read.

    Attributes:
        folder: where it lies.
        manifest: what was run.
        summary: the figures.
    """

    folder: Path
    manifest: dict[str, Any]
    summary: dict[str, Any]

    @property
    def lead(self) -> str:
        """The leading metric."""
        return str(self.summary["metrics"][0])

    @property
    def title(self) -> str:
        """Task, how choices are asked for, and models."""
        names = list(dict.fromkeys(self.manifest[side]["name"] for side in ("sharer", "receiver")))
        task = self.manifest["task"]
        asked = "" if task["protocol"] == "free" else f", by {task['protocol']}"
        return f"{task['title']}{asked}: {' → '.join(names)}"

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The rows of the summary."""
        return list(self.summary["arms"])


def write(folders: Sequence[Path], out: Path, title: str) -> None:
    """Make the page.

    Args:
        folders: of finished runs.
        out: HTML file to write.
        title: its heading.

    Raises:
        InputError: no finished run in a folder, or jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise InputError("reports need jinja2: pip install 'kvtalk[eval]'") from error
    runs = [_read(folder) for folder in folders]
    template = files("kvtalk.evaluation").joinpath("report.html").read_text("utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    kinds = {row["kind"] for run in runs for row in run.arms}
    metrics = dict.fromkeys(metric for run in runs for metric in run.summary["metrics"])
    content = page.render(
        title=title,
        runs=[_view(run) for run in runs],
        arms={kind: ABOUT[kind] for kind in KINDS if kind in kinds},
        metrics={METRICS[name].label: METRICS[name].about for name in metrics if name in METRICS},
    )
    with saving(out) as target:
        target.write(content.encode())


def verdict(run: Run) -> str:
    """What the controls say, in one sentence."""
    rows, name = run.arms, label(run.lead)
    caches = [row for row in rows if row["kind"] in PLACED]
    if not caches:
        return "No cache crosses in this run: it says what each model can do by itself."
    gained = [row for row in caches if "gain" in row]
    if not gained:
        return "Its controls were not run, so nothing here says what the cache bought."
    most = max(gained, key=lambda row: row["bytes"])  # not the best of them, which would be a choice after the fact
    way = most["control"].partition(" ")[2]
    floors = [
        f"with {_CONTROLS[row['kind']]} {row[run.lead][0]:.1f}"
        for row in rows
        if row["kind"] in _CONTROLS and row["plan"] == way and "gain" not in row
    ]
    text = next((f" The context as text gives {row[run.lead][0]:.1f}." for row in rows if row["kind"] == "text"), "")
    bought = "bought" if most["gain"][1] > 0 else "did not demonstrably buy anything:"
    return (
        f"With the sharer's cache ({most['plan']}, {_size(most['bytes'])}) {name} is {most[run.lead][0]:.1f}, "
        f"{', '.join(floors)}: what was in the cache {bought} {signed(most['gain'])} points.{text}"
    )


def _read(folder: Path) -> Run:
    manifest = read_manifest(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        rows, metrics = summary["arms"], summary["metrics"]
        if not rows or not metrics:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: the run is not finished, there is no summary.json") from error
    return Run(folder, manifest, summary)


def _view(run: Run) -> dict[str, Any]:
    """What the template shows of a run."""
    manifest = run.manifest
    head, rows = table(run.summary)
    facts = {
        "items": f"{manifest['items']['count']:,} (xxh3 {manifest['items']['xxh3']})",
        "protocol": manifest["task"]["protocol"],
        "sharer": _model(manifest["sharer"]),
        "receiver": _model(manifest["receiver"]),
        "decoding": f"{manifest['decoding']}, {manifest['dtype'].removeprefix('torch.')}",
        "device": manifest["device"],
        "data licence": manifest["task"]["licence"],
        "made": f"{manifest['started']}, {', '.join(f'{k} {v}' for k, v in manifest['versions'].items())}",
    }
    return {
        "title": run.title,
        "folder": str(run.folder),
        "verdict": verdict(run),
        "facts": facts,
        "head": head,
        "rows": [{"kind": row["kind"], "cells": cells} for row, cells in zip(run.arms, rows, strict=True)],
        "chart": _chart(run),
        "timings": _timings(run),
        "samples": _samples(run),
        "command": manifest["command"],
    }


def _chart(run: Run) -> dict[str, Any] | None:
    """What the page's script draws; None where there is no curve."""
    caches = [row for row in run.arms if row["kind"] in PLACED]
    if len(caches) < 2:
        return None
    front = [row["plan"] for row in pareto(run.arms, run.lead)]
    points = [
        {
            "name": row["plan"] or row["arm"],
            "group": _group(row),
            "bytes": max(row["bytes"], 1),
            "score": row[run.lead],
            "front": row["plan"] in front and row["kind"] in PLACED,
            "more": _details(run, row),
        }
        for row in run.arms
        if row["kind"] in (*PLACED, "text", "relay")
    ]
    alone = next((row[run.lead][0] for row in run.arms if row["kind"] == "receiver"), None)
    return {"metric": label(run.lead), "points": points, "band": floor(run.arms, run.lead), "alone": alone}


def _group(row: Mapping[str, Any]) -> str:
    if row["kind"] not in PLACED:
        return {"text": "context as text", "relay": "text relay"}[row["kind"]]
    if row["plan"].startswith("budget="):
        return "budget"
    plan = Plan.parse(row["plan"].removesuffix(" contiguous"))
    bits = (codec(plan.keys).bits + codec(plan.values).bits) / 2
    return f"{bits:g} bits"


def _details(run: Run, row: Mapping[str, Any]) -> list[str]:
    found = [f"{label(name)} {figure(name, row[name])}" for name in run.summary["metrics"]]
    found.append(f"{row['bytes']:,} bytes")
    if row["bits_per_value"]:
        found.append(f"{row['bits_per_value']:.2f} bits per value")
    if "gain" in row:
        found.append(f"gain {signed(row['gain'])}")
    return found


def _timings(run: Run) -> dict[str, Any] | None:
    measured = timing.medians(run.folder)
    if not measured:
        return None
    phases = [phase for phase in timing.PHASES if any(row[phase] for row in measured.values())]
    head = ["arm", *(phase.replace("_", " ") for phase in phases)]
    head += ["receiver's first token", "first token, sharer included", "peak memory"]
    rows = [
        [
            name,
            *(f"{row[phase]:.1f}" if row[phase] else "" for phase in phases),
            f"{row['receiver_first_token']:.1f}",
            f"{row['to_first_token']:.1f}",
            _size(row["peak_memory_bytes"]),
        ]
        for name, row in measured.items()
    ]
    return {"head": head, "rows": rows}


def _samples(run: Run) -> list[dict[str, Any]]:
    """A few questions with the answers of the arms that differ most."""
    try:
        items = json.loads((run.folder / "sample.json").read_text("utf-8"))
    except (OSError, ValueError):
        return []
    shown = {item["id"]: item for item in items if "question" in item}
    arms = _shown_arms(run)
    answers: dict[str, dict[str, Any]] = {key: {} for key in shown}
    for record in read_records(run.folder):
        if record.id in shown and record.arm in arms:
            answers[record.id][record.arm] = {
                "answer": record.answer,
                "sent": record.sent,
                "score": record.scores[run.lead],
            }
    return [
        {
            "question": item["question"],
            "context": item.get("context", ""),
            "choices": item.get("choices", []),
            "right": [chr(65 + item["answer"])] if "choices" in item else item["answers"],
            "answers": [(arm, answers[key][arm]) for arm in arms if arm in answers[key]],
        }
        for key, item in shown.items()
    ]


def _shown_arms(run: Run) -> list[str]:
    """Every arm that sends no packet, and of those that do the best, the middle of the front, the smallest."""
    plain = [row["arm"] for row in run.arms if row["kind"] not in TRANSFERS]
    front = [str(row["arm"]) for row in pareto(run.arms, run.lead)]
    some = [front[index] for index in dict.fromkeys((len(front) - 1, len(front) // 2, 0))] if front else []
    controls = [next((row["arm"] for row in run.arms if row["kind"] == kind), None) for kind in ("wrong", "zeroed")]
    return [*plain, *some, *(arm for arm in controls if arm)][:SHOWN_ARMS]


def _model(side: Mapping[str, str]) -> str:
    return f"{side['name']} (weights {side['weights']}, tokenizer {side['tokenizer']})"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
