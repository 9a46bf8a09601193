"""Several small codes in one byte.

A row of ``n`` channels at ``b`` bits becomes ``n·b/8`` bytes; byte ``j`` holds channels ``j``, ``j + n·b/8``, … from
its low bits up. Splitting a row into runs rather than neighbours lets both directions work on contiguous memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes under ``2^bits``, uint8 ``[..., channels]``, into ``[..., channels · bits / 8]``."""
    if bits == 8:
        return codes
    width = codes.shape[-1] * bits // 8
    packed = codes[..., :width].clone()
    for part in range(1, 8 // bits):
        packed |= codes[..., part * width : (part + 1) * width] << (part * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes, uint8 ``[..., channels]``."""
    if bits == 8:
        return packed.contiguous()
    width = packed.shape[-1]
    codes = packed.new_empty((*packed.shape[:-1], width * 8 // bits))
    for part in range(8 // bits):
        run = codes[..., part * width : (part + 1) * width]
        torch.bitwise_right_shift(packed, part * bits, out=run)
        run &= 2**bits - 1
    return codes
