"""The command ``kvtalk inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvtalk.commands.console import out
from kvtalk.commands.options import JsonOption


def inspect(
    file: Annotated[Path, typer.Argument(help="Packet file.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a packet file holds, verified, without any model."""
    from kvtalk import inspection
    from kvtalk.packet import read_stream
    from kvtalk.transport.file import load

    packets = list(read_stream(load(file)))
    if as_json:
        out.print_json(json.dumps([inspection.as_dict(packet) for packet in packets]))
        return
    for packet in packets:
        out.print(inspection.table(packet))
