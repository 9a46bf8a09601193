"""The command ``kvtalk share``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import loading, out
from kvtalk.commands.options import (
    DEFAULT_MODEL,
    AdapterOption,
    JsonOption,
    PlanOption,
    SeedOption,
    SharerOption,
    plan_of,
)
from kvtalk.commands.reading import read_text

if TYPE_CHECKING:
    from kvtalk.link import Sharer


def share(
    context: Annotated[str, typer.Option("--context", "-c", help="File with the text to read, - for standard input.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Packet file to write, such as notes.kvt.")],
    sharer: SharerOption = DEFAULT_MODEL,
    adapter: AdapterOption = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", "-b", help="Bytes that may cross: 200KB, 1MiB; 4bits a value; 25% of the bf16 cache."),
    ] = None,
    plan: PlanOption = None,
    parts: Annotated[int, typer.Option(min=1, help="Packets by layer group, so that a receiver can start early.")] = 1,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Read a text and write its cache as a packet file; the receiver's half is `kvtalk answer`."""
    text = read_text(context)
    chosen = plan_of(plan, seed)
    with loading():
        side = _sharer(sharer, adapter)
    from kvtalk.transport import file

    with file.saving(out_file) as target:
        used, cost = side.write(target, text, budget, chosen, parts)
    report = {"file": str(out_file), "plan": str(used), **asdict(cost)}
    if as_json:
        out.print_json(json.dumps(report))
        return
    out.print(
        f"{escape(str(out_file))}: {cost.bytes:,} bytes for {cost.context_tokens} tokens, "
        f"{cost.bits_per_value:.2f} bits per value, plan: {used}"
    )
    to = f"{sharer}" if side.half is None else f"{side.half.card.receiver.name} --adapter {adapter}"
    out.print(escape(f"next: kvtalk answer --cache {out_file} --receiver {to} --question '...'"))


def _sharer(name: str, adapter: str | None) -> Sharer:
    from kvtalk.adapters.halves import sharer_half
    from kvtalk.link import Sharer
    from kvtalk.models import LM

    lm = LM.load(name)
    return Sharer(lm, None if adapter is None else sharer_half(adapter, lm))
