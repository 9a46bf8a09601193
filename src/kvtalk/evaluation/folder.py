"""A results folder: whose run it holds, what is done of it, and what was answered.

``manifest.json`` says what was run, ``items.partial.jsonl`` holds the answers so far, ``items.jsonl.gz`` all of them.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import kvtalk
from kvtalk.adapters.cards import Card
from kvtalk.adapters.translator import by_name
from kvtalk.errors import InputError
from kvtalk.evaluation.arms import Arm
from kvtalk.evaluation.batch import Settings
from kvtalk.evaluation.data import Item, digest
from kvtalk.evaluation.protocols import Protocol
from kvtalk.evaluation.summary import Record, read_records, route
from kvtalk.fusion import FusedLink
from kvtalk.link import Link
from kvtalk.transport.file import saving

LOG = "items.partial.jsonl"
SHOWN_ITEMS = 8
_FIXED = (
    "task",
    "sharer",
    "receiver",
    "adapter",
    "prompt",
    "items",
    "answer_tokens",
    "relay_tokens",
    "dtype",
    "decoding",
    "seed",
)
"""What may not change between the starts of one run."""

_SELF = "self_adapter"
"""Which fuser serves the arm self; may be named later than the run was begun, but not changed."""

_ABOUT = ("command", "device", "versions", "started")
"""What may, and is kept of every start."""


def describe(
    link: Link,
    protocol: Protocol,
    items: Sequence[Item],
    left_out: Sequence[str],
    arms: Sequence[Arm],
    settings: Settings,
) -> dict[str, Any]:
    """The manifest of a run."""
    lm, task = link.receiver.lm, protocol.task
    own = link.own if isinstance(link, FusedLink) else None
    return {
        "command": shlex.join(["kvtalk", *sys.argv[1:]]),
        "task": {"name": task.name, "title": task.title, "licence": task.licence, "protocol": protocol.name},
        "sharer": {"name": link.sharer.lm.name, **asdict(link.sharer.lm.spec.fingerprint)},
        "receiver": {"name": lm.name, **asdict(lm.spec.fingerprint)},
        "adapter": _adapter(link.card),
        _SELF: _adapter(own.sharers[0].side.card if own is not None else None),
        "prompt": protocol.prompt_facts(lm),
        "items": {"count": len(items), "xxh3": digest(items), "left_out": list(left_out)},
        "metrics": list(protocol.metrics),
        "arms": [asdict(arm) for arm in arms],
        "answer_tokens": protocol.answer_tokens,
        "relay_tokens": settings.relay_tokens,
        "decoding": f"sampled at {settings.temperature:g}" if settings.temperature else "greedy",
        "seed": settings.seed,
        "batch": settings.batch,
        "dtype": str(lm.spec.dtype),
        "device": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else platform.processor() or "cpu",
        "versions": {
            "kvtalk": kvtalk.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        InputError: there is none, or it is not one.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        if not {"task", "items", "arms", "metrics"} <= set(manifest):
            raise ValueError("manifest.json is not that of a run")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{out}: no run in this folder ({error})") from error
    return dict(manifest)


@contextmanager
def claimed(out: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """While active, the folder is this process's and holds this run, new or begun before.

    A run may get further arms and keeps its answers; what was said of its earlier starts stands under ``earlier``.

    Raises:
        InputError: another run, or another process's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write into {out}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process is at work in {out}: wait for it, or give another --out") from error
        file = out / "manifest.json"
        write_json(file, _continued(out, json.loads(json.dumps(manifest))) if file.exists() else manifest)
        yield
    finally:
        os.close(handle)


def _continued(out: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on."""
    before = read_manifest(out)
    different = [key for key in _FIXED if before.get(key) != now[key]]
    own = before.get(_SELF)
    if own and now[_SELF] and own != now[_SELF]:
        different.append(_SELF)
    if not all(arm in now["arms"] for arm in before["arms"]):
        different.append("arms")
    finished = now["arms"] == before["arms"] and not (out / LOG).exists()
    if not finished and now["metrics"] != before["metrics"]:
        different.append("metrics")
    if different:
        raise InputError(f"{out} holds another run ({', '.join(different)} differ): give another --out, or remove it")
    if all(now[key] == before.get(key) for key in ("arms", "device", "versions")):
        return before
    earlier = [*before.get("earlier", ()), {key: before.get(key) for key in _ABOUT}]
    return {**before, **{key: now[key] for key in (*_ABOUT, "arms")}, _SELF: own or now[_SELF], "earlier": earlier}


def _adapter(card: Card | None) -> dict[str, Any] | None:
    return None if card is None else {"identity": card.identity, **asdict(card.geometry, dict_factory=by_name)}


def open_log(out: Path) -> set[tuple[str, str]]:
    """Make the log of a run ready to be added to; a line that was cut off is taken out.

    Returns:
        ids and arms that are done.
    """
    log = out / LOG
    if not log.exists():
        asked = (record for record in read_records(out) if record.arm != "routing")
        with saving(log) as target:
            target.writelines(line(record) for record in asked)
    done, good = set(), 0
    with log.open("rb") as file:
        for content in file:
            try:
                record = Record(**json.loads(content))
            except (ValueError, TypeError):
                break
            if not content.endswith(b"\n"):
                break
            done.add((record.id, record.arm))
            good += len(content)
    with log.open("rb+") as file:
        file.truncate(good)
    return done


def finish(out: Path, routing: bool) -> None:
    """Pack the log, with the records of query routing if that is an arm."""
    log = out / LOG

    def lines() -> Iterator[bytes]:
        with log.open("rb") as whole:
            yield from whole
        if routing:
            with log.open("rb") as whole:
                yield from map(line, route(Record(**json.loads(content)) for content in whole))

    write_records(out, lines())
    log.unlink()


def write_records(out: Path, lines: Iterable[bytes]) -> None:
    """``items.jsonl.gz``."""
    with saving(out / "items.jsonl.gz") as target, gzip.GzipFile(fileobj=target, mode="wb", mtime=0) as packed:
        packed.writelines(lines)


def write_sample(out: Path, protocol: Protocol, items: Sequence[Item]) -> None:
    """``sample.json``: a few items for a report; only their ids where the licence wants it so."""
    step = max(1, len(items) // SHOWN_ITEMS)
    shown = [item.model_dump() for item in items[::step][:SHOWN_ITEMS]]
    names = ("id", "context", "question", "answers", "choices", "answer") if protocol.task.open else ("id",)
    write_json(out / "sample.json", [{name: item[name] for name in names if name in item} for item in shown])


def line(record: Record) -> bytes:
    """A record as a line; ASCII, so that no character of an answer ends it."""
    return (json.dumps(asdict(record)) + "\n").encode()


def write_json(file: Path, content: Any) -> None:
    """JSON that people can read."""
    with saving(file) as target:
        target.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
