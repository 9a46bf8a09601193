"""Run arms on the same items and keep every answer.

All arms of a batch share one prefill of the sharer, and all arms of one plan its packets. What is written is enough
to recompute any figure without a model; a run that is killed goes on where it stopped.
"""

from __future__ import annotations

import gzip
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Task as BarTask,
)
from rich.text import Text

import kvtalk
from kvtalk.errors import InputError
from kvtalk.evaluation.arms import Arm
from kvtalk.evaluation.batch import Batch, Settings
from kvtalk.evaluation.data import Item, Passage, digest
from kvtalk.evaluation.protocols import Protocol
from kvtalk.evaluation.summary import Record, plan_from, read_records, route, summarize, write_summary
from kvtalk.link import Link
from kvtalk.transport.file import saving

SHOWN_ITEMS = 8


def run(
    link: Link,
    protocol: Protocol,
    items: Sequence[Item],
    arms: Sequence[Arm],
    out: Path,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Evaluate and write ``manifest.json``, ``items.jsonl.gz``, ``summary.json`` and ``table.md`` into a folder.

    Args:
        link: sharer and receiver.
        protocol: how the questions are asked.
        items: what is asked.
        arms: see :func:`kvtalk.evaluation.arms.make_arms`.
        out: created if need be; a run of the same items and models in it is continued, and gets what arms it lacks.
        settings: batch, length of a relayed text.

    Returns:
        the summary.

    Raises:
        InputError: the folder holds another run, or an arm that the task cannot serve.
    """
    settings = settings or Settings.for_device(link.receiver.lm.device)
    check_arms(protocol, items, arms)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {out}: {error.strerror}") from error
    manifest = _manifest(link, protocol, items, arms, settings)
    _claim(out / "manifest.json", manifest)
    _write(out / "sample.json", _sample(protocol, items))
    log = out / "items.partial.jsonl"
    if not log.exists():
        asked_for = (record for record in read_records(out) if record.arm != "routing")
        _write(log, "".join(map(_line, asked_for)).encode())
    done = _repair(log)
    asked = [arm for arm in arms if arm.kind != "routing"]
    with log.open("a", encoding="utf-8") as file, _bar() as bar:
        task = bar.add_task("items x arms", total=len(items) * len(asked), completed=len(done))
        for batch in _batches(link, protocol, items, settings):
            wanted = [arm for arm in asked if any((item.id, arm.name) not in done for item in batch.items)]
            for arm in wanted:
                fresh = [record for record in batch.run(arm) if (record.id, arm.name) not in done]
                file.writelines(map(_line, fresh))
                file.flush()
                bar.advance(task, len(fresh))
    with saving(out / "items.jsonl.gz") as target, gzip.GzipFile(fileobj=target, mode="wb", mtime=0) as packed:
        with log.open("rb") as whole:
            packed.writelines(whole)
        if any(arm.kind == "routing" for arm in arms):
            packed.writelines(_line(record).encode() for record in route(_read_log(log)))
    log.unlink()
    return recompute(out)


def recompute(out: Path) -> dict[str, Any]:
    """The summary of a finished run from its manifest and records, without a model.

    Raises:
        InputError: there is no finished run in the folder.
    """
    manifest = read_manifest(out)
    arms = [Arm(**{**arm, "plan": plan_from(arm["plan"])}) for arm in manifest["arms"]]
    summary = summarize(read_records(out), arms, manifest["metrics"], manifest["items"]["count"])
    summary = {"task": manifest["task"], **summary}
    write_summary(out, summary)
    return summary


def rescore(
    out: Path, protocol: Protocol, items: Sequence[Item], names: Sequence[str], embedder: str
) -> dict[str, Any]:
    """Add metrics of the answers' words to a finished run, from its answers and the items, without a model.

    Raises:
        InputError: other items than the run's.
    """
    from kvtalk.evaluation.metrics import METRICS

    manifest = read_manifest(out)
    if digest(items) != manifest["items"]["xxh3"]:
        raise InputError(f"{out} was run on other items: give the same --task, --data and --limit")
    by_id = {item.id: item for item in items}
    records = list(read_records(out))
    passages = [item for record in records if isinstance(item := by_id[record.id], Passage)]
    for name in names:
        for record, score in zip(
            records, METRICS[name].score([x.answer for x in records], passages, embedder), strict=True
        ):
            record.scores[name] = round(score, 4)
    manifest["metrics"] = list(dict.fromkeys([*manifest["metrics"], *names]))
    manifest["embedder"] = Path(embedder).name if Path(embedder).is_dir() else embedder
    with saving(out / "items.jsonl.gz") as target, gzip.GzipFile(fileobj=target, mode="wb", mtime=0) as packed:
        packed.writelines(_line(record).encode() for record in records)
    _write(out / "manifest.json", _json(manifest))
    return recompute(out)


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        InputError: there is none.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: no run in this folder ({error})") from error
    return dict(manifest)


def _batches(link: Link, protocol: Protocol, items: Sequence[Item], settings: Settings) -> Iterator[Batch]:
    """Items of similar length together, those of one context next to each other."""
    ordered = sorted(items, key=_length)
    contexts = list(dict.fromkeys(item.context for item in ordered if isinstance(item, Passage)))
    following = dict(zip(contexts, contexts[1:] + contexts[:1], strict=True))
    for start in range(0, len(ordered), settings.batch):
        yield Batch(link, protocol, ordered[start : start + settings.batch], following, settings)


def _length(item: Item) -> tuple[int, str, int]:
    if isinstance(item, Passage):
        return len(item.context), item.context, len(item.question)
    return len(item.question), "", sum(map(len, getattr(item, "choices", ())))


def check_arms(protocol: Protocol, items: Sequence[Item], arms: Sequence[Arm]) -> None:
    """Refuse arms that these items cannot serve.

    Raises:
        InputError: an arm twice, one that needs a context, or a wrong cache where there is only one context.
    """
    task = protocol.task
    contexts = {item.context for item in items if isinstance(item, Passage)}
    if len(contexts) == 1 and any(arm.kind == "wrong" for arm in arms):
        raise InputError("the wrong-cache control needs at least two different contexts: take more items")
    if len({arm.name for arm in arms}) != len(arms):
        raise InputError("an arm is listed twice")
    for arm in arms:
        if not task.has_context and arm.kind not in ("receiver", "sharer", "relay", "routing"):
            raise InputError(
                f"{task.name} has no context that the sharer could read for the receiver, so there is no arm "
                f"{arm.kind!r}; use receiver, sharer, relay, routing"
            )


def _manifest(
    link: Link, protocol: Protocol, items: Sequence[Item], arms: Sequence[Arm], settings: Settings
) -> dict[str, Any]:
    lm = link.receiver.lm
    return {
        "command": " ".join(["kvtalk", *(f"'{word}'" if " " in word else word for word in sys.argv[1:])]),
        "task": {
            "name": protocol.task.name,
            "title": protocol.task.title,
            "licence": protocol.task.licence,
            "protocol": protocol.name,
        },
        "sharer": {"name": link.sharer.lm.name, **asdict(link.sharer.lm.spec.fingerprint)},
        "receiver": {"name": lm.name, **asdict(lm.spec.fingerprint)},
        "prompt": asdict(lm.prompt),
        "items": {"count": len(items), "xxh3": digest(items)},
        "metrics": list(protocol.metrics),
        "arms": [asdict(arm) for arm in arms],
        "max_new_tokens": protocol.task.max_new_tokens,
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


_FIXED = (
    "task",
    "sharer",
    "receiver",
    "prompt",
    "items",
    "max_new_tokens",
    "relay_tokens",
    "dtype",
    "decoding",
    "seed",
)


def _claim(file: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or make sure that the run that is there is this one, maybe with fewer arms.

    A run that gets further arms keeps its answers; what it said about itself before stands under ``earlier``.
    """
    if not file.exists():
        _write(file, _json(manifest))
        return
    before, now = read_manifest(file.parent), json.loads(json.dumps(manifest))
    different = [key for key in _FIXED if before.get(key) != now[key]]
    if not all(arm in now["arms"] for arm in before["arms"]):
        different.append("arms")
    if not set(now["metrics"]) <= set(before["metrics"]):
        different.append("metrics")
    if different:
        raise InputError(
            f"{file.parent} holds another run ({', '.join(different)} differ): give another --out, or remove it"
        )
    if now["arms"] != before["arms"]:
        about = ("command", "device", "versions", "started")
        earlier = [*before.get("earlier", ()), {key: before[key] for key in about}]
        _write(file, _json({**before, **{key: now[key] for key in (*about, "arms")}, "earlier": earlier}))


def _sample(protocol: Protocol, items: Sequence[Item]) -> bytes:
    """A few items for a report; only their ids where the licence wants it so."""
    step = max(1, len(items) // SHOWN_ITEMS)
    shown = [item.model_dump() for item in items[::step][:SHOWN_ITEMS]]
    names = ("id", "context", "question", "answers", "choices", "answer") if protocol.task.open else ("id",)
    return _json([{name: item[name] for name in names if name in item} for item in shown])


def _repair(log: Path) -> set[tuple[str, str]]:
    """What an interrupted run has done; a line that was cut off is taken out of its log."""
    done, good = set(), 0
    with log.open("rb") as file:
        for line in file:
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            done.add((record.id, record.arm))
            good += len(line)
    with log.open("rb+") as file:
        file.truncate(good)
    return done


def _read_log(log: Path) -> Iterable[Record]:
    with log.open("rb") as file:
        for line in file:
            yield Record(**json.loads(line))


def _line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"  # ASCII, so that no character of an answer ends a line


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _write(file: Path, content: bytes) -> None:
    with saving(file) as target:
        target.write(content)


class _Rate(ProgressColumn):
    """Answers a second."""

    def render(self, task: BarTask) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
