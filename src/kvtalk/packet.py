"""The wire format: one verified, self-describing packet; a stream is a sequence of packets.

A packet is a safetensors blob whose metadata holds a canonical JSON manifest. ``docs/packet.md`` is its specification.
Nothing in it is executed; nothing is allocated before its declared sizes agree with the bytes that are there.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from io import SEEK_SET, RawIOBase
from itertools import groupby, pairwise
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvtalk.cache import KVCache, LayerCache, LayerSource, Prefix
from kvtalk.codecs import codec
from kvtalk.errors import CacheError, CodecError, PacketError
from kvtalk.layout import SECTIONS, LayerLayout, Layout
from kvtalk.manifest import NO_SUM, VERSION, Manifest, data_start, header_bytes, read_manifest, verify
from kvtalk.planning import Plan
from kvtalk.rope import AngleTable, rotate
from kvtalk.spec import Fingerprint, ModelSpec


class Memory(RawIOBase):
    """A file of known size in memory, never larger than what is written to it.

    Attributes:
        blob: its bytes.
    """

    def __init__(self, size: int) -> None:
        self.blob = memoryview(bytearray(size))
        self._at = 0

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._at = offset if whence == SEEK_SET else self._at + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        size = len(data)
        self.blob[self._at : self._at + size] = data
        self._at += size
        return size


def predict(cache: KVCache, plan: Plan, spec: ModelSpec, start: int = 0, parts: int = 1) -> int:
    """Bytes of the packet (or of all parts together), exactly, before anything is encoded."""
    whole = plan.layout(cache.extents, spec)
    total = 0
    for number, (begin, stop) in enumerate(_groups(len(spec.layers), parts), 1):
        layout = whole.covering(begin, stop)
        manifest = _manifest(cache, plan, spec, start, layout, whole.longest, (number, parts), {})
        total += len(header_bytes(manifest, layout)) + sum(layout.section_sizes().values())
    return total


def encode(cache: KVCache, plan: Plan, spec: ModelSpec, start: int = 0) -> memoryview:
    """One packet in memory.

    Args:
        cache: one sequence, rotated, from position ``start`` on, cut to what can be attended.
        plan: what to send and how.
        spec: the sharer's.
        start: position of the context's first token.

    Raises:
        CacheError: NaN, infinity, or a value that the codec cannot represent.
    """
    target = Memory(predict(cache, plan, spec, start))
    write(target, cache, plan, spec, start)
    return target.blob


def write(
    target: BinaryIO | Memory, cache: KVCache, plan: Plan, spec: ModelSpec, start: int = 0, parts: int = 1
) -> int:
    """Write one packet, or a stream of ``parts`` packets by layer group, holding one layer at a time.

    Returns:
        bytes written, what :func:`predict` said.
    """
    if not cache.rotated:
        raise CacheError("the keys are not rotated: call rotated_as(spec) first, the plan says how they are packed")
    if any(extent.tokens and extent.first < start for extent in cache.extents):
        raise CacheError(f"the cache begins before position {start}: take cache.since({start})")
    whole = plan.layout(cache.extents, spec)
    origin = target.tell()
    for number, (begin, stop) in enumerate(_groups(len(spec.layers), parts), 1):
        layout = whole.covering(begin, stop)
        header = header_bytes(_manifest(cache, plan, spec, start, layout, whole.longest, (number, parts), {}), layout)
        beginning = target.tell()
        target.write(b"\0" * len(header))
        end = beginning + len(header) + sum(layout.section_sizes().values())
        sums = _write_sections(target, cache, plan, spec, layout)
        manifest = _manifest(cache, plan, spec, start, layout, whole.longest, (number, parts), sums)
        target.seek(beginning)
        target.write(header_bytes(manifest, layout))
        target.seek(end)
    return target.tell() - origin


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One layer of a packet; decodes straight to where it is placed.

    Attributes:
        layout: its shape and codecs.
        positions: ``[1, tokens]``.
        keys, key_scales, values, value_scales: its bytes of each section.
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

    def keys_into(self, out: Tensor) -> None:
        """Decode the keys on the device of ``out``, ``[1, kv_heads, tokens, head_dim]``."""
        self._decode(self.layout.keys, self.keys, self.key_scales, out)

    def values_into(self, out: Tensor) -> None:
        """Decode the values, likewise."""
        self._decode(self.layout.values, self.values, self.value_scales, out)

    def _decode(self, name: str, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        if self.layout.kept:
            rows = codes.to(out.device).view(self.layout.kv_heads, self.layout.kept, -1)
            packer = codec(name)
            scales = scales.clone() if scales.storage_offset() % 2 else scales  # they may begin at an odd byte
            packer.decode(rows, scales.to(out.device), out[0])
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
        """Refuse a packet of another model.

        Raises:
            PacketError: fingerprints differ; says in what, and what to do.
        """
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
        for layer, offset in zip(self.layout.layers, self.layout.mask_offsets(), strict=True):
            taken = {}
            for name, size in layer.sizes.items():
                taken[name] = self._section(name)[cursors[name] : cursors[name] + size]
                cursors[name] += size
            yield PackedLayer(layer, self._positions(layer, offset), **taken)
            for name in taken:  # from the section's start: reading on maps some pages before it again
                self._give_back(self._section(name)[: cursors[name]])

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
    return Prefix(layers(), about.start, about.end, about.longest, about.rotated)


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
        if (layer.kv_heads, layer.head_dim) != (shape.kv_heads, shape.head_dim):
            raise PacketError("shapes", "KV heads or head_dim are not those of the model that the packet names")


def _groups(layers: int, parts: int) -> list[tuple[int, int]]:
    if not 1 <= parts <= layers:
        raise CacheError(f"a cache of {layers} layers cannot be sent in {parts} parts")
    edges = [layers * number // parts for number in range(parts + 1)]
    return list(pairwise(edges))


def _manifest(
    cache: KVCache,
    plan: Plan,
    spec: ModelSpec,
    start: int,
    layout: Layout,
    longest: int,
    part: tuple[int, int],
    sums: dict[str, str],
) -> dict[str, Any]:
    codecs = sorted({str(codec(plan.keys)), str(codec(plan.values))})
    rows = [
        [
            *(layer.kv_heads, layer.head_dim, layer.first, layer.span, layer.kept),
            *(codecs.index(str(codec(layer.keys))), codecs.index(str(codec(layer.values)))),
        ]
        for layer in layout.layers
    ]
    shapes = [row for index, row in enumerate(rows) if row not in rows[:index]]
    return {
        "v": VERSION,
        "payload": "cache",
        "model": ":".join(asdict(spec.fingerprint).values()),
        "start": start,
        "end": cache.length[0],
        "longest": longest,
        "rotated": plan.rope == "after",
        "codecs": codecs,
        "masks": "shared" if layout.shared_masks else "layer",
        "part": list(part),
        "covers": [layout.begin, layout.begin + len(layout.layers), len(spec.layers)],
        "shapes": shapes,
        "layers": [figure for row, same in groupby(rows) for figure in (len(list(same)), shapes.index(row))],
        "sums": [sums.get(name, NO_SUM) for name in layout.section_sizes()],
    }


def _write_sections(
    target: BinaryIO | Memory, cache: KVCache, plan: Plan, spec: ModelSpec, layout: Layout
) -> dict[str, str]:
    """Choose and encode layer by layer, each section's bytes to its own place; returns the sections' checksums."""
    origin = target.tell()
    ranges = layout.section_ranges()
    cursors = {name: origin + begin for name, (begin, _) in ranges.items()}
    sums = {name: xxhash.xxh3_64() for name in ranges}

    def put(name: str, data: Tensor) -> None:
        if not data.numel():
            return
        view = memoryview(data.contiguous().cpu().reshape(-1).numpy())  # type: ignore[arg-type]
        target.seek(cursors[name])
        target.write(view)
        sums[name].update(view)
        cursors[name] += len(view)

    offsets = layout.mask_offsets()
    masks_end = 0
    table = AngleTable(cache.layers[0].keys.device)
    for index, (layout_layer, offset) in enumerate(zip(layout.layers, offsets, strict=True), layout.begin):
        if layout_layer.kept == 0:
            continue
        layer = plan.choose(cache.layers[index], layout_layer.kept)
        keys = layer.keys
        shape = spec.layers[index]
        if plan.rope == "before" and shape.rope is not None:
            keys = rotate(keys, table.angles(shape.rope, layer.positions).inverse())
        for side, tensor, name in (
            ("key", keys, layout_layer.keys),
            ("value", layer.values, layout_layer.values),
        ):
            try:
                codes, scales = codec(name).encode(tensor[0])
            except CodecError as error:
                raise CacheError(f"{side}s of layer {index}: {error}") from error
            put(f"{side}s", codes)
            put(f"{side}_scales", scales)
        if offset is not None and offset >= masks_end:
            mask = _mask(layer.positions[0], layout_layer)
            put("positions", mask)
            masks_end = offset + layout_layer.mask_bytes
    return {name: digest.hexdigest() for name, digest in sums.items()}


def _mask(positions: Tensor, layer: LayerLayout) -> Tensor:
    bits = np.zeros(layer.mask_bytes * 8, dtype=np.uint8)
    bits[(positions - layer.first).numpy()] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _as_tensor(data: memoryview) -> Tensor:
    """The same memory as a tensor, which is only ever read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
