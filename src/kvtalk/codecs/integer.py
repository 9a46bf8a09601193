"""Uniform asymmetric quantization to 8, 4 or 2 bits: ``value ≈ minimum + code · step``.

Step and minimum are fp16 per block. Blocks of one channel by many tokens suit keys, whose outliers sit in few
channels; blocks of one token suit values (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtalk.codecs.blockwise import Blockwise


class Integer(Blockwise):
    """``2^bits`` equal steps between the least and the greatest value of a block."""

    scales_per_block = 2

    def quantize(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        top = 2**self.bits - 1
        low, high = blocks.amin(dim=(2, 4)), blocks.amax(dim=(2, 4))
        lows = low.half()
        steps = ((high - lows.float()) / top).clamp(min=0).half()
        inverse = torch.where(steps > 0, 1 / steps.float(), 0.0)
        codes = (blocks - _over(lows.float())) * _over(inverse)
        return torch.stack([steps, lows], dim=-1), codes.round_().clamp_(0, top).to(torch.uint8)

    def restore(self, codes: Tensor, scales: Tensor) -> Tensor:
        return torch.addcmul(_over(scales[..., 1]), codes, _over(scales[..., 0]))


class Int8(Integer):
    """8 bits."""

    family = "int8"
    bits = 8


class Int4(Integer):
    """4 bits, two channels a byte."""

    family = "int4"
    bits = 4


class Int2(Integer):
    """2 bits, four channels a byte."""

    family = "int2"
    bits = 2


def _over(per_block: Tensor) -> Tensor:
    """A figure per block, shaped to meet the block's values."""
    return per_block[:, :, None, :, None]
