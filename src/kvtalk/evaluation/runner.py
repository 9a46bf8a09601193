"""Run arms on the same items and keep every answer.

All arms of a batch share one prefill of the sharer, and all arms of one plan its packets. What is written is enough
to recompute any figure without a model; a run that is killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as BarTask
from rich.text import Text

from kvtalk.errors import InputError
from kvtalk.evaluation import folder
from kvtalk.evaluation.arms import DESTROYED, TRANSFERS, Arm
from kvtalk.evaluation.batch import Batch, Settings
from kvtalk.evaluation.data import Item, Passage, digest
from kvtalk.evaluation.metrics import METRICS
from kvtalk.evaluation.protocols import Protocol
from kvtalk.evaluation.statistics import binomial_test
from kvtalk.evaluation.summary import plan_from, read_records, summarize, write_summary
from kvtalk.evaluation.tasks import task_named
from kvtalk.fusion import FusedLink
from kvtalk.link import Link, Receiver

_MANY = 32
"""Answers of a batch that are hardly all empty unless something went wrong."""


def run(
    link: Link,
    protocol: Protocol,
    items: Sequence[Item],
    arms: Sequence[Arm],
    out: Path,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Evaluate and write ``manifest.json``, ``items.jsonl.gz``, ``summary.json`` and ``table.md`` into a folder.

    Items that are longer than a model reads are left out of every arm; the manifest names them.

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
        InputError: the folder holds another run, or an arm that the task or the pair of models cannot serve.
    """
    settings = settings or Settings.for_device(link.receiver.lm.device)
    too_long = {item.id for item in items if not _fits(link, protocol, item, settings)}
    items = [item for item in items if item.id not in too_long]
    if not items:
        raise InputError(f"every item is longer than {link.receiver.lm.name} or {link.sharer.lm.name} reads")
    check_arms(protocol, items, arms)
    fused = isinstance(link, FusedLink)
    if fused != any(arm.kind == "fused" for arm in arms):
        raise InputError("the arm fused needs a fuser, and a fuser the arm fused: give --fuser and --arms fused,...")
    if any(arm.kind in TRANSFERS for arm in arms):
        link.check()
    if isinstance(link, FusedLink) and link.own is None and any(arm.kind == "self" for arm in arms):
        raise InputError(
            "the arm self needs a fuser that was trained with the receiver as its own sharer: --self-fuser"
        )
    if not fused and link.card is not None and any(arm.kind == "self" for arm in arms):
        raise InputError("the arm self of a translator is a run of its own: the receiver as its own sharer, adapter")
    manifest = folder.describe(link, protocol, items, sorted(too_long), arms, settings)
    with folder.claimed(out, manifest):
        folder.write_sample(out, protocol, items)
        done = folder.open_log(out)
        asked = [arm for arm in arms if arm.kind != "routing"]
        with (out / folder.LOG).open("ab") as file, _bar() as bar:
            task = bar.add_task("items x arms", total=len(items) * len(asked), completed=len(done))
            for batch in _batches(link, protocol, items, settings):
                for arm in asked:
                    if all((item.id, arm.name) in done for item in batch.items):
                        continue
                    fresh = [record for record in batch.run(arm) if (record.id, arm.name) not in done]
                    file.writelines(map(folder.line, fresh))
                    file.flush()
                    bar.advance(task, len(fresh))
                    if len(fresh) >= _MANY and not any(record.answer for record in fresh):
                        bar.console.print(f"[yellow]{arm.name}: all {len(fresh)} answers of a batch are empty[/]")
        folder.finish(out, routing=len(asked) < len(arms))
        return recompute(out)


def recompute(out: Path) -> dict[str, Any]:
    """The summary of a finished run from its manifest and records, without a model.

    Raises:
        InputError: there is no finished run in the folder.
    """
    manifest = folder.read_manifest(out)
    arms = [Arm(**{**arm, "plan": plan_from(arm["plan"])}) for arm in manifest["arms"]]
    contexts = task_named(manifest["task"]["name"]).has_context
    summary = summarize(read_records(out), arms, manifest["metrics"], manifest["items"]["count"], contexts)
    summary = {"task": manifest["task"], **summary}
    write_summary(out, summary)
    return summary


