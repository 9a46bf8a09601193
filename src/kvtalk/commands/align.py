"""The command ``kvtalk align``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtalk.commands.console import loading, out
from kvtalk.commands.options import JsonOption
from kvtalk.commands.reading import text_or_file
from kvtalk.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def align(
    text: Annotated[str, typer.Argument(help="A file, - for standard input, or the text itself in quotes.")],
    sharer: Annotated[
        str, typer.Option("--sharer", "-s", help="Whose tokenizer reads: bundled name, folder, .gguf file or hub id.")
    ],
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Whose tokens are to be matched.")],
    strategy: Annotated[
        str,
        typer.Option(
            help="Which of the sharer tokens that share characters with a receiver token stands for it: first, last, "
            "coverage (the one that covers most of it) or mean (all of them)."
        ),
    ] = "coverage",
    limit: Annotated[int, typer.Option(min=0, help="Receiver tokens to show; the report counts all.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """See which sharer token stands for which receiver token, from the tokenizers alone.

    [bold]kvtalk align --sharer smollm2-135m --receiver gemma3-270m "unbelievable 北京 😀"[/]

    Tokens that cover the same characters belong together. Sharer tokens in parentheses overlap but are passed over;
    they are no loss with --strategy mean. The last column is what C2C's published code would feed to the sharer
    instead: each receiver token decoded and encoded again by itself, ≠ where the sharer's own tokens are others.
    """
    from kvtalk.alignment import inspection

    content = text_or_file(text)
    with loading():
        tokenizers = _tokenizer(sharer), _tokenizer(receiver)
    compared = inspection.compare(*tokenizers, content, strategy)
    if as_json:
        about = {"sharer": sharer, "receiver": receiver, "strategy": strategy}
        out.print_json(json.dumps({**about, **inspection.as_dict(compared, limit)}))
        return
    if limit:
        out.print(inspection.table(compared, limit))
    for line in inspection.lines(compared):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer without the model.

    Raises:
        ModelError: there is none of that name.
    """
    from kvtalk import bundled
    from kvtalk.loading import load_tokenizer

    base = Path(name.partition("+")[0])  # a LoRA has no tokenizer of its own
    if str(base) in bundled.MODELS:
        return bundled.load_tokenizer(str(base))
    if base.suffix == ".gguf" and base.is_file():
        return load_tokenizer(base.parent, {"gguf_file": base.name})
    if not base.is_dir() and (base.suffix == ".gguf" or base.is_absolute() or len(base.parts) != 2):
        raise ModelError(
            f"no model {name!r}: give a folder, a .gguf file, a hub id, or a name from `kvtalk models list`"
        )
    return load_tokenizer(base)
