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

STRATEGIES = ("first", "last", "coverage", "mean")
"""first: the first sharer token that covers a character of the receiver token; last: the one that covers its last
character; coverage: the one that covers most of it, of equals the first, or where both have several pieces of the same
characters the second for the second and so on (C2C's maximal coverage); mean: all that cover any of it, to be averaged
(pooling.py)."""

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


@dataclass(frozen=True, eq=False)
class Alignment:
    """The run of sharer tokens that stands for each receiver token.

    Attributes:
        first: sharer token at which the run begins, ``[receiver tokens]``; 0 where there is none.
        count: sharer tokens in it, ``[receiver tokens]``: 0 where none overlaps; above 1 only with the strategy mean.
    """

    first: Indices
    count: Indices

    def index(self) -> Indices:
        """The one sharer token of each receiver token, ``[receiver tokens]``; :data:`NONE` where there is none.

        Raises:
            AlignmentError: runs of several tokens.
        """
        if self.count.max(initial=0) > 1:
            raise AlignmentError("runs of several tokens have no single index: average them with Pooling")
        return np.where(self.count > 0, self.first, NONE)


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

    Tokens of no characters (special ones, or white space under a tokenizer that trims its spans) overlap nothing; a
    run neither begins nor ends with one.

    Args:
        sharer: spans of the sharer's tokens, ``[sharer tokens, 2]``.
        receiver: of the receiver's, ``[receiver tokens, 2]``, in the same text.

    Returns:
        first sharer token and the one after the last, each ``[receiver tokens]``; equal where there is none.
    """
    real = np.flatnonzero(sharer[:, 0] < sharer[:, 1])
    first = np.searchsorted(sharer[real, 1], receiver[:, 0], side="right")
    stop = np.searchsorted(sharer[real, 0], receiver[:, 1], side="left")
    some = (first < stop) & (receiver[:, 0] < receiver[:, 1])
    places = np.append(real, len(sharer))
    begin = places[first]
    return begin, np.where(some, places[stop - 1] + 1, begin)


def runs(sharer: Tokenized, receiver: Tokenized, strategy: str = "coverage") -> Alignment:
    """The sharer tokens that stand for each receiver token.

    Args:
        sharer: the text in the sharer's tokens.
        receiver: the same text in the receiver's.
        strategy: see :data:`STRATEGIES`.

    Raises:
        AlignmentError: an unknown strategy.
    """
    first, stop = ranges(sharer.spans, receiver.spans)
    some = first < stop
    if strategy == "first":
        chosen = first
    elif strategy == "last":
        chosen = stop - 1
    elif strategy == "coverage":
        chosen = _most_covered(sharer.spans, receiver.spans, first, stop)
    elif strategy == "mean":
        return Alignment(np.where(some, first, 0), stop - first)
    else:
        raise AlignmentError(f"no alignment strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    return Alignment(np.where(some, chosen, 0), some.astype(np.int64))


def align(sharer: Tokenized, receiver: Tokenized, strategy: str = "coverage") -> Indices:
    """One sharer token for each receiver token: :func:`runs` for what takes an index.

    Args:
        sharer: the text in the sharer's tokens.
        receiver: the same text in the receiver's.
        strategy: first, last or coverage, see :data:`STRATEGIES`.

    Returns:
        indices of sharer tokens, ``[receiver tokens]``; :data:`NONE` where no token overlaps.

    Raises:
        AlignmentError: an unknown strategy, or mean.
    """
    if strategy == "mean":
        raise AlignmentError("mean takes several sharer tokens for one: use first, last, coverage")
    return runs(sharer, receiver, strategy).index()


def aligned(sharer: Tokenized, receiver: Tokenized, strategy: str = "coverage") -> tuple[Indices, Indices]:
    """:func:`runs` as pairs: one for each receiver token and each sharer token that stands for it.

    Args:
        sharer: the text in the sharer's tokens.
        receiver: the same text in the receiver's.
        strategy: see :data:`STRATEGIES`.

    Returns:
        the pairs' receiver tokens, never decreasing, and sharer tokens, each ``[pairs]``.

    Raises:
        AlignmentError: an unknown strategy.
    """
    found = runs(sharer, receiver, strategy)
    before = np.cumsum(found.count) - found.count
    theirs = np.arange(found.count.sum()) + np.repeat(found.first - before, found.count)
    return np.repeat(np.arange(len(found.count)), found.count), theirs


def spread(own: Sequence[int], other: Sequence[int]) -> Indices:
    """Which token of another text may stand in for each token of this one, where any other text will do.

    What both begin and end with stands for itself (a template's words, say); what is between is spread evenly.

    Args:
        own: tokens of this text.
        other: of the other one, in the same vocabulary; at least one.

    Returns:
        indices into ``other``, ``[own tokens]``, never decreasing.
    """
    least = min(len(own), len(other))
    begin = next((at for at in range(least) if own[at] != other[at]), least)
    end = next((at for at in range(least - begin) if own[-1 - at] != other[-1 - at]), least - begin)
    ours, theirs = len(own) - begin - end, len(other) - begin - end
    between = begin + np.arange(ours) * theirs // max(ours, 1)
    last = np.arange(len(other) - end, len(other))
    places: Indices = np.concatenate([np.arange(begin), between, last]).astype(np.int64)
    return np.minimum(places, len(other) - 1)


def _most_covered(sharer: Indices, receiver: Indices, first: Indices, stop: Indices) -> Indices:
    """All overlapping pairs in one list, and of each receiver token's the first that is the largest."""
    count = stop - first
    start = np.cumsum(count) - count
    owner = np.repeat(np.arange(len(count)), count)
    token = np.arange(len(owner)) - np.repeat(start - first, count)
    covered = np.minimum(sharer[token, 1], receiver[owner, 1]) - np.maximum(sharer[token, 0], receiver[owner, 0])
    some = count > 0
    most = np.zeros_like(count)
    if some.any():
        most[some] = np.maximum.reduceat(covered, start[some])
    largest = np.flatnonzero(covered == most[owner])
    chosen = first.copy()
    chosen[some] = token[largest[np.searchsorted(owner[largest], np.flatnonzero(some))]]
    if not some.any():
        return chosen
    there = np.minimum(chosen, len(sharer) - 1)
    same = some & (sharer[there] == receiver).all(axis=1)  # pieces of one character: the second for the second
    last = _ranks(sharer[::-1])[::-1]
    moved = np.where(same, there + np.minimum(_ranks(receiver), last[there]), np.where(some, chosen, 0))
    return np.maximum.accumulate(moved)  # a token over two characters does not go back behind the first one's pieces


def _ranks(spans: Indices) -> Indices:
    """Of each token how many before it, without a break, have its span."""
    numbers = np.arange(len(spans))
    new = np.append(True, (spans[1:] != spans[:-1]).any(axis=1))
    return numbers - np.maximum.accumulate(np.where(new, numbers, 0))
