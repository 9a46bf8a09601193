"""Our own: 80 questions about 40 invented passages, so that no model can know an answer without the passage."""

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
