"""Arms as text, for the command line and files."""

from __future__ import annotations

from collections.abc import Sequence

from kvtalk.errors import InputError
from kvtalk.evaluation.runner import Arm
from kvtalk.planning import Budget, Plan

DEFAULT = (
    "none",
    "text",
    "wrong",
    "zeroed",
    "bf16",
    "int8:channel/int8:token before",
    "int4:channel/int4:token before",
    "budget=10%",
)


def parse_arms(lines: Sequence[str]) -> list[Arm]:
    """Arms from lines; :data:`DEFAULT` if there are none.

    A line is ``none``, ``text``, ``wrong``, ``zeroed`` (these two with a plan after them if it is not bf16),
    ``budget=SIZE``, or a plan; a plan may end in ``contiguous`` to close the holes of dropped tokens.

    Raises:
        InputError: the same arm twice.
        KVTalkError: a line that is none of these.
    """
    wanted = [line.split("#")[0].strip() for line in lines]
    wanted = [line for line in wanted if line] or list(DEFAULT)
    if len(set(wanted)) != len(wanted):
        raise InputError("an arm is listed twice")
    return [_parse(line) for line in wanted]


def _parse(line: str) -> Arm:
    first, _, rest = line.partition(" ")
    if line in ("none", "text"):
        return Arm(line, "none" if line == "none" else "text")
    if first in ("wrong", "zeroed"):
        return Arm(line, "wrong" if first == "wrong" else "zeroed", Plan.parse(rest) if rest else Plan())
    if first.startswith("budget="):
        budget = first.removeprefix("budget=")
        Budget.parse(budget)
        return Arm(line, "cache", Plan.parse(rest) if rest else None, budget)
    gaps = not line.endswith(" contiguous")
    return Arm(line, "cache", Plan.parse(line.removesuffix(" contiguous")), gaps=gaps)
