"""Our own invented passages: questions whose answers no model can know without them, and sentences to complete."""

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
    title="Invented sentences to complete",
    row=Passage,
    licence="Apache-2.0",
    file="invented_gaps",
    comes_along=True,
    metrics=("contains", "f1", "em", "nll"),
)
"""Each about a short passage of its own (three sentences): one of them without a word, mostly an ordinary one, or its
beginning, which is the form that the fusers that come along learned. Some can be guessed without the passage."""
