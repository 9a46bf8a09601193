"""C-Eval (Huang et al. 2023, arXiv 2305.08322): Chinese examinations, the validation questions."""

from kvtalk.evaluation.data import Choice, Hub
from kvtalk.evaluation.tasks.base import Task, lettered

TASK = Task(
    name="ceval",
    title="C-Eval (val)",
    row=Choice,
    licence="CC BY-NC-SA 4.0",
    open=False,
    file="ceval_val",
    hub=Hub(
        "ceval/ceval-exam",
        "val",
        "617524a00b307ff6f9933702f724131fe12ca7ce",
        lambda raw: lettered(raw, "question", "answer"),
    ),
    question_prompt=("问题：", "\n答案："),
    option_prefix="",
)
