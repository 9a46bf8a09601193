"""The way of all codecs that share scales within blocks: cut into blocks, quantize each, pack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from kvtalk.codecs.base import Codec
from kvtalk.codecs.packing import pack, unpack
from kvtalk.errors import CodecError


class Blockwise(Codec):
    """A codec with fp16 scales per block.

    Blocks are tensors ``[kv_heads, blocks, tokens, blocks_along_channels, channels]``.
    """

    scales_per_block: ClassVar[int]

    @abstractmethod
    def quantize(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize blocks of float32.

        Returns:
            scales fp16, ``[kv_heads, blocks, blocks_along_channels, scales_per_block]``, and codes uint8 of the
            blocks' shape.
        """

    @abstractmethod
    def restore(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Values in float32 from codes (uint8, the blocks' shape) and float32 scales."""

    @property
    def scale_bytes(self) -> int:
        return 2 * self.scales_per_block

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        heads, tokens, head_dim = values.shape
        along = self.blocks.across(tokens, head_dim)
        codes = torch.empty(heads, tokens, head_dim * self.bits // 8, dtype=torch.uint8, device=values.device)
        scales = torch.empty(heads, *along, self.scales_per_block, dtype=torch.float16, device=values.device)
        for where, rows in self._ranges(values):
            blocks = _as_blocks(values[:, where].float(), rows, along[1])
            table, quantized = self.quantize(blocks)
            if not bool(torch.isfinite(table).all()):
                raise CodecError(f"NaN, infinity or a value beyond fp16: {self.family} cannot pack it; use bf16")
            scales[:, rows] = table
            codes[:, where] = pack(quantized.reshape(heads, -1, head_dim), self.bits)
        return codes, scales.reshape(-1).view(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        heads, tokens, head_dim = out.shape
        along = self.blocks.across(tokens, head_dim)
        table = scales.view(torch.float16).view(heads, *along, self.scales_per_block).float()
        for where, rows in self._ranges(out):
            blocks = _as_blocks(unpack(codes[:, where], self.bits), rows, along[1])
            out[:, where] = self.restore(blocks, table[:, rows]).view(heads, -1, head_dim)

    def simulated(self, values: Tensor) -> Tensor:
        heads, tokens, head_dim = values.shape
        along = self.blocks.across(tokens, head_dim)[1]
        parts = []
        for where, rows in self._ranges(values):
            table, codes = self.quantize(_as_blocks(values[:, where].float().contiguous(), rows, along))
            parts.append(self.restore(codes, table.float()).view(heads, -1, head_dim))
        return torch.cat(parts, dim=1)

    def _ranges(self, values: Tensor) -> Iterator[tuple[slice, slice]]:
        """Ranges of tokens, and which rows of blocks they fill; the last, smaller block stands alone."""
        tokens = values.shape[1]
        size = self.blocks.tokens or max(tokens, 1)
        whole = tokens - tokens % size
        step = self.tokens_at_once(values, size)
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            yield slice(start, stop), slice(start // size, stop // size)
        if whole < tokens:
            yield slice(whole, tokens), slice(whole // size, whole // size + 1)


def _as_blocks(values: Tensor, rows: slice, along_channels: int) -> Tensor:
    heads, tokens, head_dim = values.shape
    blocks = rows.stop - rows.start
    return values.view(heads, blocks, tokens // blocks, along_channels, head_dim // along_channels)
