"""The command ``kvtalk answer``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from kvtalk.commands.answers import as_dict, print_phases, sampling, streamer
from kvtalk.commands.console import loading, out
from kvtalk.commands.options import (
    DEFAULT_MODEL,
    AdapterOption,
    JsonOption,
    QuestionOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
)
from kvtalk.commands.reading import fetch

if TYPE_CHECKING:
    from kvtalk.link import Receiver


def answer(
    cache: Annotated[str, typer.Option("--cache", help="Packet file from `kvtalk share`, or its http:// address.")],
    question: QuestionOption,
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that answers.")] = DEFAULT_MODEL,
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 48,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from a packet file, without ever seeing the text."""
    blob = fetch(cache)
    with loading():
        side = _receiver(receiver, adapter, blob)
    made = side.answer(
        blob,
        question,
        max_new_tokens=max_new_tokens,
        streamer=None if as_json else streamer(side),
        **sampling(temperature, seed),
    )
    if as_json:
        out.print_json(json.dumps(as_dict(made)))
        return
    if not out.is_terminal:
        typer.echo(made.text)
    print_phases(made)


def _receiver(name: str, adapter: str | None, blob: memoryview) -> Receiver:
    """The side that answers; for a latent without a named adapter, with the one that comes with kvtalk."""
    from kvtalk.adapters.cards import shipped_as
    from kvtalk.adapters.halves import receiver_half
    from kvtalk.link import Receiver
    from kvtalk.models import LM
    from kvtalk.packet import read_stream

    packets = list(read_stream(blob))  # a damaged file is refused before a model is loaded
    needed = packets[0].manifest.adapter
    found = adapter or (shipped_as(needed) if needed else None)
    lm = LM.load(name)
    return Receiver(lm, None if found is None else receiver_half(found, lm))
