"""ARC (Clark et al. 2018, arXiv 1803.05457): school science; challenge set and easy set."""

from kvtalk.evaluation.data import Choice, Hub, Item
from kvtalk.evaluation.tasks.base import Task, labelled

_REVISION = "210d026faf9955653af8916fad021475a3f00453"


class ArcRow(Choice):
    """Adds whether the official key of the item is a digit."""

    numeric_labels: bool = False


def _hub(config: str) -> Hub:
    return Hub("allenai/ai2_arc", "test", _REVISION, lambda raw: labelled(raw, "question"), (config,))


def _lettered_key(row: ArcRow) -> Item | None:
    return None if row.numeric_labels else row


CHALLENGE = Task(
    name="arc_challenge",
    title="ARC-Challenge",
    row=ArcRow,
    licence="CC BY-SA 4.0",
    file="arc_challenge_test",
    hub=_hub("ARC-Challenge"),
)

CHALLENGE_LETTERS = Task(
    name="arc_challenge_letters",
    title="ARC-Challenge, items whose official key is a letter",
    row=ArcRow,
    licence="CC BY-SA 4.0",
    file="arc_challenge_test",
    hub=_hub("ARC-Challenge"),
    keep=_lettered_key,
)
"""1,150 items on the hub, as in C2C. A local file knows a digit key only where its rows carry ``numeric_labels``."""

EASY = Task(
    name="arc_easy", title="ARC-Easy", row=ArcRow, licence="CC BY-SA 4.0", file="arc_easy_test", hub=_hub("ARC-Easy")
)
