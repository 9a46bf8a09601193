"""The command ``kvtalk``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from kvtalk.commands.align import align
from kvtalk.commands.answer import answer
from kvtalk.commands.ask import ask
from kvtalk.commands.average import average
from kvtalk.commands.console import err
from kvtalk.commands.curve import curve
from kvtalk.commands.demo import demo
from kvtalk.commands.eval import evaluate
from kvtalk.commands.import_c2c import import_c2c
from kvtalk.commands.inspect import inspect
from kvtalk.commands.join import join
from kvtalk.commands.models import app as models_app
from kvtalk.commands.push import push
from kvtalk.commands.report import report
from kvtalk.commands.share import share
from kvtalk.commands.train import app as train_app
from kvtalk.errors import KVTalkError

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for every misuse of options; the module it lives in differs between versions."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="One LLM hands what it has read to another as a KV cache, under a byte budget.\n\n"
    "Start with:  kvtalk ask --context notes.txt --question 'Who built the bridge?' --budget 25%",
)
app.command()(ask)
app.command()(share)
app.command()(answer)
app.command()(inspect)
app.command()(align)
app.command()(import_c2c)
app.command()(join)
app.command()(average)
app.command()(push)
app.command("eval")(evaluate)
app.command()(curve)
app.command()(report)
app.command()(demo)
app.add_typer(models_app, name="models")
app.add_typer(train_app, name="train")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from kvtalk import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; a mistake of the caller is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except KVTalkError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        code = 2
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        err.print("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
