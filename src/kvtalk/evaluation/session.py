"""One evaluation from the command line: what is asked, run, timed, printed and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtalk.errors import InputError
from kvtalk.evaluation import runner, summary
from kvtalk.evaluation.arms import Arm, make_arms
from kvtalk.evaluation.batch import Settings
from kvtalk.evaluation.curve import normalized, pareto
from kvtalk.evaluation.data import Item
from kvtalk.evaluation.folder import read_manifest
from kvtalk.evaluation.metrics import DEFAULT_EMBEDDER, check_metrics
from kvtalk.evaluation.picture import draw
from kvtalk.evaluation.protocols import Protocol, protocol_for
from kvtalk.evaluation.tasks import task_named
from kvtalk.evaluation.timing import time_arms
from kvtalk.link import Link

DEFAULT_ARMS = {True: ("receiver", "text", "cache", "wrong", "zeroed"), False: ("receiver", "sharer")}
"""For tasks with and without a context."""


@dataclass(frozen=True)
class Asked:
    """What a run is about.

    Attributes:
        task: name.
        data: file or folder.
        hub: another hub data set.
        revision: of the hub data set.
        limit: only the first items.
        protocol: name, or None for the task's first.
        metrics: names; empty for the task's own.
        embedder: for the metrics of relevance.
    """

    task: str
    data: Path | None = None
    hub: str | None = None
    revision: str | None = None
    limit: int | None = None
    protocol: str | None = None
    metrics: Sequence[str] = ()
    embedder: str | None = None

    def protocol_used(self) -> Protocol:
        """How the questions are asked; everything that can be wrong with it is found here."""
        task = task_named(self.task)
        if task.has_context:
            check_metrics(self.metrics or task.metrics)
        return protocol_for(task, self.protocol, self.metrics, self.embedder or DEFAULT_EMBEDDER)

    def items(self) -> list[Item]:
        """The questions."""
        task = task_named(self.task)
        return task.load(self.data, limit=self.limit, hub_id=self.hub, revision=self.revision)


@dataclass(frozen=True)
class Run:
    """What is to be run, checked before any model is loaded.

    Attributes:
        protocol: how the questions are asked.
        items: the questions.
        arms: the ways to answer.
        settings: how it is carried out, but for the batch.
        batch: items at a time, or None for what suits the device.
        time_items: how many items to time one by one.
    """

    protocol: Protocol
    items: Sequence[Item]
    arms: Sequence[Arm]
    settings: Settings
    batch: int | None
    time_items: int


def prepare(
    asked: Asked,
    kinds: Sequence[str],
    ways: Sequence[str],
    controlled: Sequence[str] | None,
    settings: Settings,
    batch: int | None,
    time_items: int,
) -> Run:
    """Check everything that can be checked without a model.

    Raises:
        KVTalkError: an unknown task, arm, metric, protocol or plan, or unusable data.
    """
    protocol = asked.protocol_used()
    arms = _arms(protocol, kinds, ways, controlled, settings)
    if time_items and not protocol.answer_tokens:
        raise InputError(f"the protocol {protocol.name} writes nothing that could be timed: leave --time out")
    items = asked.items()
    runner.check_arms(protocol, items, arms)
    return Run(protocol, items, arms, settings, batch, time_items)


def armed(run: Run, kinds: Sequence[str], ways: Sequence[str], controlled: Sequence[str] | None) -> Run:
    """A run with other arms.

    Raises:
        KVTalkError: an unknown arm or plan, or arms that do not suit the protocol or the items.
    """
    arms = _arms(run.protocol, kinds, ways, controlled, run.settings)
    runner.check_arms(run.protocol, run.items, arms)
    return replace(run, arms=arms)


def _arms(
    protocol: Protocol, kinds: Sequence[str], ways: Sequence[str], controlled: Sequence[str] | None, settings: Settings
) -> list[Arm]:
    return make_arms(kinds or DEFAULT_ARMS[protocol.task.has_context], normalized(ways), controlled, settings.seed)


def evaluate(console: Console, link: Link, run: Run, out: Path | None) -> None:
    """Run, time, print, draw."""
    names = list(dict.fromkeys((link.sharer.lm.name, link.receiver.lm.name)))
    folder = "+".join(Path(name).name for name in names)
    default = Path("results") / run.protocol.task.name / folder
    for arm in run.arms:
        if arm.plan is not None:
            link.usable(arm.plan)
    out = out or (default if len(run.protocol.task.protocols) == 1 else default / run.protocol.name)
    settings = replace(run.settings, batch=run.batch or Settings.for_device(link.receiver.lm.device).batch)
    runner.run(link, run.protocol, run.items, run.arms, out, settings)
    if run.time_items:
        time_arms(link, run.protocol, run.items[: run.time_items], run.arms, settings, out)
    _show(console, out, runner.recompute(out))


def redo(console: Console, out: Path, asked: Asked | None) -> None:
    """Summary, table and picture of a finished run again; with ``asked``, its metrics are added.

    Raises:
        InputError: no finished run, or other items than its own.
    """
    if asked is not None:
        task = read_manifest(out)["task"]["name"]
        asked = replace(asked, task=task)
        check_metrics(asked.metrics)
        if "nll" in asked.metrics:
            raise InputError("nll needs the model: run the task again")
        runner.rescore(out, asked.protocol_used(), asked.items(), asked.metrics, asked.embedder or DEFAULT_EMBEDDER)
    _show(console, out, runner.recompute(out))


def _show(console: Console, out: Path, result: dict[str, Any]) -> None:
    head, rows = summary.table(result)
    table = Table(*head, title=result["task"]["title"])
    table.columns[0].overflow = "fold"
    for cells in rows:
        table.add_row(*map(escape, cells))
    console.print(table)
    metric = result["metrics"][0]
    front = pareto(result["arms"], metric)
    if len(front) > 2:
        console.print(f"Pareto front, {summary.label(metric)}:")
        for row in front:
            console.print(f"  {row['bytes']:>11,} bytes  {row[metric][0]:5.1f}  {row['plan']}", highlight=False)
    if front:
        title = f"{result['task']['title']}: score against bytes"
        draw({out.name: result["arms"]}, out / "picture.png", title, metric, summary.label(metric))
    console.print(escape(f"every answer: {out}/items.jsonl.gz; a page: kvtalk report {out} -o report.html"))
