"""Countries, KVComm's own set (arXiv 2510.03346): the context names a landmark, the question asks for its country."""

from kvtalk.evaluation.data import Passage
from kvtalk.evaluation.tasks.base import Task

TASK = Task(
    name="countries",
    title="Countries",
    row=Passage,
    licence="Apache-2.0",
    file="kvcomm_countries",
    max_new_tokens=8,
    metrics=("contains", "f1", "em", "nll", "kvcomm"),
)
