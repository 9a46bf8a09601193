"""The command ``kvtalk curve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from kvtalk.commands.reading import read_text

if TYPE_CHECKING:
    from kvtalk.link import Link


def curve(
    task: TaskOption = "invented",
    sharer: SharerOption = DEFAULT_MODEL,
    receiver: ReceiverOption = None,
    adapter: AdapterOption = None,
    fuser: FuserOption = None,
    self_fuser: SelfFuserOption = None,
    arms: ArmsOption = None,
    codecs: Annotated[
        str | None, typer.Option(help="Codecs to combine with the next three, such as 'bf16,int4:channel/int4:token'.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Token policies, such as 'value_norm,front'.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Shares or numbers of tokens to keep, such as '100%,50%,128'.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Layer policy, such as last:50% or 0,4-9; repeat for several.")
    ] = None,
    plan: Annotated[list[str] | None, typer.Option("--plan", "-p", help="A further plan; repeat for several.")] = None,
    plans_file: Annotated[Path | None, typer.Option(help="Plans to try, one a line; # starts a comment.")] = None,
    budget: Annotated[list[str] | None, typer.Option("--budget", "-b", help="A budget; repeat for several.")] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option(help="A plan whose controls are run; by default the largest, the middle one and the smallest."),
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
) -> None:
    """Sweep plans over one task: score against bytes, the Pareto front, and the floor of the controls.

    Every combination of --codecs, --tokens, --keep and --layers is tried, and every line of --plans-file; with none of
    them, a choice for what crosses: a cache, a translator's latents, or a cache that is fused; and every --plan and
    --budget besides. The sharer reads each context once for all plans. The controls run with the largest, the middle
    and the smallest plan.
    """
    from kvtalk.evaluation import curve as sweep
    from kvtalk.evaluation import session
    from kvtalk.evaluation.batch import Settings

    lines = [line.split("#")[0].strip() for line in read_text(str(plans_file)).splitlines()] if plans_file else []
    listed = [line for line in lines if line]
    if codecs or tokens or keep or layers:
        listed += sweep.grid(comma_separated(codecs), comma_separated(tokens), comma_separated(keep), layers or [])
    asked = session.Asked(task, data, hub, revision, limit, protocol, comma_separated(metrics), embedder)
    settings = Settings(relay_tokens=relay_tokens, temperature=temperature, seed=seed)
    kinds, further = comma_separated(arms), [*(plan or []), *(f"budget={size}" for size in budget or [])]

    def load() -> Link:
        with loading():
            return measured(sharer, receiver, adapter, dtype, fuser, self_fuser)

    if listed:
        ways = sweep.normalized([*listed, *further])
        run = session.prepare(asked, kinds, ways, sweep.controlled(ways, controls), settings, batch, time_items)
        link = load()
    else:  # what is tried hangs on what crosses; all else is checked before models are loaded
        sweep.normalized(controls or [])
        run = session.prepare(asked, kinds, sweep.normalized(further), None, settings, batch, time_items)
        link = load()
        ways = sweep.normalized([*sweep.default_plans(link.card), *further])
        run = session.armed(run, kinds, ways, sweep.controlled(ways, controls))
    session.evaluate(out, link, run, out_dir)
