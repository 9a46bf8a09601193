"""Which sharer layer stands for which receiver layer (both strategies: C2C, arXiv 2510.03215)."""

from __future__ import annotations

from kvtalk.errors import AlignmentError

LAYER_STRATEGIES = ("terminal", "normalised")
"""terminal: the last stands for the last, the one before for the one before, and so on; where the sharer has fewer, its
first layer stands for all that are left. normalised: the nearest in depth, from the first layer at 0 to the last at 1;
of two equally near the one nearer the input."""


def layer_map(sharer_layers: int, receiver_layers: int, strategy: str) -> tuple[int, ...]:
    """The sharer layer that stands for each receiver layer.

    Args:
        sharer_layers: how many the sharer has.
        receiver_layers: how many the receiver has.
        strategy: see :data:`LAYER_STRATEGIES`.

    Returns:
        sharer layer indices, ``[receiver layers]``, never decreasing.

    Raises:
        AlignmentError: an unknown strategy, or a model of no layers.
    """
    if sharer_layers < 1 or receiver_layers < 1:
        raise AlignmentError(
            f"{sharer_layers} sharer layers and {receiver_layers} receiver layers: both need at least 1"
        )
    if strategy == "terminal":
        return tuple(max(0, layer + sharer_layers - receiver_layers) for layer in range(receiver_layers))
    if strategy == "normalised":
        return tuple(_nearest(layer, sharer_layers, receiver_layers) for layer in range(receiver_layers))
    raise AlignmentError(f"no layer strategy {strategy!r}; there are {', '.join(LAYER_STRATEGIES)}")


def _nearest(layer: int, sharer_layers: int, receiver_layers: int) -> int:
    """``layer / (receiver_layers - 1) * (sharer_layers - 1)``, rounded with halves down; a single layer is the first.

    In whole numbers: floating point would decide ties by accident.
    """
    steps = max(1, receiver_layers - 1)
    return (2 * layer * (sharer_layers - 1) + steps - 1) // (2 * steps)
