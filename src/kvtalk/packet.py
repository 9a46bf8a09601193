"""The wire format: one verified, self-describing packet; a stream is a sequence of packets.

A packet is a safetensors blob whose metadata holds a canonical JSON manifest. ``docs/packet.md`` is its specification.
Nothing in it is executed; nothing is allocated before its declared sizes agree with the bytes that are there.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import SEEK_SET, RawIOBase
from itertools import accumulate, groupby, pairwise
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvtalk.cache import AT_ONCE, PADDING, KVCache, LayerCache, LayerSource, Prefix
from kvtalk.codecs import NOTHING, codec
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


def predict(
    cache: KVCache, plan: Plan, spec: ModelSpec, start: int = 0, parts: int = 1, text: str | None = None
) -> int:
    """Bytes of the packet (or of all parts together), exactly, before anything is encoded."""
    _need_one_row(cache)
    return sum(draft.size for draft in _drafts(cache, [plan], spec, start, parts, [text])[0])


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
    _need_one_row(cache)
    return encode_rows(cache, [plan], spec, start)[0]


def encode_rows(
    cache: KVCache, plans: Sequence[Plan], spec: ModelSpec, start: int = 0, texts: Sequence[str] | None = None
) -> list[memoryview]:
    """A packet of each sequence in memory, byte for byte what :func:`encode` makes of it alone, in one go.

    Args:
        cache: as for :func:`encode`, any number of rows.
        plans: of each row; they may differ in how many tokens they keep, and in nothing else.
        spec: the sharer's.
        start: position of each context's first token.
        texts: digests of what was read, for receivers that read it too.

    Raises:
        CacheError: NaN, infinity, a value that the codec cannot represent, or plans that differ in more.
    """
    if len({replace(plan, keep=1.0) for plan in plans}) != 1:
        raise CacheError("the plans of rows that are packed together may differ only in how many tokens they keep")
    _check_packable(cache, start)
    drafts = [row[0] for row in _drafts(cache, plans, spec, start, 1, texts)]
    targets = [Memory(draft.size) for draft in drafts]
    _write_part(targets, cache, plans[0], spec, drafts)
    return [target.blob for target in targets]


def write(
    target: BinaryIO | Memory, cache: KVCache, plan: Plan, spec: ModelSpec, start: int = 0, parts: int = 1
) -> int:
    """Write one packet, or a stream of ``parts`` packets by layer group, holding few layers at a time.

    Returns:
        bytes written, what :func:`predict` said.
    """
    _need_one_row(cache)
    _check_packable(cache, start)
    origin = target.tell()
    for draft in _drafts(cache, [plan], spec, start, parts)[0]:
        _write_part([target], cache, plan, spec, [draft])
    return target.tell() - origin


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


def _need_one_row(cache: KVCache) -> None:
    if cache.batch != 1:
        raise CacheError("one packet holds one sequence: use encode_rows() for several")


def _check_packable(cache: KVCache, start: int) -> None:
    if not cache.rotated:
        raise CacheError("the keys are not rotated: call rotated_as(spec) first, the plan says how they are packed")
    if any(extent.tokens and extent.first < start for row in cache.extents for extent in row):
        raise CacheError(f"the cache begins before position {start}: take cache.since({start})")


def _groups(layers: int, parts: int) -> list[tuple[int, int]]:
    if not 1 <= parts <= layers:
        raise CacheError(f"a cache of {layers} layers cannot be sent in {parts} parts")
    edges = [layers * number // parts for number in range(parts + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class _Draft:
    """A packet that is still to be written.

    Attributes:
        layout: where its bytes go.
        about: its manifest but for the checksums.
    """

    layout: Layout
    about: dict[str, Any]

    @cached_property
    def sections(self) -> dict[str, int]:
        """Bytes of each section."""
        return self.layout.section_sizes()

    @cached_property
    def header_size(self) -> int:
        """Bytes of the header."""
        return len(self.header({}))

    @property
    def size(self) -> int:
        """Bytes of the packet."""
        return self.header_size + sum(self.sections.values())

    def header(self, sums: dict[str, str]) -> bytes:
        """The header, with a checksum for each section."""
        listed = [sums.get(name, NO_SUM) for name in self.sections]
        return header_bytes({**self.about, "sums": listed}, self.layout)


def _drafts(
    cache: KVCache,
    plans: Sequence[Plan],
    spec: ModelSpec,
    start: int,
    parts: int,
    texts: Sequence[str | None] | None = None,
) -> list[list[_Draft]]:
    """For each row, its packets by layer group."""
    groups = _groups(len(spec.layers), parts)
    texts = texts or [None] * len(plans)
    rows = []
    for extents, plan, length, text in zip(cache.extents, plans, cache.length, texts, strict=True):
        whole = plan.layout(extents, spec)
        row = []
        for number, (begin, stop) in enumerate(groups, 1):
            layout = whole.covering(begin, stop)
            about = _about(plan, spec, layout, (start, length, whole.longest), (number, parts))
            row.append(_Draft(layout, about if text is None else {**about, "text": text}))
        rows.append(row)
    return rows


def _about(
    plan: Plan, spec: ModelSpec, layout: Layout, context: tuple[int, int, int], part: tuple[int, int]
) -> dict[str, Any]:
    names = {name for layer in layout.layers for name in (layer.keys, layer.values)}
    codecs = sorted({str(codec(name)) for name in names})
    which = {name: codecs.index(str(codec(name))) for name in names}
    rows = [
        (*(layer.kv_heads, layer.head_dim, layer.first, layer.span, layer.kept), which[layer.keys], which[layer.values])
        for layer in layout.layers
    ]
    shapes = list(dict.fromkeys(rows))
    return {
        "v": VERSION,
        **({"payload": "cache"} if spec.adapter is None else {"payload": "latent", "adapter": spec.adapter}),
        "model": ":".join(asdict(spec.fingerprint).values()),
        "start": context[0],
        "end": context[1],
        "longest": context[2],
        "rotated": plan.rope == "after",
        "codecs": codecs,
        "masks": "shared" if layout.shared_masks else "layer",
        "part": list(part),
        "covers": [layout.begin, layout.begin + len(layout.layers), len(spec.layers)],
        "shapes": shapes,
        "layers": [figure for row, same in groupby(rows) for figure in (len(list(same)), shapes.index(row))],
    }


class _Writer:
    """Puts the sections of one packet in their places; the header, which holds their checksums, comes last."""

    def __init__(self, target: BinaryIO | Memory, draft: _Draft) -> None:
        self.target, self.draft = target, draft
        self.begin = target.tell()
        target.write(b"\0" * draft.header_size)
        ends = accumulate(draft.sections.values(), initial=self.begin + draft.header_size)
        self.cursors = dict(zip(draft.sections, ends, strict=False))
        self.sums = {name: xxhash.xxh3_64() for name in draft.sections}
        self.masks_end = 0
        self.mask_offsets = draft.layout.mask_offsets()

    def put(self, name: str, data: Tensor) -> None:
        """Append bytes, uint8 on the CPU, to a section."""
        if not data.numel():
            return
        view = memoryview(data.reshape(-1).numpy())  # type: ignore[arg-type]
        self.target.seek(self.cursors[name])
        self.target.write(view)
        self.sums[name].update(view)
        self.cursors[name] += len(view)

    def put_mask(self, index: int, positions: Tensor) -> None:
        """Note which tokens of a layer were kept, if they need a mask of their own."""
        layer, offset = self.draft.layout.layers[index], self.mask_offsets[index]
        if offset is not None and offset >= self.masks_end:
            self.put("positions", _mask(positions, layer))
            self.masks_end = offset + layer.mask_bytes

    def finish(self) -> None:
        """Write the header and go to the packet's end."""
        self.target.seek(self.begin)
        self.target.write(self.draft.header({name: digest.hexdigest() for name, digest in self.sums.items()}))
        self.target.seek(self.begin + self.draft.size)


