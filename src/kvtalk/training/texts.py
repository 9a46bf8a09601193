"""Texts to train on: plain text, questions about a context, instructions; from files or the hub."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from kvtalk.errors import TrainingError

_LEAST_CHARACTERS = 20_000
_USAGE = "context, question, answers; or prompt, response; or text"
_SLACK = 200
"""Characters that the ends of words may add."""

_SPACE = re.compile(r"\s")


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
        documents: running text.
        questions: about contexts; each context is also a document.
    """

    documents: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @classmethod
    def load(cls, names: Sequence[str]) -> Texts:
        """Read files (``.jsonl``, ``.txt``, either with ``.gz``) or hub data sets.

        Rows hold ``context``, ``question``, ``answers``; or ``prompt``, ``response``; or ``text``.

        Raises:
            TrainingError: not found, unreadable, rows of another form, or too little text.
        """
        return cls.of([row for name in names for row in rows_of(name)])

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Texts:
        """Rows that are at hand.

        Raises:
            TrainingError: a row of another form, or too little text.
        """
        read = [_read(row, number) for number, row in enumerate(rows, 1)]
        questions = [one for one in read if isinstance(one, Question)]
        documents = [one for one in read if isinstance(one, str)]
        documents += dict.fromkeys(question.context for question in questions)
        random.Random(0).shuffle(documents)
        made = cls(documents, questions)
        if len(made.plain) < _LEAST_CHARACTERS:
            raise TrainingError(
                f"{len(made.plain):,} characters of text are too few to train on: give at least {_LEAST_CHARACTERS:,}"
            )
        return made

    @cached_property
    def plain(self) -> str:
        """All documents, joined by blank lines."""
        return "\n\n".join(self.documents)

    @property
    def digest(self) -> str:
        """Of everything that is trained on."""
        asked = "".join(f"{q.context}{q.question}{q.answers}" for q in self.questions)
        return str(xxhash.xxh3_64_hexdigest((self.plain + asked).encode()))

    def split(self, share: float) -> tuple[Texts, Texts]:
        """A training and a validation part; no document and no context is in both."""
        asked = dict.fromkeys(question.context for question in self.questions)
        contexts, others = list(asked), [document for document in self.documents if document not in asked]
        kept = {*_last(contexts, share), *_last(others, share)}
        kept = kept or {self.documents[-1]}
        return tuple(  # type: ignore[return-value]
            Texts(
                [document for document in self.documents if (document in kept) == back],
                [question for question in self.questions if (question.context in kept) == back],
            )
            for back in (False, True)
        )

    def passage(self, at: float, context: int, continuation: int) -> tuple[str, str]:
        """A context of about so many characters and what follows it, both cut between words; in a short text less.

        Args:
            at: where, from 0 to 1.
            context: characters.
            continuation: characters.
        """
        context = min(context, max(1, len(self.plain) - continuation - _SLACK))
        last = max(1, len(self.plain) - context - continuation - _SLACK)
        begin = _border(self.plain, int(at * last)) + 1
        middle = _border(self.plain, begin + context)
        end = _border(self.plain, middle + continuation)
        return self.plain[begin:middle], self.plain[middle:end]


def _border(text: str, at: int) -> int:
    """The first white space from a character on."""
    found = _SPACE.search(text, at)
    return found.start() if found else len(text)


def _last(items: Sequence[str], share: float) -> Sequence[str]:
    """A share of them, at least two where there are four."""
    count = max(int(share * len(items)), 2 if len(items) >= 4 else 0)
    return items[len(items) - count :]


def _read(row: dict[str, Any], number: int) -> Question | str:
    if row.keys() >= {"context", "question", "answers"}:
        return question_in(row, number)
    for names in (("prompt", "response"), ("text",)):
        if row.keys() >= set(names):
            texts = [row[name] for name in names]
            if all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts):
                return "\n".join(texts)
            raise TrainingError(f"row {number}: {' and '.join(names)} must be text that is not empty")
    raise TrainingError(f"row {number} has {', '.join(map(str, row))}; expected {_USAGE}")


def question_in(row: dict[str, Any], number: int) -> Question:
    """A row with context, question and answers.

    Raises:
        TrainingError: they are no texts, or empty.
    """
    answers = _answers(row["answers"])
    if answers and all(isinstance(text, str) and text.strip() for text in (row["context"], row["question"])):
        return Question(row["context"], row["question"], answers)
    raise TrainingError(f"row {number}: context, question and at least one answer must be texts that are not empty")


def _answers(given: Any) -> tuple[str, ...]:
    """Texts of answers: one, a list of them, or SQuAD's own form; nothing if it is something else."""
    listed = given.get("text") if isinstance(given, dict) else [given] if isinstance(given, str) else given
    found = tuple(listed) if isinstance(listed, (list, tuple)) else ()
    return found if all(isinstance(text, str) and text.strip() for text in found) else ()


def rows_of(name: str) -> Iterable[dict[str, Any]]:
    """The rows of a file or of a hub data set.

    Raises:
        TrainingError: not found or unreadable.
    """
    path = Path(name)
    if not path.exists():
        return _hub_rows(name)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if ".jsonl" not in path.suffixes:
                return [{"text": file.read()}]
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise TrainingError(f"{name}: cannot be read ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise TrainingError(f"{name}: every line must be a JSON object")
    return rows


def _hub_rows(name: str) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TrainingError(f"no file {name}; for hub data sets: pip install 'kvtalk[train]'") from error
    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:  # whatever the hub's client raises
        raise TrainingError(f"{name}: neither a file nor a data set on the hub ({error})") from error
