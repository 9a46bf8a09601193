"""NF4: 16 levels that are the quantiles of a normal distribution, times the block's greatest magnitude.

QLoRA, arXiv 2305.14314, appendix E. Scales are fp16 per block and counted like every other byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtalk.codecs.blockwise import Blockwise

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class NF4(Blockwise):
    """4 bits on normal quantiles."""

    family = "nf4"
    bits = 4
    scales_per_block = 1

    def quantize(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        scales = blocks.abs().amax(dim=(2, 4)).half()
        inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
        levels = torch.tensor(LEVELS, device=blocks.device)
        between = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks * inverse[:, :, None, :, None], between)
        return scales[..., None], codes.to(torch.uint8)

    def restore(self, codes: Tensor, scales: Tensor) -> Tensor:
        levels = torch.tensor(LEVELS, device=codes.device)
        return levels[codes.int()] * scales[:, :, None, :, None, 0]
