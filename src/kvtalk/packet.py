"""The wire format, and reading it: one verified, self-describing packet; a stream is a sequence of packets.

A packet is a safetensors blob whose metadata holds a canonical JSON manifest. ``docs/packet.md`` is its specification.
Nothing in it is executed; nothing is allocated before its declared sizes agree with the bytes that are there.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvtalk.cache import PADDING, KVCache, LayerCache, LayerSource, Prefix
from kvtalk.codecs import NOTHING, codec
from kvtalk.errors import PacketError
from kvtalk.layout import SECTIONS, LayerLayout, Layout
from kvtalk.manifest import Manifest, data_start, header_bytes, read_manifest, verify
from kvtalk.spec import Fingerprint, ModelSpec


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One layer of a packet, or of several; decodes straight to where it is placed.

    Attributes:
        layout: its shape and codecs; of several, that of the one that keeps the most tokens.
        positions: ``[batch, tokens]``.
        keys, key_scales, values, value_scales: its bytes of each section, one packet's after the other's.
    """

    layout: LayerLayout
    positions: Tensor
    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads and head_dim."""
        return self.layout.kv_heads, self.layout.head_dim

    @property
    def kind(self) -> Hashable:
        """Layers of equal kind can be stacked."""
        return PackedLayer, self.shape, self.layout.keys, self.layout.values

    def stacked(self, others: Sequence[PackedLayer]) -> PackedLayer:
        """This layer's rows and those of others of its kind, right-padded to the longest; all of one row each."""
        layers = (self, *others)
        longest = max((layer.layout for layer in layers), key=lambda layout: layout.kept)
        if all(layer.layout.kept == longest.kept for layer in layers):
            joined = {name: torch.cat([getattr(layer, name) for layer in layers]) for name in SECTIONS[:4]}
            return PackedLayer(longest, torch.cat([layer.positions for layer in layers]), **joined)
        positions = torch.full((len(layers), longest.kept), PADDING, dtype=torch.long)
        for row, layer in zip(positions, layers, strict=True):
            row[: layer.layout.kept] = layer.positions[0]
        return PackedLayer(longest, positions, **{name: _side_by_side(layers, longest, name) for name in SECTIONS[:4]})

    def keys_into(self, out: Tensor) -> None:
        """Decode the keys on the device of ``out``, ``[batch, kv_heads, tokens, head_dim]``."""
        self._decode(self.layout.keys, self.keys, self.key_scales, out)

    def values_into(self, out: Tensor) -> None:
        """Decode the values, likewise."""
        self._decode(self.layout.values, self.values, self.value_scales, out)

    def _decode(self, name: str, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        if self.layout.kept:
            heads = len(self.positions) * self.layout.kv_heads
            rows = codes.to(out.device).view(heads, self.layout.kept, -1)
            packer = codec(name)
            scales = scales.clone() if scales.storage_offset() % 2 else scales  # they may begin at an odd byte
            packer.decode(rows, scales.to(out.device), out.view(heads, *out.shape[2:]))
            # Blocks are as finite as their scales; without scales every value is looked at.
            if not bool(torch.isfinite(scales.view(torch.float16) if packer.scale_bytes else out).all()):
                raise PacketError("keys" if codes is self.keys else "values", "NaN or infinity")


@dataclass(frozen=True, eq=False)
class Packet:
    """A packet that has been read and verified.

    Attributes:
        manifest: what it says about itself.
        layout: where its bytes lie.
        size: its bytes.
    """

    manifest: Manifest
    layout: Layout
    size: int
    _data: Tensor
    _mapping: mmap.mmap | None = None

    @classmethod
    def parse(cls, blob: bytes | bytearray | memoryview) -> Packet:
        """Read one packet.

        Raises:
            PacketError: anything is wrong with it.
        """
        packet = cls.parse_first(blob)
        if packet.size != len(blob):
            raise PacketError("size", f"{len(blob) - packet.size} bytes too many after the packet's end")
        return packet

    @classmethod
    def parse_first(cls, blob: bytes | bytearray | memoryview) -> Packet:
        """Read the packet that a longer blob begins with; see :meth:`parse`."""
        view = memoryview(blob)
        begin = data_start(view)
        manifest = read_manifest(bytes(view[8:begin]))
        layout = manifest.layout()
        if header_bytes(manifest, layout) != bytes(view[:begin]):
            raise PacketError("header", "does not match the manifest")
        end = begin + sum(layout.section_sizes().values())
        if len(view) < end:
            raise PacketError("size", f"truncated: {len(view)} bytes of {end}")
        data = view[begin:end]
        verify(data, manifest, layout)
        tensor = _as_tensor(data)
        packet = cls(manifest, layout, end, tensor, data.obj if isinstance(data.obj, mmap.mmap) else None)
        packet._give_back(tensor)
        return packet

    @property
    def fingerprint(self) -> Fingerprint:
        """The sharer's."""
        return Fingerprint(*self.manifest.model.split(":"))

    def check_model(self, spec: ModelSpec) -> None:
        """Refuse a packet of another model or adapter.

        Raises:
            PacketError: fingerprints differ; says in what, and what to do.
        """
        if self.manifest.adapter != spec.adapter:
            raise PacketError("adapter", _other_adapter(self.manifest.adapter, spec.adapter))
        theirs, ours = self.fingerprint, spec.fingerprint
        different = theirs.differences(ours)
        if different:
            raise PacketError(
                "model",
                f"made by another model ({theirs.arch}; {', '.join(different)} differ from this {ours.arch}): "
                "load the model that made it, or an adapter between the two",
            )

    def layers(self) -> Iterator[PackedLayer]:
        """The layers that the packet covers, still packed.

        Raises:
            PacketError: a mask that does not keep what the manifest says.
        """
        cursors = dict.fromkeys(SECTIONS, 0)
        sections = {name: self._section(name) for name in SECTIONS}
        known: dict[tuple[int, ...], Tensor] = {}
        for layer, offset in zip(self.layout.layers, self.layout.mask_offsets(), strict=True):
            taken = {}
            for name, size in layer.sizes.items():
                taken[name] = sections[name][cursors[name] : cursors[name] + size]
                cursors[name] += size
            where = layer.first, layer.span, layer.kept, -1 if offset is None else offset
            if where not in known:
                known[where] = self._positions(layer, offset)
            yield PackedLayer(layer, known[where], **taken)
            for name in taken:  # from the section's start: reading on maps some pages before it again
                self._give_back(sections[name][: cursors[name]])

    def _give_back(self, part: Tensor) -> None:
        """Let go of the memory of a part that was read, if it is mapped from a file; it can be read again."""
        if self._mapping is None or not part.numel() or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = part.data_ptr() - np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (begin + part.numel() - first) // mmap.PAGESIZE
        if pages > 0:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, pages * mmap.PAGESIZE)

    def _section(self, name: str) -> Tensor:
        begin, end = self._section_ranges.get(name, (0, 0))
        return self._data[begin:end]

    @cached_property
    def _section_ranges(self) -> dict[str, tuple[int, int]]:
        return self.layout.section_ranges()

    def _positions(self, layer: LayerLayout, offset: int | None) -> Tensor:
        if layer.kept == 0:
            return torch.empty(1, 0, dtype=torch.long)
        every = torch.arange(layer.first, layer.first + layer.span)
        if offset is None:
            return every[None]
        mask = self._section("positions")[offset : offset + layer.mask_bytes].numpy()
        bits = np.unpackbits(mask, bitorder="little")
        if int(bits.sum()) != layer.kept or bits[layer.span :].any():
            raise PacketError("positions", f"mask keeps {int(bits.sum())} tokens, the manifest says {layer.kept}")
        return every[torch.from_numpy(bits[: layer.span]).bool()][None]


