"""The command ``kvtalk import-c2c``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import loading, out


def import_c2c(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder of github.com/thu-nics/C2C, with projector_0.pt.")],
    sharer: Annotated[str, typer.Option("--sharer", "-s", help="Model that it calls the teacher.")],
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that it calls the base.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the fuser.")],
) -> None:
    """Make a fuser of a checkpoint that C2C's published code trained; no pickled code is run."""
    from kvtalk.adapters import c2c
    from kvtalk.models import LM

    with loading():
        reads = LM.load(sharer)
        card = c2c.import_c2c(folder, reads, reads if receiver == sharer else LM.load(receiver), out_folder)
    facts = card.facts
    out.print(
        escape(
            f"{out_folder}: {facts['layers']} layers from {facts['projectors']} projectors, {facts['open']} of "
            f"{2 * facts['layers']} gates open"
        ),
        highlight=False,
        soft_wrap=True,
    )
    next_command = f"kvtalk eval --task openbookqa --sharer {sharer} --receiver {receiver} --fuser {out_folder}"
    out.print(escape(f"next: {next_command}"), highlight=False, soft_wrap=True)
