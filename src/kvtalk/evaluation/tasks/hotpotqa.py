"""HotpotQA (Yang et al. 2018, arXiv 1809.09600): two paragraphs must be joined, among ten or alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from kvtalk.evaluation.data import Hub, Item, Passage
from kvtalk.evaluation.tasks.base import Task


class HotpotRow(Passage):
    """Adds the gold sentences."""

    support: list[str] = Field(min_length=1)


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    paragraphs = dict(zip(raw["context"]["title"], raw["context"]["sentences"], strict=True))
    facts = zip(raw["supporting_facts"]["title"], raw["supporting_facts"]["sent_id"], strict=True)
    return {
        "id": raw["id"],
        "context": "\n\n".join(f"{title}: {''.join(sentences).strip()}" for title, sentences in paragraphs.items()),
        "question": raw["question"],
        "answers": [raw["answer"]],
        "support": [paragraphs[title][index].strip() for title, index in facts if index < len(paragraphs[title])],
    }


def _gold(row: HotpotRow) -> Item:
    return row.model_copy(update={"context": "\n".join(row.support)})


_HUB = Hub("hotpotqa/hotpot_qa", "validation", "1908d6afbbead072334abe2965f91bd2709910ab", _plain, ("distractor",))

DISTRACTOR = Task(
    name="hotpotqa",
    title="HotpotQA, distractor",
    row=HotpotRow,
    licence="CC BY-SA 4.0",
    file="hotpotqa_dev_distractor",
    hub=_HUB,
)

GOLD = Task(
    name="hotpotqa_gold",
    title="HotpotQA, gold sentences",
    row=HotpotRow,
    licence="CC BY-SA 4.0",
    file="hotpotqa_dev_distractor",
    hub=_HUB,
    keep=_gold,
)
"""The context is what KVComm's sender reads: the supporting sentences alone."""
