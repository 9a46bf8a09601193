"""A cache of one model becomes a cache of another: an encoder beside the sharer, a decoder beside the receiver.

The encoder turns the sharer's cache into one latent vector for each of the *receiver's* tokens, or for each group of
so many of them (its pool); only latents cross. The decoder turns them into un-rotated keys and values of every receiver
layer, one token's for each latent. A latent may be cut to its first numbers (widths are trained together, as nested
representations, arXiv 2205.13147).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtalk.alignment.tokens import Tokenized, align, ranges
from kvtalk.codecs import codec
from kvtalk.device import sent
from kvtalk.errors import AdapterError, AlignmentError

Count = TypeVar("Count", int, Tensor)

HEAD = 64
"""Channels of an attention head of the adapter's own blocks."""

_LARGEST = 1 << 20
_MOST_POOLED = 64
_FARTHEST = 15
"""Distances between a receiver token's borders and its sharer token's are counted in characters up to this."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a translator.

    Attributes:
        sharer_values: keys and values of one sharer token, all layers.
        receiver_layers: of the receiver, all of one shape.
        receiver_values: keys and values of one receiver token.
        width: channels of the hidden states, a multiple of 64.
        latent: numbers of a whole latent.
        sharer_blocks: causal transformer blocks over the sharer's tokens, before the tokens are aligned.
        encoder_blocks: over the receiver's tokens, still beside the sharer.
        decoder_blocks: over the latents, beside the receiver.
        expansion: hidden channels of a block's MLP over ``width``.
        bottleneck: hidden channels of each receiver layer's nonlinear head.
        pool: consecutive receiver tokens that give one latent, which takes one place in the receiver's cache.
    """

    sharer_values: int
    receiver_layers: int
    receiver_values: int
    width: int = 576
    latent: int = 1024
    sharer_blocks: int = 1
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    expansion: float = 2.0
    bottleneck: int = 96
    pool: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be.

        Raises:
            AdapterError: says which.
        """
        for name, value in vars(self).items():
            if name != "expansion" and not (isinstance(value, int) and 0 <= value <= _LARGEST):
                raise AdapterError(f"{name} {value!r}: must be a whole number up to {_LARGEST:,}")
        if self.width % HEAD or self.width == 0:
            raise AdapterError(f"width {self.width}: must be a multiple of {HEAD}")
        if not 16 <= self.latent <= 4096 or self.latent % 8:
            raise AdapterError(f"latent {self.latent}: must be a multiple of 8 from 16 to 4,096")
        if type(self.pool) is not int or not 1 <= self.pool <= _MOST_POOLED:
            raise AdapterError(f"pool {self.pool}: must be a number of tokens from 1 to {_MOST_POOLED}")
        if not self.receiver_layers or self.receiver_values % self.receiver_layers:
            raise AdapterError("the receiver's layers must all be of one shape")


def by_name(sizes: list[tuple[str, Any]]) -> dict[str, Any]:
    """What ``asdict`` makes of sizes; a pool of 1 is left out, so that what is older than pools stays what it is."""
    return {name: value for name, value in sizes if (name, value) != ("pool", 1)}


def joined(encoder: Geometry, decoder: Geometry) -> Geometry:
    """Sizes of a translator that has the encoder of one and the decoder of another.

    Raises:
        AdapterError: their latents are of other sizes, or what one translator has the same on both sides is not.
    """
    for name in ("latent", "width", "expansion", "pool"):
        ours, theirs = getattr(encoder, name), getattr(decoder, name)
        if ours != theirs:
            raise AdapterError(f"{name} {ours} of the encoder and {theirs} of the decoder: train both with the same")
    return replace(
        encoder,
        receiver_layers=decoder.receiver_layers,
        receiver_values=decoder.receiver_values,
        decoder_blocks=decoder.decoder_blocks,
        bottleneck=decoder.bottleneck,
    )


@dataclass(frozen=True)
class Pairing:
    """Which sharer token each receiver token is made of.

    Attributes:
        index: ``[batch, receiver tokens]``, int64; 0 for padding.
        place: ``[batch, receiver tokens, 3]``, int64: how the receiver token lies within the sharer token, see
            :func:`pair`.
        counts: receiver tokens of each row, ``[batch]``, int64.
    """

    index: Tensor
    place: Tensor
    counts: Tensor

    def to(self, device: torch.device | str) -> Pairing:
        """On another device."""
        return Pairing(*(sent(part, device) for part in (self.index, self.place, self.counts)))


def pair(sharer: list[Tokenized], receiver: list[Tokenized]) -> Pairing:
    """For each receiver token the sharer token that covers its last character, and how it lies there.

    A receiver token that no sharer token overlaps (white space that the sharer's tokenizer drops) belongs to the one
    before.

    The place is three small numbers: characters from the sharer token's begin to the receiver token's, from the
    receiver token's end to the sharer token's, and how many tokens before it cover the very same characters.

    Raises:
        AlignmentError: no token of a row overlaps: the texts differ.
    """
    counts = torch.tensor([len(one.ids) for one in receiver])
    longest = int(counts.max())
    index = torch.zeros(len(receiver), longest, dtype=torch.long)
    place = torch.zeros(len(receiver), longest, 3, dtype=torch.long)
    for row, (theirs, ours) in enumerate(zip(sharer, receiver, strict=True)):
        which = align(theirs, ours, "last")
        if len(which) == 0 or which.max() < 0:
            raise AlignmentError("no token of the receiver matches one of the sharer's: did they read the same text?")
        which = np.maximum.accumulate(which).clip(min=0)
        begin = ours.spans[:, 0] - theirs.spans[which, 0]
        end = theirs.spans[which, 1] - ours.spans[:, 1]
        same = ranges(ours.spans, ours.spans)[0]
        repeat = torch.arange(len(which)) - torch.from_numpy(same)
        columns = torch.stack([torch.from_numpy(begin), torch.from_numpy(end), repeat], dim=1)
        index[row, : len(which)] = torch.from_numpy(which)
        place[row, : len(which)] = columns.clamp(-_FARTHEST, _FARTHEST) + _FARTHEST
    return Pairing(index, place, counts)


def grouped(tokens: Tensor, counts: Tensor, pool: int) -> Tensor:
    """Consecutive tokens side by side; a row's last token stands for what its last group lacks, too.

    Args:
        tokens: ``[batch, tokens, channels]``, right-padded.
        counts: tokens of each row, ``[batch]``, on the same device.
        pool: tokens of a group.

    Returns:
        ``[batch, groups, pool, channels]``.
    """
    if pool == 1:
        return tokens[:, :, None]
    batch, longest, channels = tokens.shape
    steps = torch.arange(latent_count(longest, pool) * pool, device=tokens.device)
    index = steps.minimum(counts[:, None] - 1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, channels)).view(batch, -1, pool, channels)


def latent_count(tokens: Count, pool: int) -> Count:
    """Latents of so many tokens; the last may stand for fewer."""
    return -(-tokens // pool)


def last_tokens(numbers: Tensor, counts: Tensor, pool: int) -> Tensor:
    """Where the last token of each group stands in its text.

    Args:
        numbers: of the groups, from 0; −1 for padding, which it stays; ``[batch, groups]``.
        counts: tokens of each row, ``[batch]``.
        pool: tokens of a group.
    """
    return ((numbers + 1) * pool).minimum(counts[:, None]) - 1


class Block(nn.Module):
    """A causal pre-norm transformer block with rotary positions and a gated MLP."""

    def __init__(self, width: int, expansion: float) -> None:
        super().__init__()
        hidden = int(width * expansion) // 64 * 64
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """``[batch, tokens, width]``, right-padded if at all; ``turn`` as made by :func:`turns`."""
        mixed = _linear(self.qkv, self.norm_attention(hidden)).view(*hidden.shape[:2], 3, -1, HEAD)
        queries, keys, values = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(_turned(queries, turn), _turned(keys, turn), values, is_causal=True)
        hidden = hidden + _linear(self.out, mixed.transpose(1, 2).flatten(2))
        gate, up = _linear(self.up, self.norm_mlp(hidden)).chunk(2, dim=2)
        return hidden + _linear(self.down, F.silu(gate) * up)


def _linear(layer: nn.Module, inputs: Tensor) -> Tensor:
    """A layer whose matrix may be in another type than what comes in."""
    assert isinstance(layer, nn.Linear)
    automatic = torch.is_autocast_enabled(inputs.device.type)
    outputs: Tensor = layer(inputs if automatic else inputs.to(layer.weight.dtype))
    return outputs


def turns(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the blocks' own rotary positions, ``[tokens, HEAD / 2]``, θ = 10⁴."""
    frequencies = 10_000 ** -(torch.arange(0, HEAD, 2, device=device) / HEAD)
    angles = torch.arange(tokens, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(heads.dtype) for part in turn)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Encoder(nn.Module):
    """The sharer's half."""

    mean: Tensor
    scale: Tensor

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        width, self.pool = geometry.width, geometry.pool
        self.register_buffer("mean", torch.zeros(geometry.sharer_values))
        self.register_buffer("scale", torch.ones(geometry.sharer_values))
        self.inward = nn.Linear(geometry.sharer_values, width, bias=False)
        self.sharer_blocks = _blocks(geometry, geometry.sharer_blocks)
        self.place = nn.Parameter(torch.zeros(3, 2 * _FARTHEST + 1, width))
        self.blocks = _blocks(geometry, geometry.encoder_blocks)
        self.latent = nn.Linear(self.pool * width, geometry.latent, bias=False)

    def forward(self, vectors: Tensor, pairing: Pairing) -> Tensor:
        """Latents.

        Args:
            vectors: the sharer's cache, ``[batch, sharer tokens, sharer_values]``, see
                :func:`kvtalk.adapters.vectors.to_vectors`.
            pairing: which of its tokens each receiver token is made of.

        Returns:
            ``[batch, groups of receiver tokens, latent]``, float32.
        """
        mean, scale = self.mean.to(vectors.dtype), self.scale.to(vectors.dtype)
        hidden = _linear(self.inward, (vectors - mean) / scale).float()
        hidden = _through(self.sharer_blocks, hidden)
        hidden = hidden.gather(1, pairing.index[:, :, None].expand(-1, -1, hidden.shape[2]))
        for number, table in enumerate(self.place):
            hidden = hidden + F.embedding(pairing.place[:, :, number], table)
        hidden = grouped(_through(self.blocks, hidden), pairing.counts, self.pool)
        return _linear(self.latent, hidden.flatten(2)).float()


class Decoder(nn.Module):
    """The receiver's half."""

    mean: Tensor
    scale: Tensor

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        width, values, layers = geometry.width, geometry.receiver_values, geometry.receiver_layers
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("scale", torch.ones(values))
        self.latent = nn.Linear(geometry.latent, width, bias=False)
        self.blocks = _blocks(geometry, geometry.decoder_blocks)
        self.norm = nn.RMSNorm(width)
        self.outward = nn.Linear(width, values, bias=False)
        self.down = nn.Linear(width, layers * geometry.bottleneck, bias=False)
        self.up = nn.Parameter(torch.zeros(layers, geometry.bottleneck, values // layers))

    def forward(self, latents: Tensor) -> Tensor:
        """Un-rotated keys and values of the receiver.

        Args:
            latents: ``[batch, latents, width]``, of any width up to a whole latent's.

        Returns:
            ``[batch, latents, receiver_values]``, float32, see :func:`kvtalk.adapters.vectors.from_vectors`.
        """
        return torch.addcmul(self.mean, self.standardised(latents), self.scale)

    def standardised(self, latents: Tensor) -> Tensor:
        """The same, each channel with mean 0 and deviation 1 over ordinary text."""
        weight = self.latent.weight[:, : latents.shape[2]]
        hidden = F.linear(latents.to(weight.dtype), weight).float()
        hidden = _through(self.blocks, hidden)
        narrow = F.silu(_linear(self.down, self.norm(hidden))).view(*hidden.shape[:2], len(self.up), -1)
        curved = torch.einsum("btlh,lhv->btlv", narrow, self.up).flatten(2)
        return (_linear(self.outward, hidden) + curved).float()


class Translator(nn.Module):
    """Both halves, as they are trained."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.encoder, self.decoder = Encoder(geometry), Decoder(geometry)

    def forward(self, vectors: Tensor, pairing: Pairing, width: int, codec: str) -> Tensor:
        """The receiver's standardised vectors from latents of a width that went through a codec."""
        return self.decoder.standardised(squeezed(self.encoder(vectors, pairing), width, codec))


def squeezed(latents: Tensor, width: int, name: str) -> Tensor:
    """Latents cut to a width and as a codec gives them back; gradients pass straight through."""
    cut = latents[:, :, :width]
    if name == "bf16":
        return cut
    with torch.no_grad(), torch.autocast(cut.device.type, enabled=False):
        restored = codec(name).simulated(cut.detach())
    return cut + (restored - cut).detach()


def _blocks(geometry: Geometry, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(geometry.width, geometry.expansion) for _ in range(count))


def _through(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    turn = turns(hidden.shape[1], hidden.device)
    for block in blocks:
        hidden = block(hidden, turn)
    return hidden
