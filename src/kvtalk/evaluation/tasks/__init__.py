"""Tasks by name."""

from __future__ import annotations

from kvtalk.errors import InputError
from kvtalk.evaluation.tasks import (
    arc,
    ceval,
    cmmlu,
    countries,
    hotpotqa,
    invented,
    mmlu_redux,
    narrativeqa,
    openbookqa,
    squad,
)
from kvtalk.evaluation.tasks.base import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        squad.TASK,
        hotpotqa.DISTRACTOR,
        hotpotqa.GOLD,
        narrativeqa.TASK,
        countries.TASK,
        invented.TASK,
        invented.GAPS,
        openbookqa.TASK,
        arc.CHALLENGE,
        arc.CHALLENGE_LETTERS,
        arc.EASY,
        mmlu_redux.TASK,
        ceval.TASK,
        cmmlu.TASK,
    )
}


def task_named(name: str) -> Task:
    """A task by name.

    Raises:
        InputError: unknown name.
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
