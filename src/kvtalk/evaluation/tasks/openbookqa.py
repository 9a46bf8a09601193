"""OpenBookQA (Mihaylov et al. 2018, arXiv 1809.02789): elementary science, the fact book left closed."""

from kvtalk.evaluation.data import Choice, Hub
from kvtalk.evaluation.tasks.base import Task, labelled

TASK = Task(
    name="openbookqa",
    title="OpenBookQA",
    row=Choice,
    licence="Apache-2.0",
    file="openbookqa_test",
    hub=Hub(
        "allenai/openbookqa",
        "test",
        "388097ea7776314e93a529163e0fea805b8a6454",
        lambda raw: labelled(raw, "question_stem"),
        ("main",),
    ),
)
