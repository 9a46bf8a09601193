"""The command ``kvtalk``."""

from __future__ import annotations

import json
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

from kvtalk.errors import InputError, KVTalkError

if TYPE_CHECKING:
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

out = Console()
err = Console(stderr=True)

ContextOption = Annotated[
    str, typer.Option("--context", "-c", help="File with the text to read, - for standard input.")
]
QuestionOption = Annotated[str, typer.Option("--question", "-q", help="What the receiver is asked.")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Bytes that may cross: 200KB, 1MiB; 4bits a value; 25% of the bf16 cache."),
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
ReceiverOption = Annotated[
    str | None, typer.Option("--receiver", "-r", help="Model that answers; by default the sharer's.")
]


@app.command()
def ask(
    context: ContextOption,
    question: QuestionOption,
    sharer: SharerOption = DEFAULT_MODEL,
    receiver: ReceiverOption = None,
    budget: BudgetOption = None,
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
    """Ask a question about a text that only the sharer reads, and see what it cost and what it bought."""
    text = read_text(context)
    chosen = _plan(plan, seed)
    with _loading():
        link = _link(sharer, receiver)
        link.warm_up()
    options = _sampling(temperature, seed)
    answer = link.ask(
        text,
        question,
        budget=budget,
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
        side = _sharer(sharer)
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
    out.print(escape(f"next: kvtalk answer --cache {out_file} --receiver {sharer} --question '...'"))


@app.command()
def answer(
    cache: Annotated[str, typer.Option("--cache", help="Packet file from `kvtalk share`, or its http:// address.")],
    question: QuestionOption,
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Model that answers.")] = DEFAULT_MODEL,
    max_new_tokens: TokensOption = 48,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from a packet file, without ever seeing the text."""
    blob = fetch(cache)
    from kvtalk.link import Receiver
    from kvtalk.models import LM
    from kvtalk.packet import read_stream

    list(read_stream(blob))  # a damaged file is refused before a model is loaded
    with _loading():
        side = Receiver(LM.load(receiver))
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


@app.command("eval")
def evaluate(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; a stopped run goes on there.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="JSON lines: id, context, question, answers; by default our own passages."),
    ] = None,
    sharer: SharerOption = DEFAULT_MODEL,
    receiver: ReceiverOption = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", help="none, text, wrong, zeroed, budget=SIZE, or a plan; repeat for several."),
    ] = None,
    arms_file: Annotated[
        Path | None, typer.Option("--arms-file", help="The same, one a line; # starts a comment.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items at a time.")] = 16,
    max_new_tokens: TokensOption = 24,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Only redo table and picture of a finished run.")
    ] = False,
) -> None:
    """Score any number of plans and their controls on the same questions; writes every answer, a table, a picture."""
    from kvtalk.evaluation import runner
    from kvtalk.evaluation.arms import parse_arms
    from kvtalk.evaluation.items import load_items, samples
    from kvtalk.evaluation.picture import draw

    if recompute:
        summary = runner.recompute(out_dir)
    else:
        items = samples()[:limit] if data is None else load_items(data, limit)
        lines = list(arm or []) + (read_text(str(arms_file)).splitlines() if arms_file else [])
        arms = parse_arms(lines)
        with _loading():
            link = _link(sharer, receiver)
        summary = runner.run(link, items, arms, out_dir, batch=batch, max_new_tokens=max_new_tokens)
    draw({out_dir.name: summary["arms"]}, out_dir / "picture.png", str(out_dir), "f1", "F1")
    out.print(_arms_table(summary))
    out.print(escape(f"every answer: {out_dir}/items.jsonl.gz, picture: {out_dir}/picture.png"))


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


def _plan(text: str | None, seed: int) -> Plan | None:
    if text is None:
        return None
    from kvtalk.planning import Plan

    return Plan.parse(text, seed)


def _link(sharer: str, receiver: str | None) -> Link:
    from kvtalk.link import Link

    return Link(sharer, receiver or sharer)


def _sharer(name: str) -> Sharer:
    from kvtalk.link import Sharer
    from kvtalk.models import LM

    return Sharer(LM.load(name))


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
    from kvtalk.evaluation.items import unrelated_text

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
    out.print(f"the cache's way: {cost.bytes:,} bytes, {cost.bits_per_value:.2f} bits per value")
    if made.plan is not None:
        out.print(f"plan: {made.plan}", highlight=False)
    table = Table("phase", "ms")
    for phase in ("prefill", "encode", "decode", "place", "first_token", "rest"):
        seconds = getattr(cost, phase)
        if seconds:
            table.add_row(phase.replace("_", " "), f"{1000 * seconds:.0f}")
    out.print(table)


def _arms_table(summary: dict[str, Any]) -> Table:
    from kvtalk.evaluation.runner import COLUMNS, cells

    table = Table(*COLUMNS)
    table.columns[0].overflow = "fold"
    for row in summary["arms"]:
        table.add_row(*map(escape, cells(row)))
    return table


def _as_dict(made: Answer) -> dict[str, Any]:
    plan = None if made.plan is None else str(made.plan)
    return {"answer": made.text, "plan": plan, **asdict(made.cost)}


if __name__ == "__main__":
    main()
