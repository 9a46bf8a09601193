"""Writing packets: how large they will be, and making them, whole or as a stream by layer group.

What a packet is, and how it is read, stands in :mod:`kvtalk.packet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import SEEK_SET, RawIOBase
from itertools import accumulate, groupby, pairwise
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvtalk.cache import AT_ONCE, KVCache
from kvtalk.codecs import codec
from kvtalk.errors import CacheError, CodecError
from kvtalk.layout import LayerLayout, Layout
from kvtalk.manifest import NO_SUM, VERSION, header_bytes
from kvtalk.planning import Plan
from kvtalk.rope import AngleTable, rotate
from kvtalk.spec import ModelSpec


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
