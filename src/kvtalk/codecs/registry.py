"""Codecs by name."""

from __future__ import annotations

from functools import lru_cache

from kvtalk.codecs.base import Blocks, Codec
from kvtalk.codecs.integer import Int2, Int4, Int8
from kvtalk.codecs.nf4 import NF4
from kvtalk.codecs.plain import BF16, FP16, FP32, Nothing
from kvtalk.errors import CodecError

CODECS: dict[str, type[Codec]] = {family.family: family for family in (FP32, BF16, FP16, Int8, Int4, Int2, NF4)}

NOTHING = Nothing.family
"""Name of the codec of what is not sent."""

ALIASES = {"token": Blocks(1, 0), "channel": Blocks(64, 1)}
"""``token``: one scale a head and token. ``channel``: one a head and channel, for every 64 tokens."""


@lru_cache(maxsize=256)
def codec(text: str) -> Codec:
    """A codec by name, such as ``bf16``, ``int8``, ``int4:channel``, ``int4:32x1`` or ``nf4:1x32``.

    What follows the colon is the block that shares a scale: ``token``, ``channel``, or tokens × channels with ``*``
    for all. Without it: ``token``.

    Raises:
        CodecError: no such codec or block.
    """
    if text == NOTHING:
        return Nothing()
    family, _, block = text.strip().partition(":")
    if family not in CODECS:
        raise CodecError(f"no codec {family!r}; there are {', '.join(CODECS)}")
    if not block:
        return CODECS[family]()
    return CODECS[family](ALIASES.get(block) or _blocks(text, block))


def short_name(name: str) -> str:
    """A codec's name with ``token`` and ``channel`` for the blocks that they stand for."""
    family, _, block = str(codec(name)).partition(":")
    alias = next((alias for alias, blocks in ALIASES.items() if str(blocks) == block), block)
    return f"{family}:{alias}" if alias else family


def _blocks(text: str, block: str) -> Blocks:
    sizes = [0 if part == "*" else int(part) if part.isdecimal() and len(part) < 7 else -1 for part in block.split("x")]
    if len(sizes) != 2 or min(sizes) < 0 or "0" in block.split("x"):
        raise CodecError(f"codec {text!r}: {block!r} is no block; use token, channel, or tokens x channels like 64x1")
    return Blocks(*sizes)