def read_stream(blob: bytes | bytearray | memoryview) -> Iterator[Packet]:
    """The packets of a blob that holds one or several, each read when it is asked for.

    Raises:
        PacketError: anything is wrong with the packet at hand.
    """
    view = memoryview(blob)
    if not len(view):
        raise PacketError("size", "truncated: 0 bytes")
    while len(view):
        packet = Packet.parse_first(view)
        yield packet
        view = view[packet.size :]


def prefix(packets: Iterable[Packet], spec: ModelSpec) -> Prefix:
    """One context's packets as something to place; each is taken only when its layers are needed.

    Args:
        packets: all parts of one cache, in order.
        spec: the receiver's; must be the model that made them.

    Raises:
        PacketError: another model's, or parts that do not belong together; those after the first when they come.
    """
    stream = iter(packets)
    first = next(stream, None)
    if first is None:
        raise PacketError("part", "there is no packet")

    def layers() -> Iterator[PackedLayer]:
        packet: Packet | None = first
        covered = 0
        for number in range(1, first.manifest.part[1] + 1):
            if packet is None:
                raise PacketError("part", f"{number} of {first.manifest.part[1]} is missing")
            packet.check_model(spec)
            _check_part(packet, first, number, covered, len(spec.layers))
            _check_shapes(packet, spec)
            yield from packet.layers()
            covered = packet.manifest.covers[1]
            packet = next(stream, None)
        if packet is not None:
            raise PacketError("part", f"a packet follows the last of {first.manifest.part[1]}")
        if covered != len(spec.layers):
            raise PacketError("covers", f"{covered} layers of {len(spec.layers)}")

    first.check_model(spec)
    about = first.manifest
    return Prefix(layers(), about.start, about.end, about.longest, about.rotated, about.text)


