"""MMLU-Redux 2.0 (Gema et al. 2024, arXiv 2406.04127): MMLU with its errors marked.

As in C2C: items without a right answer, and those that were left to experts, are skipped; a wrong key is replaced by
the right one; everything else keeps MMLU's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtalk.evaluation.data import Choice, Hub, Item
from kvtalk.evaluation.tasks.base import Task

_SKIPPED = ("no_correct_answer", "expert")


class ReduxRow(Choice):
    """Adds what the annotators found."""

    error_type: str
    correct_answer: str | int | None = None


def _keep(row: ReduxRow) -> Item | None:
    if row.error_type in _SKIPPED:
        return None
    if row.error_type != "wrong_groundtruth":
        return row
    right = str(row.correct_answer).strip()
    index = int(right) if right.isdecimal() else "ABCD".find(right) if len(right) == 1 else -1
    return row.model_copy(update={"answer": index}) if 0 <= index < len(row.choices) else None


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = ("question", "answer", "error_type", "correct_answer", "subject")
    return {"id": f"mmlu-redux-{raw['id']}", "choices": list(raw["choices"]), **{name: raw[name] for name in names}}


TASK = Task(
    name="mmlu_redux",
    title="MMLU-Redux 2.0",
    row=ReduxRow,
    licence="CC BY 4.0",
    file="mmlu_redux",
    hub=Hub("edinburgh-dawg/mmlu-redux-2.0", "test", "372ea425445d51e1ba1188c56e5e893f8138621f", _plain),
    keep=_keep,
)
