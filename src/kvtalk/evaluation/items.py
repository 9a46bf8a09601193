"""Questions about contexts: the plain form that every contextual task comes in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvtalk.errors import InputError


class Item(BaseModel):
    """One question.

    Attributes:
        id: unique in its file.
        context: what the sharer reads.
        question: what the receiver is asked.
        answers: accepted answers.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    context: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answers: list[str] = Field(min_length=1)


def load_items(path: Path | str, limit: int | None = None) -> list[Item]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        InputError: no such file, or a line without the fields of :class:`Item`.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").removesuffix("\n").split("\n")  # not splitlines: U+2028 is no end of a line
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    items = []
    if lines == [""]:
        raise InputError(f"{path}: no items")
    for number, line in enumerate(lines[:limit], 1):
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            raise InputError(
                f"{path}, line {number}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; "
                f"expected the fields {', '.join(Item.model_fields)}"
            ) from error
    return items


def samples() -> list[Item]:
    """80 questions about 40 invented passages that come with kvtalk; no model can know the answers."""
    text = files("kvtalk.evaluation.samples").joinpath("invented.jsonl").read_text("utf-8")
    return [Item.model_validate_json(line) for line in text.splitlines()]


def digest(items: Sequence[Item]) -> str:
    """xxh3 over the items' content, so that a result names its data."""
    content = json.dumps([item.model_dump() for item in items], sort_keys=True, ensure_ascii=False)
    return str(xxhash.xxh3_64_hexdigest(content.encode()))


def unrelated_text(text: str) -> str:
    """Sample passages that are not ``text``, about as long: for the wrong-cache control of a single question."""
    pieces: list[str] = []
    contexts = [context for context in dict.fromkeys(item.context for item in samples()) if context != text]
    while sum(map(len, pieces)) < len(text):
        pieces.append(contexts[len(pieces) % len(contexts)])
    return "\n".join(pieces)[: max(len(text), 1)]
