"""The command ``kvtalk ask``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtalk.commands.answers import print_compared, sampling, streamer
from kvtalk.commands.console import loading
from kvtalk.commands.options import (
    DEFAULT_MODEL,
    AdapterOption,
    JsonOption,
    PlanOption,
    QuestionOption,
    ReceiverOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
    plan_of,
)
from kvtalk.commands.reading import read_text
from kvtalk.errors import InputError

if TYPE_CHECKING:
    from kvtalk.fusion import Fusion
    from kvtalk.link import Answer, Link
    from kvtalk.planning import Plan


def ask(
    question: QuestionOption,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", "-c", help="File with the text to read, - for standard input; only a fuser needs none."
        ),
    ] = None,
    sharer: Annotated[
        list[str] | None,
        typer.Option(
            "--sharer",
            "-s",
            help="Model that reads: bundled name, folder, .gguf file or hub id; by default gemma3-270m, with a --fuser "
            "the one that it was trained with. Repeat for several, with a --fuser each.",
        ),
    ] = None,
    receiver: ReceiverOption = None,
    adapter: AdapterOption = None,
    fuser: Annotated[
        list[str] | None,
        typer.Option(
            "--fuser",
            help="All models read the question, and this fuser enriches the receiver's cache by the sharer's: folder, "
            "hub id, or the name of one that comes with kvtalk, such as smollm2-135m+gemma3-270m. Of several sharers "
            "one for each, in order.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --fuser: only the sharer reads the context.")
    ] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            help="Bytes that may cross: 200KB, 1MiB; 4bits a value; 25% of the bf16 cache. Of several sharers one for "
            "all, or one for each, in order.",
        ),
    ] = None,
    plan: PlanOption = None,
    max_new_tokens: TokensOption = 48,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    compare: Annotated[
        bool,
        typer.Option(
            help="Also ask without the context, with it as text, and with another text's cache; with --fuser where the "
            "context is --private."
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about a text that only the sharer reads, and see what it cost and what it bought.

    With --fuser both models read everything, or with --private all but the context, and the sharer's cache enriches the
    receiver's.
    """
    text = None if context is None else read_text(context)
    chosen = plan_of(plan, seed)
    if private and (not fuser or text is None):
        raise InputError("--private is for a --context that only the sharer of a --fuser reads: give both")
    if fuser and adapter:
        raise InputError("--adapter is for a cache before the question, --fuser for one that enriches it: give one")
    options = sampling(temperature, seed)
    if fuser:
        from kvtalk.fusion import Fusion

        with loading():
            fusion = Fusion(receiver, sharer or [], fuser)
            fusion.ask("A question?", max_new_tokens=2)
        options["max_new_tokens"] = max_new_tokens
        rows = _fused(fusion, text, question, private, budget or [], chosen, compare, seed, options)
        print_compared(rows, text or question, as_json)
        return
    sharers = sharer or [DEFAULT_MODEL]
    if len(sharers) > 1 or len(budget or []) > 1:
        raise InputError("several sharers, or a budget for each, need a --fuser for each sharer")
    if text is None:
        raise InputError("give --context: a file, a text, or - for standard input")
    with loading():
        from kvtalk.link import Link

        link = Link(sharers[0], receiver or sharers[0], adapter=adapter)
        link.warm_up()
    sampling(0, seed)
    answer = link.ask(
        text,
        question,
        budget=budget[0] if budget else None,
        plan=chosen,
        max_new_tokens=max_new_tokens,
        streamer=None if as_json else streamer(link.receiver),
        **options,
    )
    rows = {"cache": answer}
    if compare:
        for name, other in _comparisons(link, text, question, answer.plan, max_new_tokens, seed, options):
            rows[name] = other
    print_compared(rows, text, as_json)


def _fused(
    fusion: Fusion,
    text: str | None,
    question: str,
    private: bool,
    budgets: list[str],
    plan: Plan | None,
    compare: bool,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Answer]:
    from kvtalk.evaluation.data import unrelated_text
    from kvtalk.link import Receiver

    alone = Receiver(fusion.receiver.lm)
    sent: dict[str, Any] = {"budget": budgets if len(budgets) > 1 else budgets[0] if budgets else None, "plan": plan}
    sampling(0, seed)
    made = fusion.ask(question, text, private=private, **sent, **options)
    rows = {"fused": made}
    if not made.plans:  # of one sharer: what another text is sent by, too
        sent = {"plan": made.plan}
    sampling(0, seed)
    rows["receiver alone"] = alone.answer_text(None if private else text, question, **options)
    if compare and private and text is not None:
        sampling(0, seed)
        rows["context as text"] = alone.answer_text(text, question, **options)
        sampling(0, seed)
        rows["another text's cache"] = fusion.ask(question, unrelated_text(text), private=True, **sent, **options)
    return rows


def _comparisons(
    link: Link, text: str, question: str, plan: Plan | None, tokens: int, seed: int, options: dict[str, Any]
) -> Iterator[tuple[str, Answer]]:
    from kvtalk.evaluation.data import unrelated_text

    kwargs = {"max_new_tokens": tokens, **options}
    sampling(0, seed)
    yield "no context", link.receiver.answer_text(None, question, **kwargs)
    sampling(0, seed)
    yield "context as text", link.receiver.answer_text(text, question, **kwargs)
    sampling(0, seed)
    other = unrelated_text(text)
    yield "another text's cache", link.ask(other, question, plan=plan, **kwargs)
