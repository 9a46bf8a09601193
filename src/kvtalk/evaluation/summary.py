"""Figures from records, without any model: means with intervals, what the sharer bought, tables."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtalk.errors import InputError
from kvtalk.evaluation.arms import DESTROYED, Arm
from kvtalk.evaluation.metrics import METRICS
from kvtalk.evaluation.statistics import bootstrap, mcnemar
from kvtalk.planning import Plan
from kvtalk.transport.file import saving

_LABELS = {
    "acc": "accuracy",
    "acc_norm": "accuracy (norm)",
    "acc_published": "accuracy (C2C's reading)",
    "parsed": "parsed",
    "nll": "NLL",
}
_BINARY = ("acc_norm", "acc", "em", "contains", "kvcomm")
"""Scores of 0 or 1, which McNemar's test takes."""


@dataclass(frozen=True)
class Record:
    """One item in one arm.

    Attributes:
        id: of the item.
        arm: name of the arm.
        answer: what the model wrote, or the letter of the option it finds most likely.
        scores: each 0 to 1, but ``nll`` in nats a token.
        confidence: how probable the model found its answer, 0 to 1.
        bytes: what crossed.
        bits_per_value: those bits over the values of the context's bf16 cache; 0 for text.
        plan: how a cache was packed; of the arm ``routing``, who answered.
        sent: the text that a sharer wrote.
        likelihoods: log-likelihood of each option, where those were compared.
    """

    id: str
    arm: str
    answer: str
    scores: dict[str, float]
    confidence: float
    bytes: int
    bits_per_value: float
    plan: str
    sent: str = ""
    likelihoods: tuple[float, ...] = ()


def read_records(out: Path) -> Iterator[Record]:
    """Every record of a finished run; none if there is none.

    Raises:
        InputError: a damaged file.
    """
    file = out / "items.jsonl.gz"
    if not file.exists():
        return
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield Record(**json.loads(line))
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): run it again into another folder") from error


def route(records: Iterable[Record]) -> Iterator[Record]:
    """Query routing: for each item the record of receiver or sharer alone, whichever was more confident."""
    alone: dict[str, dict[str, Record]] = {"receiver": {}, "sharer": {}}
    for record in records:
        if record.arm in alone:
            alone[record.arm][record.id] = record
    for key, ours in alone["receiver"].items():
        theirs = alone["sharer"][key]
        who, chosen = ("sharer", theirs) if theirs.confidence > ours.confidence else ("receiver", ours)
        yield Record(key, "routing", chosen.answer, chosen.scores, chosen.confidence, 0, 0.0, who)


def plan_from(fields: Mapping[str, Any] | None) -> Plan | None:
    """A plan from a manifest."""
    return Plan(**fields) if fields else None


def summarize(
    records: Iterable[Record], arms: Sequence[Arm], metrics: Sequence[str], count: int, contexts: bool = True
) -> dict[str, Any]:
    """Figures per arm: means with 95% bootstrap intervals, and paired differences in the leading metric.

    ``gain`` is the figure minus that of the better destroyed cache, wrong or zeroed, sent in the same way, or for a
    fuser of the best of these and self: what the sharer bought. It stands only where all were run. Where there are
    contexts, which only the sharer reads, self has read them too and is no control.

    Raises:
        InputError: records are missing.
    """
    columns = _columns(records, arms, metrics)
    for arm in arms:
        if len(columns[arm.name]["id"]) != count:
            raise InputError("the run is not finished: give the command of its manifest.json again")
    lead = metrics[0]
    text = next((arm.name for arm in arms if arm.kind == "text"), None)
    rows = []
    for arm in arms:
        ours = columns[arm.name]
        row: dict[str, Any] = {"arm": arm.name, "kind": arm.kind, "plan": arm.way, "items": count}
        for metric in metrics:
            row[metric] = _mean(metric, ours[metric])
        row["bytes"] = round(sum(ours["bytes"]) / count)
        row["bits_per_value"] = round(sum(ours["bits_per_value"]) / count, 3)
        if arm.kind == "routing":
            row["sharer_share"] = round(sum(who == "sharer" for who in ours["plan"]) / count, 4)
        control = _control(arm, arms, columns, lead, contexts)
        if control is not None:
            row["control"] = control
            row["gain"] = _difference(ours, columns[control], lead)
            row["gain_p"] = _mcnemar(ours, columns[control], metrics)
        if text is not None and arm.name != text:
            row["minus_text"] = _difference(ours, columns[text], lead)
        rows.append(row)
    return {"metrics": list(metrics), "arms": rows}


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a summary as text."""
    metrics = summary["metrics"]
    gains = any("gain" in row for row in summary["arms"])
    texts = any("minus_text" in row for row in summary["arms"])
    head = ["arm", *(label(metric) for metric in metrics), "bytes", "bits/value"]
    binary = next((label(metric) for metric in metrics if metric in _BINARY), "")
    head += ["gain", f"McNemar p ({binary})"] * gains + [f"{label(metrics[0])} - text"] * texts
    rows = []
    for row in summary["arms"]:
        cells = [row["arm"], *(figure(metric, row[metric], whole=metric == metrics[0]) for metric in metrics)]
        if "sharer_share" in row:
            cells[0] += f" ({100 * row['sharer_share']:.0f}% sharer)"
        cells += [f"{row['bytes']:,}", f"{row['bits_per_value']:.2f}" if row["bits_per_value"] else ""]
        if gains:
            cells += [signed(row.get("gain")), f"{row['gain_p']:.1g}" if row.get("gain_p") is not None else ""]
        if texts:
            cells.append(signed(row.get("minus_text")))
        rows.append(cells)
    return head, rows


def figure(metric: str, value: Any, whole: bool = True) -> str:
    """A figure as text; ``whole`` with its interval."""
    if metric == "nll":
        return f"{value:.3f}"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*value) if whole else f"{value[0]:.1f}"


def signed(interval: Sequence[float] | None) -> str:
    """A difference as text."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval) if interval else ""


