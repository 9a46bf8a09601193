"""Gather the sharer's values for the receiver's tokens, and average where several stand for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvtalk.alignment.tokens import Alignment
from kvtalk.device import sent
from kvtalk.errors import AlignmentError


@dataclass(frozen=True, eq=False)
class Pooling:
    """The alignments of a batch.

    Attributes:
        first: ``[batch, receiver tokens]``, int64, right-padded.
        count: ``[batch, receiver tokens]``, int64; 0 for what is not aligned and for padding.
        longest: tokens of the longest run.
        reach: sharer tokens that there must be at least.
    """

    first: Tensor
    count: Tensor
    longest: int
    reach: int

    @classmethod
    def of(cls, alignments: Sequence[Alignment]) -> Pooling:
        """One alignment a row."""
        first, count = (
            pad_sequence([torch.from_numpy(getattr(one, name)) for one in alignments], batch_first=True)
            for name in ("first", "count")
        )
        return cls(
            first,
            count,
            max((int(one.count.max(initial=0)) for one in alignments), default=0),
            int(_reach(first, count)),
        )

    def to(self, device: torch.device | str) -> Pooling:
        """On another device."""
        return Pooling(sent(self.first, device), sent(self.count, device), self.longest, self.reach)

    @property
    def aligned(self) -> Tensor:
        """Which receiver tokens have sharer tokens, ``[batch, receiver tokens]``, bool."""
        return self.count > 0

    def pooled(self, values: Tensor) -> Tensor:
        """The mean over each receiver token's run of sharer tokens.

        Args:
            values: ``[batch, kv_heads, sharer tokens, head_dim]``.

        Returns:
            ``[batch, kv_heads, receiver tokens, head_dim]`` of the same type, averaged in float32 or better; zeros
            where nothing is aligned.

        Raises:
            AlignmentError: fewer sharer tokens than the runs reach, or another batch.
        """
        if values.shape[0] != self.first.shape[0] or values.shape[2] < self.reach:
            raise AlignmentError(
                f"values of {values.shape[0]} rows and {values.shape[2]} tokens; this alignment needs "
                f"{self.first.shape[0]} rows and at least {self.reach} sharer tokens"
            )
        size = (*values.shape[:2], self.first.shape[1], values.shape[3])
        exact = values.dtype if self.longest <= 1 else torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(size, dtype=exact, device=values.device)
        for step in range(self.longest):
            inside = (step < self.count)[:, None, :, None]
            index = (self.first + step).clamp(max=values.shape[2] - 1)[:, None, :, None]
            total = total + values.gather(2, index.expand(size)).masked_fill(~inside, 0)
        return (total / self.count.clamp(min=1)[:, None, :, None]).to(values.dtype)


def _reach(first: Tensor, count: Tensor) -> Tensor:
    ends = torch.where(count > 0, first + count, 0)
    return ends.max() if ends.numel() else ends.sum()