def to_cache(packets: Iterable[Packet], spec: ModelSpec) -> KVCache:
    """Decode everything into a cache of one sequence."""
    made = prefix(packets, spec)
    layers = tuple(_decoded(layer, spec.dtype) for layer in made.layers)
    return KVCache(layers, (made.length,), made.rotated)


def _decoded(layer: LayerSource, dtype: torch.dtype) -> LayerCache:
    kv_heads, head_dim = layer.shape
    size = (1, kv_heads, layer.positions.shape[1], head_dim)
    made = LayerCache(torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype), layer.positions)
    layer.keys_into(made.keys)
    layer.values_into(made.values)
    return made


def _check_part(packet: Packet, first: Packet, number: int, covered: int, layers: int) -> None:
    ours, theirs = first.manifest, packet.manifest
    if theirs.part != (number, ours.part[1]) or theirs.covers[0] != covered or theirs.covers[2] != layers:
        raise PacketError("part", f"expected part {number} of {ours.part[1]} from layer {covered} on")
    same = ("start", "end", "longest", "rotated")
    if any(getattr(ours, name) != getattr(theirs, name) for name in same):
        raise PacketError("part", f"part {number} belongs to another cache")


def _check_shapes(packet: Packet, spec: ModelSpec) -> None:
    for layer, shape in zip(packet.layout.layers, spec.layers[packet.layout.begin :], strict=False):
        narrower = spec.adapter is not None and layer.head_dim <= shape.head_dim
        if layer.kv_heads != shape.kv_heads or not (narrower or layer.head_dim == shape.head_dim):
            raise PacketError("shapes", "KV heads or head_dim are not those of the model that the packet names")
        if layer.kept and not (shape.keys <= (layer.keys != NOTHING) and shape.values <= (layer.values != NOTHING)):
            raise PacketError("codecs", "keys or values that the receiver reads did not cross")


def _other_adapter(theirs: str | None, ours: str | None) -> str:
    if ours is None:
        return f"a latent of adapter {theirs}: load that adapter at the receiver"
    if theirs is None:
        return "a plain cache, but the receiver was given an adapter: let the sharer use its other half"
    return f"a latent of adapter {theirs}, the receiver has {ours}: both sides need the same one"


def _side_by_side(layers: Sequence[PackedLayer], longest: LayerLayout, name: str) -> Tensor:
    """A section of several layers, every head filled up to the longest."""
    size = longest.sizes[name]
    both = torch.zeros(len(layers), longest.kv_heads, size // longest.kv_heads, dtype=torch.uint8)
    for row, layer in zip(both, layers, strict=True):
        heads = getattr(layer, name).view(longest.kv_heads, -1)
        row[:, : heads.shape[1]] = heads
    return both.view(-1)


def _as_tensor(data: memoryview) -> Tensor:
    """The same memory as a tensor, which is only ever read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
