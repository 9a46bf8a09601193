"""What a packet says about itself, and the safetensors header that says it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvtalk.codecs import NOTHING, codec
from kvtalk.errors import CodecError, PacketError
from kvtalk.layout import SECTIONS, LayerLayout, Layout

VERSION = 1
MAX_HEADER_BYTES = 1 << 20
NO_SUM = "0" * 16
"""Stands for a checksum that is not known yet; as long as one."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0, le=2**24)]
Small = Annotated[int, Field(ge=0, le=4096)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Manifest(_Strict):
    """What a packet says about itself.

    Attributes:
        v: version of the format.
        payload: ``cache``: keys and values; ``latent``: one vector a token, or a group of them, in the place of one
            layer's keys.
        adapter: identity of the adapter that made a latent; absent in a cache.
        model: the sharer's fingerprint: arch, geometry, rope, tokenizer and weights, joined by colons.
        start: position of the context's first token at the sharer.
        end: the position after its last token.
        longest: the most tokens that any layer of the whole cache keeps.
        rotated: whether keys carry their rotary embedding.
        text: xxh3 of the text that was read, in a cache for a receiver that reads it too (fused placement).
        codecs: names that the rows refer to.
        masks: ``shared`` if layers of equal first, span and kept have one mask.
        part: this packet's number from 1, and how many there are.
        covers: first model layer of this packet, the one after its last, and the model's number of layers.
        shapes: distinct layers: kv_heads, head_dim, first, span, kept, key codec, value codec.
        layers: runs of equal layers, flat: how many, which shape, how many, which shape, and so on.
        sums: xxh3 of each section, in their order.
    """

    v: Literal[1]
    payload: Literal["cache", "latent"]
    adapter: Digest | None = None
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}(:[0-9a-f]{16}){4}$")]
    start: Count
    end: Count
    longest: Count
    rotated: bool
    text: Digest | None = None
    codecs: Annotated[list[Annotated[str, Field(max_length=32)]], Field(max_length=64)]
    masks: Literal["shared", "layer"]
    part: tuple[Small, Small]
    covers: tuple[Small, Small, Small]
    shapes: Annotated[list[tuple[Small, Small, Count, Count, Count, Small, Small]], Field(max_length=4096)]
    layers: Annotated[list[Small], Field(min_length=2, max_length=8192)]
    sums: Annotated[list[Digest], Field(max_length=len(SECTIONS))]

    def layout(self) -> Layout:
        """Where the packet's bytes lie.

        Raises:
            PacketError: rows that contradict each other, or an unknown codec.
        """
        if not self.start < self.end or not 0 < self.longest <= self.end - self.start:
            raise PacketError("end", f"positions {self.start} to {self.end} cannot hold {self.longest} tokens")
        if (self.payload == "latent") != (self.adapter is not None):
            raise PacketError("adapter", "a latent names its adapter, a cache has none")
        shapes = [self._layer(shape) for shape in self.shapes]
        counts, which = self.layers[::2], self.layers[1::2]
        if len(counts) != len(which) or sum(counts) > 4096 or max(which) >= len(shapes):
            raise PacketError("layers", "runs that name more layers or shapes than there can be")
        layers = [shapes[shape] for count, shape in zip(counts, which, strict=True) for _ in range(count)]
        begin, stop, total = self.covers
        if not (begin < stop <= total and len(layers) == stop - begin):
            raise PacketError("covers", f"{self.covers} does not fit {len(layers)} layers")
        if not 1 <= self.part[0] <= self.part[1]:
            raise PacketError("part", f"{self.part[0]} of {self.part[1]}")
        layout = Layout(begin, tuple(layers), self.masks == "shared")
        if len(self.sums) != len(layout.section_sizes()):
            raise PacketError("sums", f"{len(self.sums)} checksums for {len(layout.section_sizes())} sections")
        return layout

    def _layer(self, shape: tuple[int, ...]) -> LayerLayout:
        kv_heads, head_dim, first, span, kept, keys, values = shape
        if kv_heads == 0 or head_dim == 0 or kept > span or kept > self.longest:
            raise PacketError("shapes", f"impossible shape {shape}")
        if span and not self.start <= first <= first + span <= self.end:
            raise PacketError("shapes", f"{shape} lies outside the context {self.start}..{self.end}")
        layer = LayerLayout(kv_heads, head_dim, first, span, kept, self._codec(keys), self._codec(values))
        if self.payload == "latent" and (kept == 0 or kv_heads != 1):
            raise PacketError("shapes", f"a latent without tokens or with several heads: {shape}")
        if self.payload == "latent" and (layer.keys == NOTHING or layer.values != NOTHING):
            raise PacketError("codecs", "a latent has no values")
        lacks = [layer.keys, layer.values].count(NOTHING)
        if self.payload == "cache" and ((lacks and self.text is None) or (lacks == 2 and kept)):
            raise PacketError("codecs", "a cache has keys and values, one of both at least where it names its text")
        try:
            layer.check_codecs()
        except CodecError as error:
            raise PacketError("shapes", str(error)) from error
        return layer

    def _codec(self, index: int) -> str:
        if index >= len(self.codecs):
            raise PacketError("codecs", f"row refers to codec {index} of {len(self.codecs)}")
        try:
            return str(codec(self.codecs[index]))
        except CodecError as error:
            raise PacketError("codecs", f"{error}; a newer kvtalk may know it") from error


def header_bytes(manifest: Manifest | dict[str, Any], layout: Layout) -> bytes:
    """The safetensors header with its length, padded to 8 bytes."""
    content = manifest if isinstance(manifest, dict) else manifest.model_dump(exclude_none=True)
    text = canonical(content)
    header: dict[str, Any] = {"__metadata__": {"kvtalk": text, "xxh3": checksum(text.encode())}}
    for name, (begin, end) in layout.section_ranges().items():
        header[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def checksum(data: bytes | memoryview) -> str:
    """XXH3-64 in hex."""
    return str(xxhash.xxh3_64_hexdigest(data))


def data_start(view: memoryview) -> int:
    """Where the header ends and the data begin.

    Raises:
        PacketError: truncated, or a header longer than is allowed.
    """
    if len(view) < 8:
        raise PacketError("size", f"truncated: {len(view)} bytes")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise PacketError("header", f"declares {length} bytes, at most {MAX_HEADER_BYTES} are allowed: not a packet")
    if len(view) < 8 + length:
        raise PacketError("size", f"truncated: the header alone takes {length} bytes")
    return 8 + length


def read_manifest(content: bytes) -> Manifest:
    """The manifest in a header.

    Raises:
        PacketError: not a packet, an unknown version, damaged, or against the schema.
    """
    try:
        metadata = json.loads(content)["__metadata__"]
        text, declared = metadata["kvtalk"], metadata["xxh3"]
        version, actual = json.loads(text)["v"], checksum(text.encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PacketError("header", "not a kvtalk packet") from error
    if version != VERSION:
        raise PacketError("v", f"version {version!r} is unknown, this kvtalk reads version {VERSION}: upgrade kvtalk")
    if actual != declared:
        raise PacketError("manifest", "checksum does not match: the packet was damaged")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "manifest"
        raise PacketError(field, first["msg"]) from error


def verify(data: memoryview, manifest: Manifest, layout: Layout) -> None:
    """Compare every section with its checksum.

    Raises:
        PacketError: the first section that was damaged.
    """
    for (name, (begin, end)), declared in zip(layout.section_ranges().items(), manifest.sums, strict=True):
        if checksum(data[begin:end]) != declared:
            raise PacketError(name, "checksum does not match: the packet was damaged")
