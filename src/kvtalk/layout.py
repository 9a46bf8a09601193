"""Where every byte of a packet lies, known before anything is encoded.

A layout is computed by the sharer from what will be sent and by the receiver from the packet's manifest. Both must
agree to the byte, which is what makes sizes predictable and damaged packets recognisable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvtalk.codecs import codec
from kvtalk.errors import CodecError

SECTIONS = ("keys", "key_scales", "values", "value_scales", "positions")


@dataclass(frozen=True)
class LayerLayout:
    """One layer of a packet.

    Attributes:
        kv_heads: heads.
        head_dim: channels of a head.
        first: position of the first token that could have been kept.
        span: how many there were from there on, without holes.
        kept: how many of them are in the packet; 0 for a layer that is not sent.
        keys: codec of the keys.
        values: codec of the values.
    """

    kv_heads: int
    head_dim: int
    first: int
    span: int
    kept: int
    keys: str
    values: str

    def check_codecs(self) -> None:
        """Raise CodecError if a head cannot be cut into whole bytes and blocks."""
        for name in (self.keys, self.values):
            packer = codec(name)
            if self.head_dim * packer.bits % 8:
                raise CodecError(f"{name}: a head of {self.head_dim} channels does not fill whole bytes")
            packer.blocks.across(self.kept, self.head_dim)

    @property
    def masked(self) -> bool:
        """Whether a bit per token of the span says which were kept."""
        return 0 < self.kept < self.span

    @property
    def mask_bytes(self) -> int:
        """Bytes of that mask."""
        return -(-self.span // 8) if self.masked else 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the layer in each section but the positions."""
        shape = (self.kv_heads, self.kept, self.head_dim)
        keys, values = codec(self.keys), codec(self.values)
        if self.kept == 0:
            return dict.fromkeys(SECTIONS[:4], 0)
        return {
            "keys": keys.code_size(*shape),
            "key_scales": keys.scales_size(*shape),
            "values": values.code_size(*shape),
            "value_scales": values.scales_size(*shape),
        }


@dataclass(frozen=True)
class Layout:
    """The layers that a packet covers.

    Attributes:
        begin: index of the first of them in the model.
        layers: from there on; those not sent keep no tokens.
        shared_masks: layers with the same first, span and kept have the same mask, stored once.
    """

    begin: int
    layers: tuple[LayerLayout, ...]
    shared_masks: bool

    def mask_offsets(self) -> list[int | None]:
        """Where each layer's mask lies in the section ``positions``; None where there is none."""
        offsets: list[int | None] = []
        seen: dict[tuple[int, int, int], int] = {}
        end = 0
        for layer in self.layers:
            if not layer.masked:
                offsets.append(None)
                continue
            key = (layer.first, layer.span, layer.kept)
            if self.shared_masks and key in seen:
                offsets.append(seen[key])
                continue
            seen[key] = end
            offsets.append(end)
            end += layer.mask_bytes
        return offsets

    def section_sizes(self) -> dict[str, int]:
        """Bytes of each section, empty ones left out, in the packet's order."""
        totals = dict.fromkeys(SECTIONS, 0)
        for layer, offset in zip(self.layers, self.mask_offsets(), strict=True):
            for name, size in layer.sizes.items():
                totals[name] += size
            if offset is not None:
                totals["positions"] = max(totals["positions"], offset + layer.mask_bytes)
        return {name: size for name, size in totals.items() if size}

    def section_ranges(self) -> dict[str, tuple[int, int]]:
        """Where each section begins and ends in the packet's data."""
        ranges, end = {}, 0
        for name, size in self.section_sizes().items():
            ranges[name] = (end, end + size)
            end += size
        return ranges

    @property
    def longest(self) -> int:
        """The most tokens that any layer keeps."""
        return max((layer.kept for layer in self.layers), default=0)

    @property
    def sent_layers(self) -> list[int]:
        """Indices of the layers that hold tokens."""
        return [self.begin + index for index, layer in enumerate(self.layers) if layer.kept]

    def covering(self, begin: int, stop: int) -> Layout:
        """The same for fewer layers, ``begin`` to ``stop`` of the model."""
        return Layout(begin, self.layers[begin - self.begin : stop - self.begin], self.shared_masks)
