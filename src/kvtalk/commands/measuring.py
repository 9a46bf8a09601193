"""What ``eval`` and ``curve`` share: their options, and the link that they measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtalk.errors import InputError

if TYPE_CHECKING:
    import torch

    from kvtalk.link import Link

FuserOption = Annotated[
    str | None,
    typer.Option(
        "--fuser",
        help="Both models read the question, and this fuser enriches the receiver's cache by the sharer's: folder, hub "
        "id, or the name of one that comes with kvtalk, such as smollm2-135m+gemma3-270m.",
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


def comma_separated(text: str | None) -> list[str]:
    """The words of a list in one argument."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def measured(
    sharer: str, receiver: str | None, adapter: str | None, dtype: str | None, fuser: str | None, own: str | None
) -> Link:
    """The pair that the arms are measured on, joined by a fuser if there is one.

    Raises:
        InputError: no dtype of that name.
    """
    from kvtalk.fusion import FusedLink
    from kvtalk.link import Link

    if fuser is None:
        return Link(sharer, receiver or sharer, adapter=adapter, dtype=_dtype(dtype))
    return FusedLink(sharer, receiver or sharer, fuser, own, dtype=_dtype(dtype))


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise InputError(f"no dtype {name!r}; there are {', '.join(known)}")
    return known[name] if name else None
