"""Which sharer token is fused into which receiver token, in a batch of prompts.

Both models read the same text, each in its own tokens and with its own words around it. The text's tokens are aligned
by its characters, the words after it by their place before the answer; what stands before it stays as the receiver
alone would have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtalk.adapters.fuser import FuserGeometry
from kvtalk.alignment.readings import Reading
from kvtalk.alignment.tokens import Tokenized, aligned
from kvtalk.device import sent


@dataclass(frozen=True)
class Pairs:
    """Aligned tokens of a batch of prompts, one entry each.

    Where a receiver token is given the mean of several sharer tokens, their entries follow each other.

    Attributes:
        rows: number of the prompt.
        ours: index of the receiver's token in its prompt.
        theirs: index of the sharer's token in the shared text.
    """

    rows: Tensor
    ours: Tensor
    theirs: Tensor

    def at(self, where: Tensor) -> Pairs:
        """Some of them."""
        return Pairs(self.rows[where], self.ours[where], self.theirs[where])

    def once(self) -> tuple[Pairs, Tensor]:
        """Each receiver token's first entry, and for every entry the number of its receiver token."""
        tokens = torch.stack([self.rows, self.ours])
        first = torch.ones(tokens.shape[1], dtype=torch.bool)
        first[1:] = (tokens[:, 1:] != tokens[:, :-1]).any(dim=0)
        return self.at(first), first.cumsum(0) - 1

    def to(self, device: torch.device | str) -> Pairs:
        """On another device."""
        return Pairs(*sent(torch.stack([self.rows, self.ours, self.theirs]), device))


def paired(
    sharer: Sequence[Tokenized], lengths: Sequence[int], receiver: Sequence[Reading], geometry: FuserGeometry
) -> Pairs:
    """Which sharer token stands for which receiver token, in a batch of prompts.

    Args:
        sharer: the shared texts in its tokens.
        lengths: its tokens of each prompt from the shared text's first one on.
        receiver: the prompts in its tokens.
        geometry: how to align, and whether the words after the shared text are.
    """
    rows, ours, theirs = [], [], []
    for row, (one, length, other) in enumerate(zip(sharer, lengths, receiver, strict=True)):
        there, index = map(torch.from_numpy, aligned(one, other.shared, geometry.alignment))
        both = min(length - len(one.ids), other.after) if geometry.roles else 0
        back = torch.arange(-both, 0)
        rows.append(torch.full((len(there) + both,), row))
        ours.append(torch.cat([there + other.begin, back + len(other.ids)]))
        theirs.append(torch.cat([index, back + length]))
    return Pairs(torch.cat(rows), torch.cat(ours), torch.cat(theirs))


def enriched_of(pairs: Pairs, receiver: Sequence[Reading], geometry: FuserGeometry) -> Pairs:
    """Those of aligned tokens that are enriched: all, or all but the last one of each prompt."""
    if geometry.last:
        return pairs
    return pairs.at(pairs.ours < torch.tensor([len(one.ids) - 1 for one in receiver])[pairs.rows])