def label(metric: str) -> str:
    """What a metric is called in tables."""
    return METRICS[metric].label if metric in METRICS else _LABELS[metric]


def floor(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float] | None:
    """What destroyed caches score: from the least to the greatest end of their intervals; None without any."""
    controls = [row[metric] for row in rows if row["kind"] in DESTROYED]
    return (min(low for _, low, _ in controls), max(high for _, _, high in controls)) if controls else None


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """``summary.json`` and ``table.md``."""
    rest = {name: value for name, value in summary.items() if name != "arms"}
    listed = ",\n".join(json.dumps(row, ensure_ascii=False) for row in summary["arms"])
    content = f'{json.dumps(rest, ensure_ascii=False)[:-1]}, "arms": [\n{listed}\n]}}'
    head, rows = table(summary)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    for name, text in (("summary.json", content), ("table.md", "\n".join(lines))):
        with saving(out / name) as target:
            target.write(f"{text}\n".encode())


def _columns(records: Iterable[Record], arms: Sequence[Arm], metrics: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Per arm, lists in the order of item ids."""
    names = ("id", "bytes", "bits_per_value", "plan", *metrics)
    found: dict[str, dict[str, list[Any]]] = {arm.name: {name: [] for name in names} for arm in arms}
    for record in records:
        if record.arm not in found:
            continue
        for name in names:
            value = record.scores[name] if name in metrics else getattr(record, name)
            found[record.arm][name].append(value)
    for columns in found.values():
        order = sorted(range(len(columns["id"])), key=columns["id"].__getitem__)
        for name in names:
            columns[name] = [columns[name][index] for index in order]
    return found


def _control(
    arm: Arm, arms: Sequence[Arm], columns: Mapping[str, Mapping[str, list[Any]]], lead: str, contexts: bool
) -> str | None:
    """The better of the destroyed caches that were sent the same way, for a fuser also the receiver's own cache in the
    sharer's place; None unless all of them were."""
    if arm.kind not in (("cache", "fused", "self") if contexts else ("fused",)):
        return None
    needed = DESTROYED if contexts else (*DESTROYED, "self")
    names = [other.name for other in arms if other.kind in needed and other.way == arm.way]
    if len(names) < len(needed):
        return None
    return max(names, key=lambda name: sum(columns[name][lead]))


def _difference(ours: Mapping[str, list[Any]], theirs: Mapping[str, list[Any]], metric: str) -> list[float]:
    sign = -1 if metric == "nll" else 1
    scale = sign if metric == "nll" else 100
    return bootstrap([scale * (a - b) for a, b in zip(ours[metric], theirs[metric], strict=True)]).rounded()


def _mcnemar(ours: Mapping[str, list[Any]], theirs: Mapping[str, list[Any]], metrics: Sequence[str]) -> float | None:
    metric = next((name for name in metrics if name in _BINARY), None)
    return None if metric is None else float(f"{mcnemar(ours[metric], theirs[metric]):.3g}")


def _mean(metric: str, values: Sequence[float]) -> Any:
    if metric == "nll":
        return round(sum(values) / len(values), 4)
    return bootstrap([100 * value for value in values]).rounded()
