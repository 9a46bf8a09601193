"""What ``ask`` and ``answer`` share: how an answer is drawn, and how it is printed with what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from kvtalk.commands.console import out

if TYPE_CHECKING:
    from kvtalk.link import Answer, Receiver


def sampling(temperature: float, seed: int) -> dict[str, Any]:
    """Options of generating, after the seed is set."""
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature} if temperature else {}


def streamer(side: Receiver) -> Any:
    """Prints the answer as it comes, on a terminal."""
    if not out.is_terminal:
        return None
    from transformers import TextStreamer

    return TextStreamer(side.lm.tokenizer, skip_prompt=True, skip_special_tokens=True)


def print_compared(rows: dict[str, Answer], text: str, as_json: bool) -> None:
    """Print the first answer, the others beside it, and what the first cost.

    Args:
        rows: answers by what each receiver got.
        text: what a receiver got as text, for the bytes of that.
        as_json: one object, and nothing else.
    """
    if as_json:
        out.print_json(json.dumps({name: as_dict(row) for name, row in rows.items()}))
        return
    answer = next(iter(rows.values()))
    if not out.is_terminal:
        typer.echo(answer.text)
    out.print(_table(rows, text))
    print_phases(answer)


def print_phases(made: Answer) -> None:
    """What crossed, by which plan, and where the time went."""
    cost = made.cost
    bits = f", {cost.bits_per_value:.2f} bits per value" if cost.bits_per_value else ""
    each = f" ({' + '.join(f'{size:,}' for size in cost.each)})" if cost.each else ""
    out.print(f"the cache's way: {cost.bytes:,} bytes{each}{bits}")
    if made.plan is not None:
        out.print(f"plan: {_plans(made)}", highlight=False)
    table = Table("phase", "ms")
    for phase in ("prefill", "encode", "decode", "place", "first_token", "rest"):
        seconds = getattr(cost, phase)
        if seconds:
            table.add_row(phase.replace("_", " "), f"{1000 * seconds:.0f}")
    out.print(table)


def as_dict(made: Answer) -> dict[str, Any]:
    """For --json."""
    return {"answer": made.text, "plan": _plans(made), **asdict(made.cost)}


def _plans(made: Answer) -> str | None:
    """Of every sharer."""
    return None if made.plan is None else " + ".join(map(str, made.plans or (made.plan,)))


def _table(rows: dict[str, Answer], text: str) -> Table:
    import zstandard

    packed = len(zstandard.compress(text.encode(), 19))
    table = Table("receiver gets", "answer", "bytes", "bits/value", "first token", title="same question, same run")
    for name, row in rows.items():
        cost = row.cost
        size = f"{cost.bytes:,}"
        if name == "context as text":
            size += f" ({packed:,} zstd)"
        table.add_row(
            name,
            escape(row.text) or "(nothing)",
            size,
            f"{cost.bits_per_value:.2f}" if row.plan else "",
            f"{1000 * (cost.decode + cost.place + cost.first_token):.0f} ms",
        )
    return table
