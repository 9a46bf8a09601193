"""The command ``kvtalk``."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvtalk.errors import InputError, KVTalkError, ModelError
from kvtalk.training.command import app as train_app

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from kvtalk.link import Answer, Link, Receiver, Sharer
    from kvtalk.planning import Plan

DEFAULT_MODEL = "gemma3-270m"
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for every misuse of options; the module it lives in differs between versions."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="One LLM hands what it has read to another as a KV cache, under a byte budget.\n\n"
    "Start with:  kvtalk ask --context notes.txt --question 'Who built the bridge?' --budget 25%",
)
models_app = typer.Typer(no_args_is_help=True, help="The two models that come from the package index.")
app.add_typer(models_app, name="models")
app.add_typer(train_app, name="train")

out = Console()
err = Console(stderr=True)

ContextOption = Annotated[
    str, typer.Option("--context", "-c", help="File with the text to read, - for standard input.")
]
AskedContextOption = Annotated[
    str | None,
    typer.Option("--context", "-c", help="File with the text to read, - for standard input; only a fuser needs none."),
]
QuestionOption = Annotated[str, typer.Option("--question", "-q", help="What the receiver is asked.")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Bytes that may cross: 200KB, 1MiB; 4bits a value; 25% of the bf16 cache."),
]
BudgetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        help="Bytes that may cross: 200KB, 1MiB; 4bits a value; 25% of the bf16 cache. Of several sharers one for all, "
        "or one for each, in order.",
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan",
        "-p",
        help="What to send: KEYS/VALUES [before] [POLICY@KEEP] [layers=...], such as "
        "'int4:channel/int4:token before value_norm@50%'. By default the best that fits the budget.",
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of the answer at most.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 answers greedily; above 0 samples.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of sampling and of the random token policy.")]
SharerOption = Annotated[
    str, typer.Option("--sharer", "-s", help="Model that reads: bundled name, folder, .gguf file or hub id.")
]
SharersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sharer",
        "-s",
        help="Model that reads: bundled name, folder, .gguf file or hub id; by default gemma3-270m. Repeat for "
        "several, with a --fuser each.",
    ),
]
ReceiverOption = Annotated[
    str | None, typer.Option("--receiver", "-r", help="Model that answers; by default the sharer's.")
]

AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        "-a",
        help="Adapter between two different models: folder, hub id, or the name of one that comes with kvtalk, such as "
        "smollm2-135m+gemma3-270m.",
    ),
]
FuserOption = Annotated[
    str | None,
    typer.Option(
        "--fuser",
        help="Both models read the question, and this fuser enriches the receiver's cache by the sharer's: folder, hub "
        "id, or the name of one that comes with kvtalk.",
    ),
]
FusersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fuser",
        help="All models read the question, and this fuser enriches the receiver's cache by the sharer's: folder, hub "
        "id, or the name of one that comes with kvtalk. Of several sharers one for each, in order.",
    ),
]
SelfFuserOption = Annotated[
    str | None, typer.Option(help="A fuser trained with the receiver as its own sharer, for the control self.")
]
TaskOption = Annotated[str, typer.Option("--task", "-t", help="Name of the task; an unknown one lists them.")]
ArmsOption = Annotated[
    str | None,
    typer.Option(
        "--arms",
        help="Comma-separated; by default receiver,text,cache,wrong,zeroed, for multiple choice receiver,sharer.",
    ),
]
ProtocolOption = Annotated[
    str | None, typer.Option(help="letter or likelihood for multiple choice; by default the task's first.")
]
MetricsOption = Annotated[
    str | None, typer.Option(help="Comma-separated metrics of answers in words; the first one leads.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the results, by default results/TASK/MODELS; a stopped run goes on."),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", "-d", help="Local file, or folder with the task's file; by default KVTALK_DATA, then hub."),
]
HubOption = Annotated[str | None, typer.Option(help="Another hub data set of the task's form, or a folder like one.")]
RevisionOption = Annotated[str | None, typer.Option(help="Of the hub data set.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first items.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Items at a time; by default 16, on a GPU 256.")]
RelayOption = Annotated[int, typer.Option(min=1, help="Length of the text that the sharer writes in the arm relay.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default what is fast on this device.")
]
EmbedderOption = Annotated[
    str | None, typer.Option(help="sentence-transformers id or folder, for the metrics of relevance.")
]
TimeOption = Annotated[
    int, typer.Option("--time", min=0, help="Afterwards time so many items one by one, every phase, in each arm.")
]


@app.command()
def ask(
    question: QuestionOption,
    context: AskedContextOption = None,
    sharer: SharersOption = None,
    receiver: ReceiverOption = None,
    adapter: AdapterOption = None,
    fuser: FusersOption = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --fuser: only the sharer reads the context.")
    ] = False,
    budget: BudgetsOption = None,
    plan: PlanOption = None,
    max_new_tokens: TokensOption = 48,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    compare: Annotated[
        bool,
        typer.Option(help="Also ask without the context, with it as text, and with another text's cache."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about a text that only the sharer reads, and see what it cost and what it bought.

    With --fuser both models read everything, or with --private all but the context, and the sharer's cache enriches the
    receiver's.
    """
    text = None if context is None else read_text(context)
    chosen = _plan(plan, seed)
    sharers = sharer or [DEFAULT_MODEL]
    if private and (not fuser or text is None):
        raise InputError("--private is for a --context that only the sharer of a --fuser reads: give both")
    if fuser:
        _ask_fused(fuser, sharers, receiver, text, question, private, budget or [], chosen, max_new_tokens, as_json)
        return
    if len(sharers) > 1 or len(budget or []) > 1:
        raise InputError("several sharers, or a budget for each, need a --fuser for each sharer")
    if text is None:
        raise InputError("give --context: a file, a text, or - for standard input")
    with _loading():
        link = _link(sharers[0], receiver, adapter)
        link.warm_up()
    options = _sampling(temperature, seed)
    answer = link.ask(
        text,
        question,
        budget=budget[0] if budget else None,
        plan=chosen,
        max_new_tokens=max_new_tokens,
        streamer=None if as_json else _streamer(link.receiver),
        **options,
    )
    rows = {"cache": answer}
    if compare:
        for name, other in _comparisons(link, text, question, answer.plan, max_new_tokens, seed, options):
            rows[name] = other
    if as_json:
        out.print_json(json.dumps({name: _as_dict(row) for name, row in rows.items()}))
        return
    if not out.is_terminal:
        typer.echo(answer.text)
    out.print(_answers_table(rows, text))
    _print_phases(answer)


