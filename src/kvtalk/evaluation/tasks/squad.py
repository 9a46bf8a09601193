"""SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250): the answer is a span of a paragraph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtalk.evaluation.data import Hub, Passage
from kvtalk.evaluation.tasks.base import Task


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    answers = list(dict.fromkeys(raw["answers"]["text"]))
    return {"id": raw["id"], "context": raw["context"], "question": raw["question"], "answers": answers}


TASK = Task(
    name="squad",
    title="SQuAD v1.1",
    row=Passage,
    licence="CC BY-SA 4.0",
    file="squad_v1_test",
    hub=Hub("rajpurkar/squad", "validation", "7b6d24c440a36b6815f21b70d25016731768db1f", _plain, ("plain_text",)),
)
