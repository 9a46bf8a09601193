"""The main job shown on invented passages: both bundled models, alone and across, several budgets, every control."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtalk.evaluation.arms import Arm, make_arms
from kvtalk.evaluation.data import Passage, samples, unrelated_text
from kvtalk.evaluation.picture import draw
from kvtalk.evaluation.protocols import protocol_for
from kvtalk.evaluation.runner import run
from kvtalk.evaluation.tasks import task_named
from kvtalk.link import Answer, Link
from kvtalk.models import LM

MODELS = ("smollm2-135m", "gemma3-270m")
KINDS = ("receiver", "text", "cache", "wrong", "zeroed")
WAYS = ("bf16", "budget=50%", "budget=25%", "budget=10%", "budget=5%")
ACROSS = ("bf16", "int8 width=256", "int4 width=256", "int4 width=64")
"""What crosses between different models: latents of 1,024 numbers a token, or their first ones."""
TIMED_QUESTIONS = 3
TITLES = {
    "receiver": "no context",
    "text": "context as text",
    "wrong bf16": "another text's cache",
    "zeroed bf16": "its cache, all zero",
    "cache bf16": "cache, bf16",
}


def run_demo(console: Console, out: Path, questions: int) -> None:
    """Ask, print one table, draw one picture.

    Args:
        console: where to print.
        out: folder for ``table.md``, ``picture.png`` and one run folder per model; earlier ones are replaced.
        questions: how many of the samples to ask, spread over all passages.
    """
    every = samples()
    items = [every[index * len(every) // questions] for index in range(questions)]
    rows: dict[str, list[dict[str, Any]]] = {}
    lms = {name: LM.load(name) for name in MODELS}
    for sharer, receiver in (*zip(MODELS, MODELS, strict=True), MODELS, MODELS[::-1]):
        name = sharer if sharer == receiver else f"{sharer}+{receiver}"
        ways = WAYS if sharer == receiver else ACROSS
        arms = make_arms(KINDS, ways, ways[:1])
        who = "reads and answers" if sharer == receiver else f"reads, {receiver} answers"
        console.print(f"[bold]{sharer}[/] {who}: {len(items)} questions about invented passages, {len(arms)} ways")
        link = Link(lms[sharer], lms[receiver])
        link.warm_up()
        shutil.rmtree(out / name, ignore_errors=True)
        rows[name] = run(link, protocol_for(task_named("invented")), items, arms, out / name)["arms"]
        for row, arm in zip(rows[name], arms, strict=True):
            row["first_token_ms"] = statistics.median(
                _first_token_ms(link, item, arm) for item in items[:TIMED_QUESTIONS]
            )
        _show_one(console, link, items[0], arms)
    console.print(_table(rows))
    (out / "table.md").write_text(_markdown(rows, questions), "utf-8")
    title = f"{questions} questions about invented passages"
    draw(rows, out / "picture.png", title, "contains", "right answers, %")
    console.print(f"table: {out / 'table.md'}, picture: {out / 'picture.png'}, every answer: {out}/*/items.jsonl.gz")


def _ask(link: Link, item: Passage, arm: Arm) -> Answer:
    if arm.kind in ("receiver", "text"):
        return link.receiver.answer_text(item.context if arm.kind == "text" else None, item.question)
    context = unrelated_text(item.context) if arm.kind == "wrong" else item.context
    return link.ask(context, item.question, budget=arm.budget, plan=arm.plan)


def _first_token_ms(link: Link, item: Passage, arm: Arm) -> float:
    cost = _ask(link, item, arm).cost
    return 1000 * (cost.decode + cost.place + cost.first_token)


def _show_one(console: Console, link: Link, item: Passage, arms: Sequence[Arm]) -> None:
    console.print(f"[dim]{escape(item.context)}[/]")
    console.print(f"[bold]{escape(item.question)}[/] (right: {escape(item.answers[0])})")
    for arm in (arm for arm in arms if arm.kind != "zeroed"):
        made = _ask(link, item, arm)
        console.print(f"  {_title(arm.name):22} {made.cost.bytes:>10,} bytes  {escape(made.text)}", highlight=False)


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("cache budget=", "cache, budget "))


def _table(rows: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(
        "sharer+receiver",
        "receiver gets",
        "right answers",
        "bytes",
        "bits/value",
        "first token",
        title="A model reads, another answers",
    )
    for name, group in rows.items():
        for row in group:
            table.add_row(name.replace("+", "+\n"), *_cells(row))
        table.add_section()
    return table


def _markdown(rows: dict[str, list[dict[str, Any]]], questions: int) -> str:
    lines = [
        f"Made by `kvtalk demo --questions {questions}`. Right: an accepted answer stands in what the model wrote. "
        "In brackets 95% intervals.",
        "",
        "| sharer+receiver | receiver gets | right answers | bytes | bits/value | first token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += ["| " + " | ".join([name, *_cells(row)]) + " |" for name, group in rows.items() for row in group]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    right, low, high = row["contains"]
    bits = f"{row['bits_per_value']:.2f}" if row["bits_per_value"] else ""
    return [
        _title(row["arm"]),
        f"{right:.0f}% [{low:.0f}, {high:.0f}]",
        f"{row['bytes']:,}",
        bits,
        f"{row['first_token_ms']:.0f} ms",
    ]
