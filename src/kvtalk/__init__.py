"""kvtalk: one LLM hands what it has read to another as a KV cache, under a byte budget."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LM", "Answer", "Budget", "Link", "Plan", "Receiver", "Sharer", "__version__"]

_HOMES = {
    "LM": "kvtalk.models",
    "Answer": "kvtalk.link",
    "Budget": "kvtalk.planning",
    "Link": "kvtalk.link",
    "Plan": "kvtalk.planning",
    "Receiver": "kvtalk.link",
    "Sharer": "kvtalk.link",
}

if TYPE_CHECKING:
    from kvtalk.link import Answer, Link, Receiver, Sharer
    from kvtalk.models import LM
    from kvtalk.planning import Budget, Plan


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``kvtalk --help`` does not wait for torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvtalk' has no attribute {name!r}")
