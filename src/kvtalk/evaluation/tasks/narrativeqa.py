"""NarrativeQA (Kočiský et al. 2018, arXiv 1712.07040): questions about the summary of a book or film.

The task takes a fixed 500 of the 3,461 dev questions, evenly spaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtalk.evaluation.data import Hub, Item, Passage
from kvtalk.evaluation.tasks.base import Task


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": raw["id"],
        "context": raw["document"]["summary"]["text"].strip(),
        "question": raw["question"]["text"],
        "answers": list(dict.fromkeys(answer["text"] for answer in raw["answers"])),
    }


_COUNT = 500


def _sample(items: list[Item]) -> list[Item]:
    if len(items) <= _COUNT:
        return items
    return [items[index * len(items) // _COUNT] for index in range(_COUNT)]


TASK = Task(
    name="narrativeqa",
    title="NarrativeQA, summaries, 500 of dev",
    row=Passage,
    licence="Apache-2.0, summaries CC BY-SA",
    file="narrativeqa_dev",
    hub=Hub("deepmind/narrativeqa", "validation", "2e643e7363944af1c33a652d1c87320d0871c4e4", _plain, ("default",)),
    sample=_sample,
    max_new_tokens=32,
    metrics=("f1", "em", "contains", "nll", "rouge_l"),
)