def _write_part(
    targets: Sequence[BinaryIO | Memory], cache: KVCache, plan: Plan, spec: ModelSpec, drafts: Sequence[_Draft]
) -> None:
    """Choose and encode, all rows and neighbouring layers that are alike in one go, each row's bytes to its target."""
    writers = [_Writer(target, draft) for target, draft in zip(targets, drafts, strict=True)]
    table = AngleTable(cache.layers[0].keys.device)
    begin = drafts[0].layout.begin
    for run in _alike(cache, plan, spec, drafts):
        counts = [draft.layout.layers[run[0]].kept for draft in drafts]
        rows = [row for row, count in enumerate(counts) if count]
        if not rows:
            continue
        layers = [cache.layers[begin + index] for index in run]
        if len(rows) < len(counts):
            layers, counts = [layer.of_rows(rows) for layer in layers], [counts[row] for row in rows]
        layer = layers[0] if len(run) == 1 else layers[0].stacked(layers[1:])
        layer = plan.choose(layer, counts * len(run))
        keys, rope = layer.keys, spec.layers[begin + run[0]].rope
        if plan.rope == "before" and rope is not None:
            keys = rotate(keys, table.angles(rope, layer.positions).inverse())
        packed = drafts[rows[0]].layout.layers[run[0]]
        for side, tensor, name in (("key", keys, packed.keys), ("value", layer.values, packed.values)):
            try:
                codes, scales = codec(name).encode(tensor.flatten(0, 1))
            except CodecError as error:
                which = begin + run[_refused(name, tensor.chunk(len(run)))]
                raise CacheError(f"{side}s of layer {which}: {error}") from error
            codes, scales = (x.cpu().view(len(run), len(rows), layer.shape[0], -1) for x in (codes, scales))
            for number, row in enumerate(rows):
                layout = drafts[row].layout.layers[run[0]]
                for section, data in ((f"{side}s", codes), (f"{side}_scales", scales)):
                    writers[row].put(section, data[:, number, :, : layout.sizes[section] // layout.kv_heads])
        for number, row in enumerate(rows):
            for index, positions in zip(run, layer.positions.view(len(run), len(rows), -1)[:, number], strict=True):
                writers[row].put_mask(index, positions[: counts[number]])
    for writer in writers:
        writer.finish()


def _alike(cache: KVCache, plan: Plan, spec: ModelSpec, drafts: Sequence[_Draft]) -> list[list[int]]:
    """Neighbouring layers of a part that are packed alike in every row, so few that they may be packed in one go."""
    begin = drafts[0].layout.begin
    most = AT_ONCE.get(cache.layers[0].keys.device.type, 0)
    runs: list[list[int]] = []
    before: object = None
    for index, shape in enumerate(spec.layers[begin : begin + len(drafts[0].layout.layers)]):
        layer = cache.layers[begin + index]
        turned = plan.rope == "before" and shape.rope is not None  # such layers share the angles of equal positions
        kind = layer.kind, layer.tokens, turned, [draft.layout.layers[index] for draft in drafts]
        if kind == before and not turned and (len(runs[-1]) + 1) * layer.keys.numel() <= most:
            runs[-1].append(index)
        else:
            runs.append([index])
        before = kind
    return runs


def _refused(name: str, tensors: Sequence[Tensor]) -> int:
    """The first of some tensors that a codec cannot pack."""
    for number, tensor in enumerate(tensors[:-1]):
        try:
            codec(name).encode(tensor.flatten(0, 1))
        except CodecError:
            return number
    return len(tensors) - 1


def _mask(positions: Tensor, layer: LayerLayout) -> Tensor:
    bits = np.zeros(layer.mask_bytes * 8, dtype=np.uint8)
    bits[(positions - layer.first).numpy()] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _as_tensor(data: memoryview) -> Tensor:
    """The same memory as a tensor, which is only ever read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
