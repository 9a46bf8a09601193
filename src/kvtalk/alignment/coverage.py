"""How much of two tokenizations was aligned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtalk.alignment.tokens import Alignment, Indices, Tokenized, ranges


@dataclass(frozen=True)
class Coverage:
    """Counts for one text or prompt.

    Attributes:
        receiver_tokens: all of them.
        aligned: those that sharer tokens stand for.
        sharer_tokens: all of them.
        used: those that stand for a receiver token.
        characters: that the receiver's tokens cover.
        covered: of these, the characters that the sharer tokens which stand for them cover too.
        one_to_one: receiver tokens that overlap one sharer token, which overlaps no other.
        one_to_many: receiver tokens that overlap several sharer tokens.
        many_to_one: receiver tokens that overlap one sharer token, which overlaps others too.
    """

    receiver_tokens: int
    aligned: int
    sharer_tokens: int
    used: int
    characters: int
    covered: int
    one_to_one: int
    one_to_many: int
    many_to_one: int

    @property
    def unused(self) -> int:
        """Sharer tokens that stand for no receiver token."""
        return self.sharer_tokens - self.used


def coverage(sharer: Tokenized, receiver: Tokenized, alignment: Alignment) -> Coverage:
    """How much an alignment covers.

    Args:
        sharer: the text or the joined prompt in the sharer's tokens.
        receiver: the same in the receiver's.
        alignment: of the two.
    """
    first, stop = ranges(sharer.spans, receiver.spans)
    back_first, back_stop = ranges(receiver.spans, sharer.spans)
    one, several = stop - first == 1, stop - first > 1
    alone = (back_stop - back_first)[first[one]] == 1
    some = alignment.count > 0
    begin, end = alignment.first[some], alignment.first[some] + alignment.count[some]
    ours, length = receiver.spans, int(receiver.spans[:, 1].max(initial=0))
    common = np.stack(
        [np.maximum(sharer.spans[begin, 0], ours[some, 0]), np.minimum(sharer.spans[end - 1, 1], ours[some, 1])], axis=1
    )
    return Coverage(
        receiver_tokens=len(receiver.ids),
        aligned=int(some.sum()),
        sharer_tokens=len(sharer.ids),
        used=int(_within(np.stack([begin, end], axis=1), len(sharer.ids)).sum()),
        characters=int(_within(ours, length).sum()),
        covered=int((_within(common, length) & _within(sharer.spans, length)).sum()),
        one_to_one=int(alone.sum()),
        one_to_many=int(several.sum()),
        many_to_one=int((~alone).sum()),
    )


def _within(spans: Indices, length: int) -> npt.NDArray[np.bool_]:
    """Which of so many places lie in any span ``[begin, end)``."""
    real = spans[spans[:, 0] < spans[:, 1]].clip(max=length)
    steps = np.bincount(real[:, 0], minlength=length + 1) - np.bincount(real[:, 1], minlength=length + 1)
    return np.cumsum(steps)[:length] > 0
