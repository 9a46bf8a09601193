"""How long each phase of each arm takes, one question at a time, as a user meets it.

The batched run says nothing about latency. Here every arm is warmed up first, the device is synchronised before the
clock is read, and medians are reported.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kvtalk.evaluation.arms import Arm
from kvtalk.evaluation.batch import Settings
from kvtalk.evaluation.data import Item, Passage
from kvtalk.evaluation.protocols import Protocol
from kvtalk.fusion import FusedLink
from kvtalk.link import Answer, Cost, Link, Receiver
from kvtalk.models import LM
from kvtalk.transport.file import saving

PHASES = ("prefill", "relay", "encode", "decode", "place", "first_token", "rest")
SUMS = ("receiver_first_token", "to_first_token", "total")
"""The receiver's own way to its first token; the whole way to it, what the sharer does included; everything."""

FILE = "timings.json"


def time_arms(
    link: Link, protocol: Protocol, items: Sequence[Item], arms: Sequence[Arm], settings: Settings, out: Path
) -> None:
    """Write ``timings.json``: seconds of every phase, for each item in each arm that can be timed by itself.

    The destroyed caches take as long as the cache, and routing as long as its two arms together: they are left out.
    """
    timed = []
    for arm in arms:
        if arm.kind in ("wrong", "zeroed", "routing"):
            continue
        _once(link, protocol, items[0], arm, settings)
        if link.receiver.lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = [_once(link, protocol, item, arm, settings) for item in items]
        timed.append({"arm": arm.name, "seconds": found, "peak_memory_bytes": _peak(link.receiver.lm)})
    with saving(out / FILE) as target:
        target.write((json.dumps(timed, indent=1) + "\n").encode())


def medians(out: Path) -> dict[str, dict[str, float]]:
    """Per arm, the median milliseconds of each phase and the peak memory; empty if nothing was timed."""
    file = out / FILE
    if not file.exists():
        return {}
    return {
        row["arm"]: {
            **{
                phase: round(1000 * statistics.median(item[phase] for item in row["seconds"]), 2)
                for phase in (*PHASES, *SUMS)
            },
            "peak_memory_bytes": row["peak_memory_bytes"],
        }
        for row in json.loads(file.read_text("utf-8"))
    }


def _once(link: Link, protocol: Protocol, item: Item, arm: Arm, settings: Settings) -> dict[str, float]:
    """Seconds of each phase of one question."""
    seconds = dict.fromkeys(PHASES, 0.0)
    if isinstance(link, FusedLink) and arm.kind in ("fused", "self"):
        seconds.update(_phases(_fused(link, protocol, item, arm)))
    elif arm.kind in ("cache", "self") and isinstance(item, Passage):
        pair = link if arm.kind == "cache" else Link(link.receiver.lm, link.receiver.lm)
        tokens = protocol.task.max_new_tokens
        made = pair.ask(
            item.context, item.question, budget=arm.budget, plan=arm.plan, gaps=arm.gaps, max_new_tokens=tokens
        )
        seconds.update(_phases(made))
    else:
        side = Receiver(link.sharer.lm) if arm.kind == "sharer" else link.receiver
        background = item.context if isinstance(item, Passage) and arm.kind in ("sharer", "text") else None
        if arm.kind == "relay":
            writer = Receiver(link.sharer.lm)
            prompt, stop = protocol.relay_prompt(writer, item), protocol.relay_stop(writer.lm)
            cost, background = _written(protocol, writer, prompt, settings.relay_tokens, stop)
            seconds["relay"] = cost.first_token + cost.rest
        prompt, stop = protocol.prompt(side, item, background), protocol.answer_stop(side.lm)
        cost, _ = _written(protocol, side, prompt, protocol.answer_tokens, stop)
        seconds.update(first_token=cost.first_token, rest=cost.rest)
    total = sum(seconds.values())
    receiver = seconds["decode"] + seconds["place"] + seconds["first_token"]
    return {**seconds, "receiver_first_token": receiver, "to_first_token": total - seconds["rest"], "total": total}


def _fused(link: FusedLink, protocol: Protocol, item: Item, arm: Arm) -> Answer:
    """One question to both models."""
    fusion = link.own if arm.kind == "self" and link.own is not None else link.fusion
    sharer, lm = fusion.sharers[0].side.lm, fusion.receiver.lm
    theirs, ours = protocol.fused_prompts(sharer, lm, item)
    tokens, stop = protocol.answer_tokens, protocol.answer_stop(lm)
    return fusion.answer([theirs], ours, budget=arm.budget, plan=arm.plan, max_new_tokens=tokens, stop=stop)


def _phases(made: Answer) -> dict[str, float]:
    return {name: value for name, value in asdict(made.cost).items() if name in PHASES}


def _written(
    protocol: Protocol, side: Receiver, prompt: list[int], tokens: int, stop: Sequence[str]
) -> tuple[Cost, str]:
    """What it takes to read a prompt and to write after it; the model's own head is there already."""
    placed = side.lm.place([[]], room=len(prompt) + tokens, head=protocol.head)
    made = side.lm.generate([prompt], placed, max_new_tokens=tokens, stop=stop)[0]
    return replace(Cost(0, 0.0, 0), first_token=made.first_token_seconds, rest=made.rest_seconds), made.text


def _peak(lm: LM) -> int:
    """Peak memory in bytes: of the device, or of the whole process so far on a CPU."""
    if lm.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(lm.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