def rescore(
    out: Path, protocol: Protocol, items: Sequence[Item], names: Sequence[str], embedder: str
) -> dict[str, Any]:
    """Add metrics of the answers' words to a finished run, from its answers and the items, without a model.

    Raises:
        InputError: other items than the run's, or a run that is not finished.
    """
    manifest = folder.read_manifest(out)
    if (out / folder.LOG).exists():
        raise InputError(f"{out}: the run is not finished: give the command of its manifest.json again")
    left_out = set(manifest["items"].get("left_out", ()))
    items = [item for item in items if item.id not in left_out]
    if digest(items) != manifest["items"]["xxh3"]:
        raise InputError(f"{out} was run on other items: give the same --task, --data and --limit")
    by_id = {item.id: item for item in items}
    records = list(read_records(out))
    passages = [item for record in records if isinstance(item := by_id[record.id], Passage)]
    answers = [record.answer for record in records]
    for name in names:
        for record, score in zip(records, METRICS[name].score(answers, passages, embedder), strict=True):
            record.scores[name] = round(score, 4)
    manifest["metrics"] = list(dict.fromkeys([*manifest["metrics"], *names]))
    manifest["embedder"] = Path(embedder).name if Path(embedder).is_dir() else embedder
    folder.write_records(out, map(folder.line, records))
    folder.write_json(out / "manifest.json", manifest)
    return recompute(out)


def check_arms(protocol: Protocol, items: Sequence[Item], arms: Sequence[Arm]) -> None:
    """Refuse arms that these items cannot serve.

    Raises:
        InputError: an arm twice, one that needs a context, a wrong cache where there is only one context, or controls
            without scipy, which their test needs.
    """
    task = protocol.task
    contexts = {item.context if isinstance(item, Passage) else item.question for item in items}
    if len(contexts) == 1 and any(arm.kind == "wrong" for arm in arms):
        raise InputError("the wrong-cache control needs at least two different contexts: take more items")
    if any(arm.kind in DESTROYED for arm in arms):
        binomial_test()
    if len({arm.name for arm in arms}) != len(arms):
        raise InputError("an arm is listed twice")
    fused = any(arm.kind == "fused" for arm in arms)
    for arm in arms:
        alone = arm.kind in ("receiver", "sharer", "relay", "routing")
        if not task.has_context and not alone and not (fused and arm.kind in TRANSFERS):
            raise InputError(
                f"{task.name} has no context that the sharer could read for the receiver, so there is no arm "
                f"{arm.kind!r}; use receiver, sharer, relay, routing, or with a fuser fused, wrong, zeroed, self"
            )


def _fits(link: Link, protocol: Protocol, item: Item, settings: Settings) -> bool:
    """Whether both models can read the item as text and write after it."""
    context = item.context if isinstance(item, Passage) else None
    for lm in (link.receiver.lm,) if link.sharer.lm is link.receiver.lm else (link.receiver.lm, link.sharer.lm):
        head = len(lm.head_ids()) if protocol.head else 0
        prompt = len(protocol.prompt(Receiver(lm), item, context))
        if head + prompt + max(protocol.room, settings.relay_tokens) > lm.spec.max_positions:
            return False
    return True


def _batches(link: Link, protocol: Protocol, items: Sequence[Item], settings: Settings) -> Iterator[Batch]:
    """Items of similar length together, those of one context next to each other."""
    ordered = sorted(items, key=_length)
    contexts = list(dict.fromkeys(item.context for item in ordered if isinstance(item, Passage)))
    following = dict(zip(contexts, contexts[1:] + contexts[-2:-1], strict=False))
    asked = list({item.question: item for item in ordered}.values())
    after = dict(zip((item.question for item in asked), asked[1:] + asked[-2:-1], strict=False))
    others = {item.id: after[item.question] for item in ordered if item.question in after}
    for start in range(0, len(ordered), settings.batch):
        yield Batch(link, protocol, ordered[start : start + settings.batch], following, settings, others)


def _length(item: Item) -> tuple[int, str, int]:
    if isinstance(item, Passage):
        return len(item.context), item.context, len(item.question)
    return len(item.question), "", sum(map(len, getattr(item, "choices", ())))


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
