"""The command ``kvtalk demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtalk.commands.console import out, quiet_transformers


def demo(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for table and picture.")] = Path("results/demo"),
    questions: Annotated[int, typer.Option(min=2, max=80, help="How many of the 80 to ask; fused, of 24.")] = 24,
) -> None:
    """Ask invented questions through both bundled models at several budgets, fused too; one table, one picture."""
    from kvtalk.evaluation import demo as show

    quiet_transformers()
    show.run_demo(out, out_dir, questions)
