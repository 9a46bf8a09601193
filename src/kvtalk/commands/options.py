"""Options that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvtalk.planning import Plan

DEFAULT_MODEL = "gemma3-270m"

QuestionOption = Annotated[str, typer.Option("--question", "-q", help="What the receiver is asked.")]
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
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        "-a",
        help="Adapter between two different models: folder, hub id, or the name of one that comes with kvtalk, such as "
        "smollm2-135m+gemma3-270m.",
    ),
]
PackingOption = Annotated[str, typer.Option("--packing", help="Codec of the saved matrices; bf16 for none.")]


def plan_of(text: str | None, seed: int) -> Plan | None:
    """What --plan and --seed ask for.

    Raises:
        BudgetError: not a plan.
        CodecError, SelectionError: an unknown codec or policy.
    """
    if text is None:
        return None
    from kvtalk.planning import Plan

    return Plan.parse(text, seed)
