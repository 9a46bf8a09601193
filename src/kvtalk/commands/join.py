"""The command ``kvtalk join``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import out


def join(
    encoder: Annotated[str, typer.Option(help="Adapter whose encoder to take: its sharer is the new one's.")],
    decoder: Annotated[str, typer.Option(help="Adapter whose decoder to take: its receiver is the new one's.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the joined adapter.")],
) -> None:
    """Join two translators' halves to the adapter of a pair that was never trained together; no model is loaded.

    [bold]kvtalk join --encoder A_TO_B --decoder C_TO_D --out A_TO_D[/]

    Each is a folder, a hub id, or the name of one that comes with kvtalk. Both must be of one latent space: train a
    half into a space that is there with kvtalk train translator, --encoder or --decoder.
    """
    from kvtalk.adapters import store

    card = store.join(encoder, decoder, out_folder)
    out.print(
        escape(
            f"next: kvtalk ask --context notes.txt --question '...' --sharer {card.sharer.name} "
            f"--receiver {card.receiver.name} --adapter {out_folder}"
        ),
        highlight=False,
        soft_wrap=True,
    )
