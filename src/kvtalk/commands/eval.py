"""The command ``kvtalk eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtalk.commands.console import loading, out
from kvtalk.commands.measuring import (
    ArmsOption,
    BatchOption,
    DataOption,
    DtypeOption,
    EmbedderOption,
    FuserOption,
    HubOption,
    LimitOption,
    MetricsOption,
    OutOption,
    ProtocolOption,
    RelayOption,
    RevisionOption,
    SelfFuserOption,
    TaskOption,
    TimeOption,
    comma_separated,
    measured,
)
from kvtalk.commands.options import (
    DEFAULT_MODEL,
    AdapterOption,
    ReceiverOption,
    SeedOption,
    SharerOption,
    TemperatureOption,
)


def evaluate(
    task: TaskOption = "invented",
    sharer: SharerOption = DEFAULT_MODEL,
    receiver: ReceiverOption = None,
    adapter: AdapterOption = None,
    fuser: FuserOption = None,
    self_fuser: SelfFuserOption = None,
    arms: ArmsOption = None,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="What the cache arms send, see `kvtalk ask --help`; repeat for several."),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="Or the best plan within a budget; repeat for several.")
    ] = None,
    protocol: ProtocolOption = None,
    metrics: MetricsOption = None,
    out_dir: OutOption = None,
    data: DataOption = None,
    hub: HubOption = None,
    revision: RevisionOption = None,
    limit: LimitOption = None,
    batch: BatchOption = None,
    relay_tokens: RelayOption = 256,
    embedder: EmbedderOption = None,
    dtype: DtypeOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    time_items: TimeOption = 0,
    recompute: Annotated[
        Path | None,
        typer.Option(
            help="Only redo summary, table and picture of a finished run in this folder; with --metrics, add these."
        ),
    ] = None,
) -> None:
    """Score any arms on the same questions of a task, with every answer kept.

    [bold]kvtalk eval --task squad --data FOLDER --arms receiver,text,cache,wrong,zeroed --plan int8[/]

    Arms: receiver, sharer (alone), text (the ceiling), relay (the sharer writes a text), routing, cache, and its
    controls wrong, zeroed, self. A gain is printed only where wrong and zeroed were run. With --fuser the arm fused
    stands in the place of cache, and a gain needs --self-fuser and the arm self besides.
    """
    from kvtalk.evaluation import session
    from kvtalk.evaluation.batch import Settings

    asked = session.Asked(task, data, hub, revision, limit, protocol, comma_separated(metrics), embedder)
    if recompute is not None:
        session.redo(out, recompute, asked if metrics else None)
        return
    ways = [*(plan or []), *(f"budget={size}" for size in budget or [])]
    settings = Settings(relay_tokens=relay_tokens, temperature=temperature, seed=seed)
    run = session.prepare(asked, comma_separated(arms), ways, None, settings, batch, time_items)
    with loading():
        link = measured(sharer, receiver, adapter, dtype, fuser, self_fuser)
    session.evaluate(out, link, run, out_dir)
