"""Our own: questions about 40 invented passages, so that no model can know an answer without the passage."""

from kvtalk.evaluation.data import Passage
from kvtalk.evaluation.tasks.base import Task

TASK = Task(
    name="invented",
    title="Invented passages",
    row=Passage,
    licence="Apache-2.0",
    file="invented",
    comes_along=True,
    metrics=("contains", "f1", "em", "nll"),
)

GAPS = Task(
    name="invented_gaps",
    title="Sentences of invented passages to complete",
    row=Passage,
    licence="Apache-2.0",
    file="invented_gaps",
    comes_along=True,
    metrics=("contains", "f1", "em", "nll"),
)
"""Each question is a sentence without one of its words, or its beginning: what the fusers that come along learned."""
