"""The main job shown on invented passages: both bundled models, alone, across, fused, several budgets and controls."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtalk.adapters.cards import shipped_for
from kvtalk.evaluation.arms import Arm, make_arms
from kvtalk.evaluation.data import Passage, invented_gaps, samples, unrelated_text
from kvtalk.evaluation.picture import draw
from kvtalk.evaluation.protocols import protocol_for
from kvtalk.evaluation.runner import run
from kvtalk.evaluation.tasks import invented
from kvtalk.evaluation.tasks.base import Task
from kvtalk.fusion import FusedLink
from kvtalk.link import Answer, Link
from kvtalk.models import LM

MODELS = ("smollm2-135m", "gemma3-270m")
KINDS = ("receiver", "text", "cache", "wrong", "zeroed")
WAYS = ("bf16", "budget=50%", "budget=25%", "budget=10%", "budget=5%")
ACROSS = ("bf16", "int8 width=256", "int4 width=256", "int4 width=64")
"""What crosses between different models: latents of 1,024 numbers a token, or their first ones."""
FUSED_KINDS = ("receiver", "text", "fused", "wrong", "zeroed")
FUSED = ("bf16", "int4:channel/int4:token delta_proj_vnorm@25%")
"""What crosses to a fuser, of the question's tokens as the sharer reads them: all, or a quarter in 4 bits."""
TIMED_QUESTIONS = 3
TITLES = {
    "receiver": "no context",
    "text": "context as text",
    "wrong bf16": "another text's cache",
    "zeroed bf16": "its cache, all zero",
    "cache bf16": "cache, bf16",
    "fused bf16": "fused, bf16",
    f"fused {FUSED[1]}": "fused, int4, 25%",
    f"wrong {FUSED[1]}": "another's, int4, 25%",
    f"zeroed {FUSED[1]}": "all zero, int4, 25%",
}


@dataclass(frozen=True)
class Part:
    """Two models, and all the ways in which one of them answers.

    Attributes:
        name: in table and picture.
        says: what is asked, for the line above.
        link: both models.
        task: what is asked.
        items: of the task.
        arms: the ways.
    """

    name: str
    says: str
    link: Link
    task: Task
    items: Sequence[Passage]
    arms: Sequence[Arm]


def run_demo(console: Console, out: Path, questions: int) -> None:
    """Ask, print one table, draw one picture.

    Args:
        console: where to print.
        out: folder for ``table.md``, ``picture.png`` and a run folder of each pair; earlier ones are replaced.
        questions: how many of the samples to ask, spread over all passages.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for part in _parts({name: LM.load(name) for name in MODELS}, questions):
        rows[part.name] = _asked(console, part, out / part.name.replace(", ", "."))
    console.print(_table(rows))
    (out / "table.md").write_text(_markdown(rows, questions), "utf-8")
    title = f"{questions} questions about invented passages; fused: sentences to complete"
    draw(rows, out / "picture.png", title, "contains", "right answers, %")
    console.print(f"table: {out / 'table.md'}, picture: {out / 'picture.png'}, every answer: {out}/*/items.jsonl.gz")


def _parts(lms: Mapping[str, LM], questions: int) -> Iterator[Part]:
    """Each model with itself, both across, and where a fuser comes with kvtalk, fused."""
    items = _spread(samples(), questions)
    for sharer, receiver in (*zip(MODELS, MODELS, strict=True), MODELS, MODELS[::-1]):
        same = sharer == receiver
        ways = WAYS if same else ACROSS
        who = "reads and answers" if same else f"reads, {receiver} answers"
        yield Part(
            sharer if same else f"{sharer}+{receiver}",
            f"[bold]{sharer}[/] {who}: {len(items)} questions about invented passages",
            Link(lms[sharer], lms[receiver]),
            invented.TASK,
            items,
            make_arms(KINDS, ways, ways[:1]),
        )
    gaps = _spread(invented_gaps(), questions)
    for sharer, receiver in (MODELS, MODELS[::-1]):
        if shipped_for(lms[sharer].spec, lms[receiver].spec, "fuser") is None:
            continue
        yield Part(
            f"{sharer}+{receiver}, fused",
            f"[bold]{sharer}[/] reads, {receiver} completes a sentence, its cache fused: {len(gaps)} further passages",
            FusedLink(lms[sharer], lms[receiver]),
            invented.GAPS,
            gaps,
            make_arms(FUSED_KINDS, FUSED),
        )


def _spread(items: Sequence[Passage], count: int) -> list[Passage]:
    """So many of them, or all if there are fewer, from the first to the last passage."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _asked(console: Console, part: Part, out: Path) -> list[dict[str, Any]]:
    """A part's rows of the table, after one of its questions was shown."""
    console.print(f"{part.says}, {len(part.arms)} ways")
    part.link.warm_up()
    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = run(part.link, protocol_for(part.task), part.items, part.arms, out)["arms"]
    for row, arm in zip(rows, part.arms, strict=True):
        timed = [_first_token_ms(part.link, item, arm) for item in part.items[:TIMED_QUESTIONS]]
        row["first_token_ms"] = statistics.median(timed)
    _show_one(console, part.link, part.items[0], part.arms)
    return rows


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
        "NLL",
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
        "In brackets 95% intervals. NLL: nats a token of the right answer, less is better. Fused: not these questions, "
        "but sentences of further, shorter passages to complete, mostly without an ordinary word.",
        "",
        "| sharer+receiver | receiver gets | right answers | NLL | bytes | bits/value | first token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += ["| " + " | ".join([name, *_cells(row)]) + " |" for name, group in rows.items() for row in group]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    right, low, high = row["contains"]
    bits = f"{row['bits_per_value']:.2f}" if row["bits_per_value"] else ""
    return [
        _title(row["arm"]),
        f"{right:.0f}% [{low:.0f}, {high:.0f}]",
        f"{row['nll']:.2f}",
        f"{row['bytes']:,}",
        bits,
        f"{row['first_token_ms']:.0f} ms",
    ]
