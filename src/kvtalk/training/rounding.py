"""Training with matrices as an adapter's file will hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from kvtalk.adapters.store import is_matrix
from kvtalk.codecs import codec


@contextmanager
def rounded(module: nn.Module, packing: str | None) -> Iterator[None]:
    """While active, matrices are as a codec gives them back; gradients that arrive meanwhile move the exact ones.

    Args:
        module: what is trained.
        packing: name of the codec; None leaves everything as it is.
    """
    matrices = [parameter for parameter in module.parameters() if is_matrix(parameter)] if packing else []
    exact = [(parameter, parameter.data) for parameter in matrices]
    for parameter, data in exact:
        parameter.data = codec(str(packing)).simulated(data.reshape(1, -1, data.shape[-1])).view_as(data)
    try:
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data
