"""How keys and values are packed into bytes: one file a family, one registry."""

from kvtalk.codecs.base import Blocks, Codec
from kvtalk.codecs.registry import CODECS, NOTHING, codec, short_name

__all__ = ["CODECS", "NOTHING", "Blocks", "Codec", "codec", "short_name"]
