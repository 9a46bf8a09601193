"""The command ``kvtalk report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.console import out


def report(
    folders: Annotated[list[Path], typer.Argument(help="Result folders of `kvtalk eval` and `kvtalk curve`.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "What does a KV cache carry?",
) -> None:
    """Make one self-contained page of any number of runs: tables, curves, answers side by side."""
    from kvtalk.evaluation import report as page

    page.write(folders, out_file, title)
    out.print(escape(f"{out_file}: {out_file.stat().st_size:,} bytes, open it in a browser"))
