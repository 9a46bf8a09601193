"""Rows of a task: from a local file, from what comes with kvtalk, or from a hub data set; all in one plain form."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvtalk.errors import InputError

ENVIRONMENT = "KVTALK_DATA"
SUFFIXES = (".jsonl", ".jsonl.gz")


Text = Annotated[str, Field(pattern=r"\S")]
"""With something in it besides spaces."""


class Item(BaseModel):
    """One question.

    Attributes:
        id: unique in its file.
        question: what the receiver is asked.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    question: Text


class Passage(Item):
    """A question about a context.

    Attributes:
        context: what the sharer reads.
        answers: accepted answers.
    """

    context: Text
    answers: list[str] = Field(min_length=1)


class Choice(Item):
    """A multiple-choice question.

    Attributes:
        choices: the options.
        answer: index of the right one.
        subject: what it is about, where the set says so.
    """

    choices: list[Text] = Field(min_length=2, max_length=26)
    answer: int = Field(ge=0)
    subject: str = ""

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Choice:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices")
        return self


T = TypeVar("T", bound=Item)


@dataclass(frozen=True)
class Hub:
    """A data set on the hub.

    Attributes:
        id: of the data set.
        split: which part of it.
        revision: the commit that our figures stand on.
        configs: names of its configurations; empty for all of them.
        plain: one of its rows in the plain form.
    """

    id: str
    split: str
    revision: str
    plain: Callable[[Mapping[str, Any]], dict[str, Any]]
    configs: tuple[str, ...] = ()


def read_rows(path: Path, row: type[T]) -> Iterator[T]:
    """The rows of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        InputError: no such file, or a line without the fields of ``row``; names the line.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").removesuffix("\n").split("\n")  # not splitlines: U+2028 is no end of a line
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if lines == [""]:
        raise InputError(f"{path}: no items")
    for number, line in enumerate(lines, 1):
        with _checked(row, f"{path}, line {number}"):
            item = row.model_validate_json(line)
        yield item


def shipped(name: str, row: type[T]) -> Iterator[T]:
    """The rows of a file that comes with kvtalk."""
    text = files("kvtalk.evaluation.samples").joinpath(f"{name}.jsonl").read_text("utf-8")
    return (row.model_validate_json(line) for line in text.splitlines())


def hub_rows(hub: Hub, row: type[T], source: str | None = None, revision: str | None = None) -> Iterator[T]:
    """The rows of a hub data set, or of a local folder that is laid out like one.

    Args:
        hub: where and how.
        row: the fields wanted.
        source: another id, or a folder; by default that of ``hub``.
        revision: another commit.

    Raises:
        InputError: `datasets` is not installed, the data set cannot be loaded, or a row lacks fields.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("hub data sets need datasets: pip install 'kvtalk[eval]'") from error
    name = source or hub.id
    pinned = revision or (hub.revision if source is None else None)
    try:
        configs = hub.configs or tuple(datasets.get_dataset_config_names(name, revision=pinned))
        loaded = [datasets.load_dataset(name, config, split=hub.split, revision=pinned) for config in configs]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"data set {name} could not be loaded ({reason}); give a local file with --data or {ENVIRONMENT}"
        ) from error
    for config, part in zip(configs, loaded, strict=True):
        for number, raw in enumerate(part):
            where = f"{name} {config}, row {number}"
            try:
                plain = hub.plain({"id": f"{config}-{number}", "subject": config, **raw})
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise InputError(
                    f"{where}: {error!r}; another revision of the data set than {hub.revision}?"
                ) from error
            with _checked(row, where):
                item = row.model_validate(plain)
            yield item


def local_file(name: str, data: Path | str | None) -> Path | None:
    """The file of a task in a folder, or None; ``data`` may also be the file itself.

    Args:
        name: of the file, without suffix.
        data: folder or file; by default what the environment variable ``KVTALK_DATA`` says.

    Raises:
        InputError: ``data`` was given and holds no such file.
    """
    given = data or os.environ.get(ENVIRONMENT)
    if not given:
        return None
    path = Path(given)
    if path.is_file():
        return path
    for suffix in SUFFIXES:
        if (path / f"{name}{suffix}").is_file():
            return path / f"{name}{suffix}"
    if data is None:
        return None
    wanted = " or ".join(f"{name}{suffix}" for suffix in SUFFIXES)
    raise InputError(f"cannot read {path}: it is neither a file nor a folder with {wanted}")


def samples() -> list[Passage]:
    """80 questions about 40 invented passages that come with kvtalk; no model can know the answers."""
    return list(shipped("invented", Passage))


def invented_gaps() -> list[Passage]:
    """24 sentences to complete, of a short passage each: a word is left out, or the sentence breaks off before one."""
    return list(shipped("invented_gaps", Passage))


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


@contextmanager
def _checked(row: type[Item], where: str) -> Iterator[None]:
    """Names the place and the fields of a row that breaks the format."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "row"
        raise InputError(
            f"{where}: {field}: {problem['msg']}; expected the fields {', '.join(row.model_fields)}"
        ) from error
