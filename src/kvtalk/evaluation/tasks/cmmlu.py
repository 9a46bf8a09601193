"""CMMLU (Li et al. 2023, arXiv 2306.09212): Chinese knowledge in 67 subjects."""

from kvtalk.evaluation.data import Choice, Hub
from kvtalk.evaluation.tasks.base import Task, lettered

TASK = Task(
    name="cmmlu",
    title="CMMLU",
    row=Choice,
    licence="CC BY-NC-SA 4.0",
    open=False,
    file="cmmlu_test",
    hub=Hub("haonan-li/cmmlu", "test", "refs/convert/parquet", lambda raw: lettered(raw, "Question", "Answer")),
    question_prompt=("问题：", "\n答案："),
    option_prefix="",
)
