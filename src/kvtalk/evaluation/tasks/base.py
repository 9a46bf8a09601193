"""What a task is: where its rows come from, how it is asked, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtalk.errors import InputError
from kvtalk.evaluation.data import Choice, Hub, Item, Passage, hub_rows, local_file, read_rows, shipped

CHOICE_PROTOCOLS = ("letter", "likelihood")
FREE_PROTOCOLS = ("free",)

LETTER_PROMPT = """Accurately answer the following question:

{question}

Choices:
{choices}

Instructions:
- Carefully read the question and all options.
- Select the single most correct answer.
- Respond ONLY in the following format: "The correct answer is A/B/C/D".
- Do not include any explanations, additional text, or punctuation besides the answer.

The correct answer is"""
"""C2C's, for every set and language (thu-nics/C2C, rosetta/utils/evaluate.py, Apache-2.0)."""

BACKGROUND_PROMPT = "Briefly describe the most useful background to solve the problem:\n\n{question}"
"""What C2C's sharer is asked in its text relay, without the options (rosetta/baseline/multi_stage.py)."""


@dataclass(frozen=True)
class Task:
    """A set of questions.

    Attributes:
        name: on the command line.
        title: in reports.
        row: the fields of a row in the plain form.
        licence: of the data.
        open: whether the licence lets us show questions in a report.
        file: name of its local file, without suffix.
        hub: where it is on the hub, if it is.
        comes_along: whether the file is a part of kvtalk.
        keep: the item of a row, or None to leave the row out.
        sample: the items that are asked, of all of them.
        max_new_tokens: of an answer in words.
        metrics: what an answer in words is scored by, the first one leading.
        question_prompt: before and after the question where the options' likelihoods are compared.
        option_prefix: between that and an option.
    """

    name: str
    title: str
    row: type[Item]
    licence: str
    file: str
    open: bool = True
    hub: Hub | None = None
    comes_along: bool = False
    keep: Callable[[Any], Item | None] = lambda row: row
    sample: Callable[[list[Item]], list[Item]] = lambda items: items
    max_new_tokens: int = 24
    metrics: tuple[str, ...] = ("f1", "em", "contains", "nll")
    question_prompt: tuple[str, str] = ("Question: ", "\nAnswer:")
    option_prefix: str = " "

    @property
    def has_context(self) -> bool:
        """Whether the sharer reads something that the receiver does not."""
        return issubclass(self.row, Passage)

    @property
    def protocols(self) -> tuple[str, ...]:
        """How it can be asked, the default first."""
        return FREE_PROTOCOLS if self.has_context else CHOICE_PROTOCOLS

    def load(
        self,
        data: Path | str | None = None,
        *,
        limit: int | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
    ) -> list[Item]:
        """The items.

        Args:
            data: a file, or a folder with this task's file; by default the folder in ``KVTALK_DATA``, then what comes
                with kvtalk, then the hub.
            limit: only the first so many.
            hub_id: another data set of the same form, or a folder laid out like one.
            revision: of the hub data set.

        Raises:
            InputError: not found, or a row without the fields expected.
        """
        kept = (self.keep(row) for row in self._rows(data, hub_id, revision))
        items = self.sample([item for item in kept if item is not None])[:limit]
        if len({item.id for item in items}) != len(items):
            raise InputError(f"{self.name}: two rows have the same id")
        if not items:
            raise InputError(f"{self.name}: no items")
        return items

    def _rows(self, data: Path | str | None, hub_id: str | None, revision: str | None) -> Iterable[Item]:
        if hub_id is None:
            path = local_file(self.file, data)
            if path is not None:
                return read_rows(path, self.row)
            if self.comes_along:
                return shipped(self.file, self.row)
        if self.hub is None:
            raise InputError(
                f"{self.name} is not on the hub: give a folder with {self.file}.jsonl(.gz) by --data or KVTALK_DATA"
            )
        return hub_rows(self.hub, self.row, hub_id, revision)


def options(item: Choice) -> str:
    """The options as lines: ``A. ...``."""
    return "".join(f"{chr(65 + index)}. {choice}\n" for index, choice in enumerate(item.choices))


def labelled(raw: Any, question: str) -> dict[str, Any]:
    """A hub row with ``choices: {text, label}`` and ``answerKey`` in the plain form."""
    key = raw["answerKey"].strip()
    return {
        "id": raw["id"],
        "question": raw[question],
        "choices": list(raw["choices"]["text"]),
        "answer": list(raw["choices"]["label"]).index(key),
        "numeric_labels": key.isdecimal(),
    }


def lettered(raw: Any, question: str, answer: str) -> dict[str, Any]:
    """A hub row with columns A to D in the plain form."""
    return {
        "id": f"{raw['subject']}-{raw['id']}",
        "question": raw[question],
        "choices": [raw[letter] for letter in "ABCD"],
        "answer": "ABCD".index(raw[answer]),
        "subject": raw["subject"],
    }
