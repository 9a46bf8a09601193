"""Arms: the ways for the receiver to get at an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kvtalk.errors import InputError
from kvtalk.planning import Budget, Plan

Kind = Literal["receiver", "sharer", "text", "relay", "routing", "cache", "fused", "wrong", "zeroed", "self"]
KINDS: tuple[str, ...] = get_args(Kind)
TRANSFERS = ("cache", "fused", "wrong", "zeroed", "self")
"""Those that send a packet and so have a plan."""

PLACED = ("cache", "fused")
"""The two placements; a run has one of them."""

DESTROYED = ("wrong", "zeroed")
"""What a transfer is worth is what it scores above the best of these."""

ABOUT = {
    "receiver": "the receiver alone, without the context",
    "sharer": "the sharer alone, with the context",
    "text": "the receiver with the context as text",
    "relay": "the receiver with a text that the sharer wrote for it",
    "routing": "per question the more confident of receiver alone and sharer alone",
    "cache": "the receiver with the sharer's cache of the context",
    "fused": "the receiver reading the prompt itself, its cache enriched by the sharer's through a fuser",
    "wrong": "the same with the cache of another item's context, or where all read the question, of another question",
    "zeroed": "the same with every key and value, or every latent, set to zero",
    "self": "the same with the receiver's own cache in the sharer's place",
}


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: in tables and files.
        kind: see :data:`ABOUT`.
        plan: of the packet.
        budget: of the packet; with it, the plan may be None.
        gaps: see :func:`kvtalk.placement.place`.
    """

    name: str
    kind: Kind
    plan: Plan | None = None
    budget: str | None = None
    gaps: bool = True

    @property
    def way(self) -> str:
        """What is sent, without who sends it: arms of one way are each other's controls."""
        return self.name.partition(" ")[2]


def make_arms(
    kinds: Sequence[str], ways: Sequence[str] = (), controlled: Sequence[str] | None = None, seed: int = 0
) -> list[Arm]:
    """The arms of a run.

    Args:
        kinds: names from :data:`KINDS`.
        ways: what to send, each a plan, a plan that ends in ``contiguous`` (holes of dropped tokens are closed), or
            ``budget=SIZE``, maybe with a plan after it; by default bf16.
        controlled: which of ``ways`` are also sent by the controls (wrong, zeroed, self); by default all.
        seed: of random token policies.

    Raises:
        InputError: an unknown or repeated name, or routing without the two arms between which it chooses.
        KVTalkError: a way that is not one.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"no arm {kind!r}; there are {', '.join(KINDS)}")
    if not kinds:
        raise InputError(f"no arm to run; there are {', '.join(KINDS)}")
    if set(PLACED) <= set(kinds):
        raise InputError("cache and fused are two placements, whose controls have the same names: run them apart")
    if "routing" in kinds and not {"receiver", "sharer"} <= set(kinds):
        raise InputError("the arm routing chooses between two others: add receiver and sharer")
    ways = [way.strip() for way in ways] or ["bf16"]
    if len(set(kinds)) != len(kinds) or len(set(ways)) != len(ways):
        raise InputError("an arm or a plan is listed twice")
    plain = [Arm(kind, kind) for kind in KINDS if kind in kinds and kind not in TRANSFERS]  # type: ignore[arg-type]
    sent = [
        _transfer(kind, way, seed)
        for way in ways
        for kind in TRANSFERS
        if kind in kinds and (kind in PLACED or controlled is None or way in controlled)
    ]
    return plain + sent


def _transfer(kind: str, way: str, seed: int) -> Arm:
    first, _, rest = way.partition(" ")
    name = f"{kind} {way}"
    if first.startswith("budget="):
        budget = first.removeprefix("budget=")
        Budget.parse(budget)
        return Arm(name, kind, Plan.parse(rest, seed) if rest else None, budget)  # type: ignore[arg-type]
    gaps = not way.endswith(" contiguous")
    return Arm(name, kind, Plan.parse(way.removesuffix(" contiguous"), seed), gaps=gaps)  # type: ignore[arg-type]
