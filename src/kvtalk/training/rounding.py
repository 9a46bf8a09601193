"""Training with matrices as an adapter's file will hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from kvtalk.adapters.weights import is_matrix
from kvtalk.codecs import codec


@contextmanager
def rounded(module: nn.Module, packing: str | None) -> Iterator[None]:
    """While active, matrices are as a codec gives them back; gradients that arrive meanwhile move the exact ones.

    Frozen ones are left alone: they are as a file holds them.

    Args:
        module: what is trained.
        packing: name of the codec; None leaves everything as it is.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad] if packing else []
    exact = [(parameter, parameter.data) for parameter in trained if is_matrix(parameter)]
    for parameter, data in exact:
        parameter.data = codec(str(packing)).simulated(data.reshape(1, -1, data.shape[-1])).view_as(data)
    try:
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data
