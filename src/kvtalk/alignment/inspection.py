"""Two tokenizations of one text, side by side, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from kvtalk.alignment.coverage import Coverage, coverage
from kvtalk.alignment.pieces import align_pieces, text_piece
from kvtalk.alignment.reencode import KEEP, kept, reencode
from kvtalk.alignment.tokens import Alignment, Indices, ranges


@dataclass(frozen=True)
class Shown:
    """A token.

    Attributes:
        token: as it stands in the vocabulary, control characters escaped.
        characters: the part of the text that it covers.
    """

    token: str
    characters: str


@dataclass(frozen=True)
class Reencoded:
    """What decoding and encoding again would have fed to the sharer.

    Attributes:
        tokens: one for each receiver token.
        equal: which of them are among the sharer's own tokens for the same characters.
        text: what they decode to together.
    """

    tokens: list[str]
    equal: npt.NDArray[np.bool_]
    text: str


@dataclass(frozen=True)
class Comparison:
    """A text in two models' tokens.

    Attributes:
        sharer: its tokens.
        receiver: its tokens.
        runs: sharer tokens that overlap each receiver token, first and the one after the last.
        alignment: those that stand for it.
        coverage: how much that is.
        reencoded: the baseline, by which piece it keeps.
    """

    sharer: list[Shown]
    receiver: list[Shown]
    runs: tuple[Indices, Indices]
    alignment: Alignment
    coverage: Coverage
    reencoded: dict[str, Reencoded]


def compare(
    sharer: PreTrainedTokenizerBase, receiver: PreTrainedTokenizerBase, text: str, strategy: str = "coverage"
) -> Comparison:
    """Tokenize a text twice and align.

    Raises:
        AlignmentError: an unknown strategy, a tokenizer without spans, or nothing that aligns.
    """
    pieces = text_piece(sharer, "text", text), text_piece(receiver, "text", text)
    theirs, ours = (piece.tokens for piece in pieces)
    alignment = align_pieces(pieces[:1], pieces[1:], strategy)
    baselines = {}
    for keep in KEEP:
        ids = reencode(sharer, receiver, ours.ids, keep)
        baselines[keep] = Reencoded(_named(sharer, ids), kept(ids, theirs, ours), str(sharer.decode(ids)))
    return Comparison(
        _shown(sharer, theirs.ids, theirs.spans, text),
        _shown(receiver, ours.ids, ours.spans, text),
        ranges(theirs.spans, ours.spans),
        alignment,
        coverage(theirs, ours, alignment),
        baselines,
    )


def as_dict(compared: Comparison, limit: int) -> dict[str, Any]:
    """The report, and the first tokens of the receiver with what stands for them."""
    return {
        "coverage": {**asdict(compared.coverage), "unused": compared.coverage.unused},
        "reencoded": {
            keep: {
                "equal": int(baseline.equal.sum()),
                "share": round(float(baseline.equal.mean()), 4),
                "text": baseline.text,
            }
            for keep, baseline in compared.reencoded.items()
        },
        "tokens": [
            {
                **asdict(shown),
                "sharer": [
                    {"index": place, **asdict(compared.sharer[place]), "used": used}
                    for place, used in _run(compared, row)
                ],
                "reencoded": {keep: baseline.tokens[row] for keep, baseline in compared.reencoded.items()},
            }
            for row, shown in enumerate(compared.receiver[:limit])
        ],
    }


def table(compared: Comparison, limit: int) -> Table:
    """The first tokens of the receiver; sharer tokens that overlap but do not stand for it are in brackets."""
    rows = min(limit, len(compared.receiver))
    shown = Table(title=f"the first {rows} of the receiver's {len(compared.receiver)} tokens")
    for heading in ("receiver", "its characters", "sharer", "their characters", "re-encoded"):
        shown.add_column(heading, overflow="fold")
    baseline = compared.reencoded[KEEP[0]]
    for row, ours in enumerate(compared.receiver[:rows]):
        run = [(compared.sharer[place], used) for place, used in _run(compared, row)]
        shown.add_row(
            escape(ours.token),
            escape(repr(ours.characters)),
            escape(" ".join(one.token if used else f"({one.token})" for one, used in run) or "-"),
            escape(" ".join(repr(one.characters) for one, _ in run)),
            escape(baseline.tokens[row]) if baseline.equal[row] else f"[red]{escape(baseline.tokens[row])} ≠[/]",
        )
    return shown


def lines(compared: Comparison) -> list[str]:
    """The report in words."""
    found = compared.coverage
    report = [
        f"aligned: {found.aligned} of {found.receiver_tokens} receiver tokens, with {found.used} of "
        f"{found.sharer_tokens} sharer tokens ({found.unused} unused); they share {found.covered} of "
        f"{found.characters} characters",
        f"receiver to sharer: {found.one_to_one} one to one, {found.one_to_many} one to many, "
        f"{found.many_to_one} many to one",
    ]
    for keep, baseline in compared.reencoded.items():
        report.append(
            f"decoded and re-encoded, {keep} piece: {baseline.equal.sum()} of {len(baseline.equal)} ids "
            f"({baseline.equal.mean():.0%}) are the sharer's own; it would read {_start(baseline.text)!r}"
        )
    return report


def _run(compared: Comparison, row: int) -> list[tuple[int, bool]]:
    """Sharer tokens that overlap a receiver token, and whether each stands for it."""
    first, count = int(compared.alignment.first[row]), int(compared.alignment.count[row])
    overlapping = range(int(compared.runs[0][row]), int(compared.runs[1][row]))
    return [(place, first <= place < first + count) for place in overlapping]


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], spans: Indices, text: str) -> list[Shown]:
    names = _named(tokenizer, ids)
    return [Shown(name, text[begin:end]) for name, (begin, end) in zip(names, spans.tolist(), strict=True)]


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Vocabulary strings; a new line or a joiner would break the table."""
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]
    return [name if name.isprintable() else repr(name)[1:-1] for name in names]


def _start(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
