"""Texts to train on: plain text, questions about a context, instructions; from files or the hub."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from kvtalk.errors import TrainingError

_LEAST_CHARACTERS = 20_000
_QUESTION, _INSTRUCTION = {"context", "question", "answers"}, {"prompt", "response"}
_USAGE = "context, question, answers; or prompt, response; or text"


@dataclass(frozen=True)
class Question:
    """A question about a context, with one of its answers drawn when it is used."""

    context: str
    question: str
    answers: tuple[str, ...]


@dataclass
class Texts:
    """What to train on.

    Attributes:
        plain: running text; documents are joined by blank lines.
        questions: about contexts.
    """

    plain: str = ""
    questions: list[Question] = field(default_factory=list)

    @classmethod
    def load(cls, names: Sequence[str]) -> Texts:
        """Read files (``.jsonl``, ``.txt``, either with ``.gz``) or hub data sets.

        Rows hold ``context``, ``question``, ``answers``; or ``prompt``, ``response``; or ``text``.

        Raises:
            TrainingError: not found, rows of another form, or too little text.
        """
        return cls.of(row for name in names for row in _checked_rows(name))

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Texts:
        """Rows that are at hand.

        Raises:
            TrainingError: too little text.
        """
        documents: list[str] = []
        questions: list[Question] = []
        for row in rows:
            if row.keys() >= _QUESTION:
                questions.append(Question(row["context"], row["question"], tuple(row["answers"])))
            elif row.keys() >= _INSTRUCTION:
                documents.append(f"{row['prompt']}\n{row['response']}")
            else:
                documents.append(row["text"])
        documents += dict.fromkeys(question.context for question in questions)
        random.Random(0).shuffle(documents)
        plain = "\n\n".join(documents)
        if len(plain) < _LEAST_CHARACTERS:
            raise TrainingError(
                f"{len(plain):,} characters of text are too few to train on: give at least {_LEAST_CHARACTERS:,}"
            )
        return cls(plain, questions)

    @property
    def digest(self) -> str:
        """Of everything that is trained on."""
        asked = "".join(f"{q.context}{q.question}{q.answers}" for q in self.questions)
        return str(xxhash.xxh3_64_hexdigest((self.plain + asked).encode()))

    def split(self, share: float) -> tuple[Texts, Texts]:
        """A training and a validation part; no context is in both."""
        contexts = list(dict.fromkeys(question.context for question in self.questions))
        kept_back = set(contexts[len(contexts) - int(share * len(contexts)) :])
        border = _border(self.plain, int((1 - share) * len(self.plain)))
        plain = self.plain[:border]
        for context in kept_back:
            plain = plain.replace(context, "")
        return (
            Texts(plain, [question for question in self.questions if question.context not in kept_back]),
            Texts(self.plain[border:], [question for question in self.questions if question.context in kept_back]),
        )

    def passage(self, rng: random.Random, context: int, continuation: int) -> tuple[str, str]:
        """A context of about so many characters and what follows it, both cut between words; in a short text less."""
        context = min(context, max(1, len(self.plain) - continuation - _SLACK))
        last = max(1, len(self.plain) - context - continuation - _SLACK)
        begin = _border(self.plain, rng.randrange(last)) + 1
        middle = _border(self.plain, begin + context)
        end = _border(self.plain, middle + continuation)
        return self.plain[begin:middle], self.plain[middle:end]


_SLACK = 200
"""Characters that the ends of words may add."""

_SPACE = re.compile(r"\s")


def _border(text: str, at: int) -> int:
    """The first white space from a character on."""
    found = _SPACE.search(text, at)
    return found.start() if found else len(text)


def _checked_rows(name: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_rows(name), 1):
        if not (row.keys() >= _QUESTION or row.keys() >= _INSTRUCTION or "text" in row):
            raise TrainingError(f"{name}: row {number} has {', '.join(row)}; expected {_USAGE}")
        yield row


def _rows(name: str) -> Iterable[dict[str, Any]]:
    path = Path(name)
    if not path.exists():
        return _hub_rows(name)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" in path.suffixes:
            return [json.loads(line) for line in file if line.strip()]
        return [{"text": file.read()}]


def _hub_rows(name: str) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TrainingError(f"no file {name}; for hub data sets: pip install 'kvtalk[train]'") from error
    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:  # whatever the hub's client raises
        raise TrainingError(f"{name}: neither a file nor a data set on the hub ({error})") from error
