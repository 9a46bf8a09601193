"""The command ``kvtalk push``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import err, out


def push(
    folder: Annotated[str, typer.Argument(help="Adapter: its folder, or the name of one that comes with kvtalk.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its id on the hub, created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to, created if need be; OWNER/NAME@REVISION loads it.")
    ] = None,
) -> None:
    """Upload a translator or a fuser to the Hugging Face hub, with a page made from its card.

    [bold]hf auth login && kvtalk push DIR me/smollm2-to-gemma[/]

    Only the card, the weights and the page go there. The card names the models as they were loaded: a model from a
    folder by that folder's name.
    """
    from kvtalk.adapters import hub

    with err.status("uploading ..."):
        address = hub.push_adapter(folder, repo, private, revision)
    name = repo if revision is None else f"{repo}@{revision}"
    out.print(escape(f"{address}: load it as {name}"), highlight=False, soft_wrap=True)
