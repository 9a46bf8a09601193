"""Which sharer token stands for which receiver token: each model tokenizes the real text, and tokens that cover the
same characters belong together.

Nothing is decoded and encoded again, so byte-level pieces, CJK, emoji and combining marks need no special care: the
pieces of one character all cover that character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from kvtalk.errors import AlignmentError

Indices = npt.NDArray[np.int64]

STRATEGIES = ("first", "last", "coverage")
"""first: the first sharer token that covers a character of the receiver token; last: the one that covers its last
character; coverage: the one that covers most of it, of equals the first (C2C's maximal coverage)."""

NONE = -1


@dataclass(frozen=True, eq=False)
class Tokenized:
    """A text in a model's tokens.

    Attributes:
        ids: the tokens, no special ones.
        spans: ``[tokens, 2]``, the characters that each covers, begin and end; never decreasing.
    """

    ids: list[int]
    spans: Indices


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokenized]:
    """Texts in a model's tokens, with the characters that each token covers.

    Raises:
        AlignmentError: a tokenizer that cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise AlignmentError(
            f"the tokenizer {type(tokenizer).__name__} cannot tell which characters a token covers: "
            "save it as a fast tokenizer (tokenizer.json)"
        )
    made = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [
        Tokenized(list(ids), np.array(spans, dtype=np.int64).reshape(-1, 2))
        for ids, spans in zip(made.input_ids, made.offset_mapping, strict=True)
    ]


def ranges(sharer: Indices, receiver: Indices) -> tuple[Indices, Indices]:
    """The run of sharer tokens that overlap each receiver token.

    Args:
        sharer: spans of the sharer's tokens, ``[sharer tokens, 2]``.
        receiver: of the receiver's, ``[receiver tokens, 2]``, in the same text.

    Returns:
        first sharer token and the one after the last, each ``[receiver tokens]``; equal where there is none.
    """
    first = np.searchsorted(sharer[:, 1], receiver[:, 0], side="right")
    stop = np.searchsorted(sharer[:, 0], receiver[:, 1], side="left")
    empty = receiver[:, 0] >= receiver[:, 1]
    return first, np.where(empty, first, np.maximum(first, stop))


def align(sharer: Tokenized, receiver: Tokenized, strategy: str = "coverage") -> Indices:
    """One sharer token for each receiver token.

    Args:
        sharer: the text in the sharer's tokens.
        receiver: the same text in the receiver's.
        strategy: see :data:`STRATEGIES`.

    Returns:
        indices of sharer tokens, ``[receiver tokens]``; :data:`NONE` where no token overlaps.

    Raises:
        AlignmentError: an unknown strategy.
    """
    first, stop = ranges(sharer.spans, receiver.spans)
    if strategy == "first":
        chosen = first
    elif strategy == "last":
        chosen = stop - 1
    elif strategy == "coverage":
        chosen = _most_covered(sharer.spans, receiver.spans, first, stop)
    else:
        raise AlignmentError(f"no alignment strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    return np.where(first < stop, chosen, NONE)


def _most_covered(sharer: Indices, receiver: Indices, first: Indices, stop: Indices) -> Indices:
    best, most = first.copy(), np.zeros(len(first), dtype=np.int64)
    for step in range(int((stop - first).max(initial=0))):
        index = np.minimum(first + step, np.maximum(stop - 1, 0))
        covered = np.minimum(sharer[index, 1], receiver[:, 1]) - np.maximum(sharer[index, 0], receiver[:, 0])
        better = covered > most
        best, most = np.where(better, index, best), np.where(better, covered, most)
    return best
