"""The command ``kvtalk average``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import out
from kvtalk.commands.options import PackingOption


def average(
    adapters: Annotated[list[str], typer.Argument(help="Two translators at least, trained on from one another.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the mean.")],
    packing: PackingOption = "nf4:1x64",
) -> None:
    """Write the translator whose weights are the mean of others'; no model is loaded.

    [bold]kvtalk average BEFORE AFTER --out MEAN[/]

    Each is a folder, a hub id, or the name of one that comes with kvtalk. One must have been trained on from the other
    (kvtalk train translator --from), or all from one: the mean then may answer better than any of them, and costs no
    more. Means of others are worth nothing.
    """
    from kvtalk.adapters import store

    card = store.average(adapters, out_folder, None if packing == "bf16" else packing)
    out.print(
        escape(
            f"next: kvtalk eval --task squad --sharer {card.sharer.name} --receiver {card.receiver.name} "
            f"--adapter {out_folder} --arms receiver,text,cache,wrong,zeroed"
        ),
        highlight=False,
        soft_wrap=True,
    )
