"""The command ``kvtalk average``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import out
from kvtalk.commands.options import PackingOption
from kvtalk.errors import InputError


def average(
    adapters: Annotated[list[str], typer.Argument(help="Two translators at least, trained on from one another.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the mean.")],
    packing: PackingOption = "nf4:1x64",
    last: Annotated[
        bool, typer.Option("--last", help="Of runs, the weights after the last step, not the mean of the last steps.")
    ] = False,
) -> None:
    """Write the translator whose weights are the mean of others'; no model is loaded.

    [bold]kvtalk average BEFORE AFTER --out MEAN[/]

    Each is a folder, a hub id, or the name of one that comes with kvtalk. One must have been trained on from the other
    (kvtalk train translator --from), or all from one: the mean then may answer better than any of them, and costs no
    more. Means of others are worth nothing. Of a folder in which a run lies its exact weights are taken, not those of
    its file, which are rounded: the ones that it kept or, with --last, the ones after its last step.
    """
    from kvtalk.adapters import store
    from kvtalk.training.loop import CHECKPOINT, exact_weights

    runs = [Path(name) for name in adapters if (Path(name) / CHECKPOINT).exists()]
    if last and not runs:
        raise InputError("--last is for folders in which a run lies, and none of these is one")
    exact = [exact_weights(Path(name), last)[0] if Path(name) in runs else {} for name in adapters]
    card = store.average(adapters, out_folder, None if packing == "bf16" else packing, exact)
    for run in runs:
        out.print(escape(f"of {run}: the run's exact {'last ' * last}weights"), highlight=False, soft_wrap=True)
    out.print(
        escape(
            f"next: kvtalk eval --task squad --sharer {card.sharer.name} --receiver {card.receiver.name} "
            f"--adapter {out_folder} --arms receiver,text,cache,wrong,zeroed"
        ),
        highlight=False,
        soft_wrap=True,
    )