@app.command()
def share(
    context: ContextOption,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Packet file to write, such as notes.kvt.")],
    sharer: SharerOption = DEFAULT_MODEL,
    adapter: AdapterOption = None,
    budget: BudgetOption = None,
    plan: PlanOption = None,
    parts: Annotated[int, typer.Option(min=1, help="Packets by layer group, so that a receiver can start early.")] = 1,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Read a text and write its cache as a packet file; the receiver's half is `kvtalk answer`."""
    text = read_text(context)
    chosen = _plan(plan, seed)
    with _loading():
        side = _sharer(sharer, adapter)
    from kvtalk.transport import file

    with file.saving(out_file) as target:
        used, cost = side.write(target, text, budget, chosen, parts)
    report = {"file": str(out_file), "plan": str(used), **asdict(cost)}
    if as_json:
        out.print_json(json.dumps(report))
        return
    out.print(
        f"{escape(str(out_file))}: {cost.bytes:,} bytes for {cost.context_tokens} tokens, "
        f"{cost.bits_per_value:.2f} bits per value, plan: {used}"
    )
    to = f"{sharer}" if side.half is None else f"{side.half.card.receiver.name} --adapter {adapter}"
    out.print(escape(f"next: kvtalk answer --cache {out_file} --receiver {to} --question '...'"))


@app.command()
def answer(
    cache: Annotated[str, typer.Option("--cache", help="Packet file from `kvtalk share`, or its http:// address.")],
    question: QuestionOption,
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that answers.")] = DEFAULT_MODEL,
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 48,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from a packet file, without ever seeing the text."""
    blob = fetch(cache)
    with _loading():
        side = _receiver(receiver, adapter, blob)
    made = side.answer(
        blob,
        question,
        max_new_tokens=max_new_tokens,
        streamer=None if as_json else _streamer(side),
        **_sampling(temperature, seed),
    )
    if as_json:
        out.print_json(json.dumps(_as_dict(made)))
        return
    if not out.is_terminal:
        typer.echo(made.text)
    _print_phases(made)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Packet file.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a packet file holds, verified, without any model."""
    from kvtalk import inspection
    from kvtalk.packet import read_stream
    from kvtalk.transport.file import load

    packets = list(read_stream(load(file)))
    if as_json:
        out.print_json(json.dumps([inspection.as_dict(packet) for packet in packets]))
        return
    for packet in packets:
        out.print(inspection.table(packet))


@app.command("align")
def align_tokens(
    text: Annotated[str, typer.Argument(help="A file, - for standard input, or the text itself in quotes.")],
    sharer: Annotated[
        str, typer.Option("--sharer", "-s", help="Whose tokenizer reads: bundled name, folder, .gguf file or hub id.")
    ],
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Whose tokens are to be matched.")],
    strategy: Annotated[
        str,
        typer.Option(
            help="Which of the sharer tokens that share characters with a receiver token stands for it: first, last, "
            "coverage (the one that covers most of it) or mean (all of them)."
        ),
    ] = "coverage",
    limit: Annotated[int, typer.Option(min=0, help="Receiver tokens to show; the report counts all.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """See which sharer token stands for which receiver token, from the tokenizers alone.

    [bold]kvtalk align --sharer smollm2-135m --receiver gemma3-270m "unbelievable 北京 😀"[/]

    Tokens that cover the same characters belong together. Sharer tokens in parentheses overlap but are passed over;
    they are no loss with --strategy mean. The last column is what C2C's published code would feed to the sharer
    instead: each receiver token decoded and encoded again by itself, ≠ where the sharer's own tokens are others.
    """
    from kvtalk.alignment import inspection

    content = _text_or_file(text)
    with _loading():
        tokenizers = _tokenizer(sharer), _tokenizer(receiver)
    compared = inspection.compare(*tokenizers, content, strategy)
    if as_json:
        about = {"sharer": sharer, "receiver": receiver, "strategy": strategy}
        out.print_json(json.dumps({**about, **inspection.as_dict(compared, limit)}))
        return
    if limit:
        out.print(inspection.table(compared, limit))
    for line in inspection.lines(compared):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command("import-c2c")
def import_c2c(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder of github.com/thu-nics/C2C, with projector_0.pt.")],
    sharer: Annotated[str, typer.Option("--sharer", "-s", help="Model that it calls the teacher.")],
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that it calls the base.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the fuser.")],
) -> None:
    """Make a fuser of a checkpoint that C2C's published code trained; no pickled code is run."""
    from kvtalk.adapters import c2c
    from kvtalk.models import LM

    with _loading():
        reads = LM.load(sharer)
        card = c2c.import_c2c(folder, reads, reads if receiver == sharer else LM.load(receiver), out_folder)
    facts = card.facts
    out.print(
        escape(
            f"{out_folder}: {facts['layers']} layers from {facts['projectors']} projectors, {facts['open']} of "
            f"{2 * facts['layers']} gates open"
        ),
        highlight=False,
        soft_wrap=True,
    )
    next_command = f"kvtalk eval --task openbookqa --sharer {sharer} --receiver {receiver} --fuser {out_folder}"
    out.print(escape(f"next: {next_command}"), highlight=False, soft_wrap=True)


@app.command()
def join(
    encoder: Annotated[str, typer.Option(help="Adapter whose encoder to take: its sharer is the new one's.")],
    decoder: Annotated[str, typer.Option(help="Adapter whose decoder to take: its receiver is the new one's.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the joined adapter.")],
) -> None:
    """Join two translators' halves to the adapter of a pair that was never trained together; no model is loaded.

    [bold]kvtalk join --encoder A_TO_B --decoder C_TO_D --out A_TO_D[/]

    Each is a folder, a hub id, or the name of one that comes with kvtalk. Both must be of one latent space: train a
    half into a space that is there with kvtalk train translator, --encoder or --decoder.
    """
    from kvtalk.adapters import store

    card = store.join(encoder, decoder, out_folder)
    out.print(
        escape(
            f"next: kvtalk ask --context notes.txt --question '...' --sharer {card.sharer.name} "
            f"--receiver {card.receiver.name} --adapter {out_folder}"
        ),
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="Adapter: its folder, or the name of one that comes with kvtalk.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Its id on the hub, created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to, created if need be; OWNER/NAME@REVISION loads it.")
    ] = None,
) -> None:
    """Upload a translator or a fuser to the Hugging Face hub, with a page made from its card.

    [bold]hf auth login && kvtalk push DIR me/smollm2-to-gemma[/]

    Only the card, the weights and the page go there. The card names the models as they were loaded: a model from a
    folder by that folder's name.
    """
    from kvtalk.adapters import hub

    with err.status("uploading ..."):
        address = hub.push_adapter(folder, repo, private, revision)
    name = repo if revision is None else f"{repo}@{revision}"
    out.print(escape(f"{address}: load it as {name}"), highlight=False, soft_wrap=True)


@app.command("eval")
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

    if recompute is not None:
        asked = session.Asked(task, data, hub, revision, limit, protocol, _listed(metrics), embedder)
        session.redo(out, recompute, asked if metrics else None)
        return
    asked = session.Asked(task, data, hub, revision, limit, protocol, _listed(metrics), embedder)
    ways = [*(plan or []), *(f"budget={size}" for size in budget or [])]
    settings = Settings(relay_tokens=relay_tokens, temperature=temperature, seed=seed)
    run = session.prepare(asked, _listed(arms), ways, None, settings, batch, time_items)
    with _loading():
        link = _evaluated(sharer, receiver, adapter, dtype, fuser, self_fuser)
    session.evaluate(out, link, run, out_dir)


@app.command()
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
    them, a choice of 28; and every --plan and --budget besides. The sharer reads each context once for all plans. The
    controls run with the largest, the middle and the smallest plan.
    """
    from kvtalk.evaluation import curve as sweep
    from kvtalk.evaluation import session
    from kvtalk.evaluation.batch import Settings

    lines = [line.split("#")[0].strip() for line in read_text(str(plans_file)).splitlines()] if plans_file else []
    listed = [line for line in lines if line]
    if codecs or tokens or keep or layers:
        listed += sweep.grid(_listed(codecs), _listed(tokens), _listed(keep), layers or [])
    listed = listed or list(sweep.DEFAULT_PLANS)
    ways = sweep.normalized([*listed, *(plan or []), *(f"budget={size}" for size in budget or [])])
    controlled = sweep.controlled(ways, controls)
    asked = session.Asked(task, data, hub, revision, limit, protocol, _listed(metrics), embedder)
    settings = Settings(relay_tokens=relay_tokens, temperature=temperature, seed=seed)
    run = session.prepare(asked, _listed(arms), ways, controlled, settings, batch, time_items)
    with _loading():
        link = _evaluated(sharer, receiver, adapter, dtype, fuser, self_fuser)
    session.evaluate(out, link, run, out_dir)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Result folders of `kvtalk eval` and `kvtalk curve`.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "What does a KV cache carry?",
) -> None:
    """Make one self-contained page of any number of runs: tables, curves, answers side by side."""
    from kvtalk.evaluation import report as page

    page.write(folders, out_file, title)
    out.print(escape(f"{out_file}: {out_file.stat().st_size:,} bytes, open it in a browser"))


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for table and picture.")] = Path("results/demo"),
    questions: Annotated[int, typer.Option(min=2, max=80, help="How many of the 80 to ask.")] = 24,
) -> None:
    """Ask invented questions through both bundled models at several budgets; one table, one picture."""
    from kvtalk.evaluation import demo as show

    _quiet_transformers()
    show.run_demo(out, out_dir, questions)


@models_app.command("pull")
def models_pull(
    names: Annotated[list[str] | None, typer.Argument(help="Which; by default all.")] = None,
) -> None:
    """Fetch, check and convert bundled models (once)."""
    from kvtalk import bundled

    for name in names or list(bundled.MODELS):
        out.print(f"{name}: ready in {bundled.ensure(name, err)}")


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """Show the bundled models and whether they are here."""
    from kvtalk import bundled

    if as_json:
        out.print_json(json.dumps({name: bundled.is_pulled(name) for name in bundled.MODELS}))
        return
    table = Table("name", "model", "licence", "download", "here")
    for name, model in bundled.MODELS.items():
        here = str(bundled.folder_of(name)) if bundled.is_pulled(name) else f"no: kvtalk models pull {name}"
        table.add_row(name, model.title, model.licence, f"{model.megabytes} MB", here)
    out.print(table)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from kvtalk import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; a mistake of the caller is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except KVTalkError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        code = 2
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        err.print("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def read_text(path: str) -> str:
    """A text file, or standard input for ``-``.

    Raises:
        InputError: missing, unreadable, or not UTF-8.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from error


def fetch(address: str) -> memoryview:
    """A packet from a file or an http(s) address."""
    if address.startswith(("http://", "https://")):
        from kvtalk.transport import http

        return http.fetch(address)
    from kvtalk.transport import file

    return file.load(address)


def _text_or_file(given: str) -> str:
    """The text of a file if there is one of that name, else the argument itself.

    Raises:
        InputError: nothing to read, or one word that looks like the name of a file that is not there.
    """
    if given == "-" or os.path.isfile(given):
        text = read_text(given)
    elif os.path.isdir(given) or re.fullmatch(r"\S*(/\S*|\w\.[a-z][a-z0-9]{1,4})", given):
        raise InputError(f"no file {given}; if that is the text itself, give it on standard input, with - in its place")
    else:
        text = given
    if not text:
        raise InputError("the text is empty: give a file, -, or the text in quotes")
    return text


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer without the model.

    Raises:
        ModelError: there is none of that name.
    """
    from kvtalk import bundled
    from kvtalk.loading import load_tokenizer

    base = Path(name.partition("+")[0])  # a LoRA has no tokenizer of its own
    if str(base) in bundled.MODELS:
        return bundled.load_tokenizer(str(base))
    if base.suffix == ".gguf" and base.is_file():
        return load_tokenizer(base.parent, {"gguf_file": base.name})
    if not base.is_dir() and (base.suffix == ".gguf" or base.is_absolute() or len(base.parts) != 2):
        raise ModelError(
            f"no model {name!r}: give a folder, a .gguf file, a hub id, or a name from `kvtalk models list`"
        )
    return load_tokenizer(base)


def _plan(text: str | None, seed: int) -> Plan | None:
    if text is None:
        return None
    from kvtalk.planning import Plan

    return Plan.parse(text, seed)


def _link(sharer: str, receiver: str | None, adapter: str | None, dtype: str | None = None) -> Link:
    from kvtalk.link import Link

    return Link(sharer, receiver or sharer, adapter=adapter, dtype=_dtype(dtype))


def _evaluated(
    sharer: str, receiver: str | None, adapter: str | None, dtype: str | None, fuser: str | None, own: str | None
) -> Link:
    from kvtalk.fusion import FusedLink

    if fuser is None:
        return _link(sharer, receiver, adapter, dtype)
    return FusedLink(sharer, receiver or sharer, fuser, own, dtype=_dtype(dtype))


def _ask_fused(
    fusers: list[str],
    sharers: list[str],
    receiver: str | None,
    text: str | None,
    question: str,
    private: bool,
    budgets: list[str],
    plan: Plan | None,
    tokens: int,
    as_json: bool,
) -> None:
    from kvtalk.fusion import Fusion
    from kvtalk.link import Receiver

    with _loading():
        fusion = Fusion(receiver or sharers[0], sharers, fusers)
        fusion.ask("A question?", max_new_tokens=2)
    budget = budgets if len(budgets) > 1 else budgets[0] if budgets else None
    answer = fusion.ask(question, text, private=private, budget=budget, plan=plan, max_new_tokens=tokens)
    alone = Receiver(fusion.receiver.lm).answer_text(None if private else text, question, max_new_tokens=tokens)
    rows = {"fused": answer, "receiver alone": alone}
    if as_json:
        out.print_json(json.dumps({name: _as_dict(row) for name, row in rows.items()}))
        return
    if not out.is_terminal:
        typer.echo(answer.text)
    out.print(_answers_table(rows, question))
    _print_phases(answer)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise InputError(f"no dtype {name!r}; there are {', '.join(known)}")
    return known[name] if name else None


def _sharer(name: str, adapter: str | None) -> Sharer:
    from kvtalk.adapters.halves import sharer_half
    from kvtalk.link import Sharer
    from kvtalk.models import LM

    lm = LM.load(name)
    return Sharer(lm, None if adapter is None else sharer_half(adapter, lm))


def _receiver(name: str, adapter: str | None, blob: memoryview) -> Receiver:
    """The side that answers; for a latent without a named adapter, with the one that comes with kvtalk."""
    from kvtalk.adapters.halves import receiver_half
    from kvtalk.adapters.store import shipped_as
    from kvtalk.link import Receiver
    from kvtalk.models import LM
    from kvtalk.packet import read_stream

    packets = list(read_stream(blob))  # a damaged file is refused before a model is loaded
    needed = packets[0].manifest.adapter
    found = adapter or (shipped_as(needed) if needed else None)
    lm = LM.load(name)
    return Receiver(lm, None if found is None else receiver_half(found, lm))


@contextmanager
def _loading() -> Iterator[None]:
    """Loading takes a moment: a spinner shows that it goes on."""
    _quiet_transformers()
    with err.status("loading ..."):
        yield


def _quiet_transformers() -> None:
    """Its bars and warnings would stand between a question and its answer."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _streamer(side: Receiver) -> Any:
    """Prints the answer as it comes, on a terminal."""
    if not out.is_terminal:
        return None
    from transformers import TextStreamer

    return TextStreamer(side.lm.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _sampling(temperature: float, seed: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature} if temperature else {}


def _comparisons(
    link: Link, text: str, question: str, plan: Plan | None, tokens: int, seed: int, options: dict[str, Any]
) -> Iterator[tuple[str, Answer]]:
    from kvtalk.evaluation.data import unrelated_text

    kwargs = {"max_new_tokens": tokens, **options}
    _sampling(0, seed)
    yield "no context", link.receiver.answer_text(None, question, **kwargs)
    _sampling(0, seed)
    yield "context as text", link.receiver.answer_text(text, question, **kwargs)
    _sampling(0, seed)
    other = unrelated_text(text)
    yield "another text's cache", link.ask(other, question, plan=plan, **kwargs)


def _answers_table(rows: dict[str, Answer], text: str) -> Table:
    import zstandard

    packed = len(zstandard.compress(text.encode(), 19))
    table = Table("receiver gets", "answer", "bytes", "bits/value", "first token", title="same question, same run")
    for name, row in rows.items():
        cost = row.cost
        size = f"{cost.bytes:,}"
        if name == "context as text":
            size += f" ({packed:,} zstd)"
        table.add_row(
            name,
            escape(row.text) or "(nothing)",
            size,
            f"{cost.bits_per_value:.2f}" if row.plan else "",
            f"{1000 * (cost.decode + cost.place + cost.first_token):.0f} ms",
        )
    return table


def _print_phases(made: Answer) -> None:
    cost = made.cost
    bits = f", {cost.bits_per_value:.2f} bits per value" if cost.bits_per_value else ""
    each = f" ({' + '.join(f'{size:,}' for size in cost.each)})" if cost.each else ""
    out.print(f"the cache's way: {cost.bytes:,} bytes{each}{bits}")
    if made.plan is not None:
        out.print(f"plan: {_plans(made)}", highlight=False)
    table = Table("phase", "ms")
    for phase in ("prefill", "encode", "decode", "place", "first_token", "rest"):
        seconds = getattr(cost, phase)
        if seconds:
            table.add_row(phase.replace("_", " "), f"{1000 * seconds:.0f}")
    out.print(table)


def _listed(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _plans(made: Answer) -> str | None:
    """Of every sharer."""
    return None if made.plan is None else " + ".join(map(str, made.plans or (made.plan,)))


def _as_dict(made: Answer) -> dict[str, Any]:
    return {"answer": made.text, "plan": _plans(made), **asdict(made.cost)}


if __name__ == "__main__":
    main()
