"""Rotary position embedding: rotate, un-rotate and move keys.

A key at position ``p`` is ``R(p·θ)·k``. Rotations about the same axes add up, so a key is un-rotated by rotating
it by ``−p`` and moved from ``p`` to ``q`` by rotating it by ``q − p``. All of this is done in float32: in bf16 the
angle of a late position would lose its low bits. (RoFormer, arXiv 2104.09864; layout of `transformers`: channel
``i`` pairs with channel ``i + rotary_dim / 2``, channels from ``rotary_dim`` on are not rotated.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtalk.device import sent

_CHUNK_VALUES = {"cpu": 1 << 16}
"""Values to work on at a time: few enough for a processor's cache; elsewhere everything at once."""


@dataclass(frozen=True)
class Rope:
    """The rotary frequencies of a layer.

    Attributes:
        frequencies: radians per position of each rotated channel pair, ``rotary_dim / 2`` of them.
    """

    frequencies: tuple[float, ...]

    @property
    def rotary_dim(self) -> int:
        """How many of the head's first channels are rotated."""
        return 2 * len(self.frequencies)

    def angles(self, positions: Tensor) -> Angles:
        """The rotation for each position.

        Args:
            positions: ``[batch, tokens]`` or ``[tokens]`` integers; negative ones rotate backwards.

        Returns:
            cosines and sines, ``[batch, 1, tokens, rotary_dim / 2]`` in float32, on the device of ``positions``.
        """
        frequencies = sent(torch.tensor(self.frequencies, dtype=torch.float32), positions.device)
        if positions.dim() == 1:
            positions = positions[None]
        radians = positions[:, None, :, None].to(torch.float32) * frequencies
        return Angles(radians.cos(), radians.sin())


@dataclass(frozen=True)
class Angles:
    """Cosines and sines, ``[batch, 1, tokens, rotary_dim / 2]``, float32."""

    cos: Tensor
    sin: Tensor

    def inverse(self) -> Angles:
        """The rotation that undoes this one."""
        return Angles(self.cos, -self.sin)


def rotate(keys: Tensor, angles: Angles, out: Tensor | None = None) -> Tensor:
    """Rotate keys by the given angles.

    Args:
        keys: ``[batch, kv_heads, tokens, head_dim]``, any floating type.
        angles: as made by :meth:`Rope.angles` for the same batch and tokens, or for one token for all.
        out: where to write the result, of the same shape; may be ``keys`` itself.

    Returns:
        the rotated keys in the type of ``out`` (by default that of ``keys``), computed in float32.
    """
    half, tokens = angles.cos.shape[-1], keys.shape[2]
    if keys.requires_grad:  # nothing is written in place that a gradient has to pass
        first, second = (part.float() for part in (keys[..., :half], keys[..., half : 2 * half]))
        turned = first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin
        return torch.cat([*(part.to(keys.dtype) for part in turned), keys[..., 2 * half :]], dim=-1)
    out = torch.empty_like(keys) if out is None else out
    if 2 * half < keys.shape[-1]:
        out[..., 2 * half :] = keys[..., 2 * half :]
    step = max(1, _CHUNK_VALUES.get(keys.device.type, keys.numel()) // (keys.numel() // max(tokens, 1) or 1))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        cos, sin = (x if x.shape[2] == 1 else x[:, :, part] for x in (angles.cos, angles.sin))
        first, second = keys[:, :, part, :half], keys[:, :, part, half : 2 * half]
        along, across = first * cos, first * sin  # float32, and all that is needed of what may be written over now
        torch.addcmul(along, second, sin, value=-1, out=out[:, :, part, :half])
        torch.addcmul(across, second, cos, out=out[:, :, part, half : 2 * half])
    return out


def rotate_layers(
    keys: Sequence[Tensor], ropes: Sequence[Rope | None], positions: Tensor, inverse: bool = False
) -> list[Tensor]:
    """Rotate the keys of several layers, those of one shape with the same frequencies in one go.

    Args:
        keys: of each layer, ``[batch, kv_heads, tokens, head_dim]``.
        ropes: of each layer; None leaves it as it is.
        positions: ``[tokens]``, the same for all rows, or ``[batch, tokens]``, on the device of the keys.
        inverse: take the rotation off.
    """
    groups: dict[tuple[Rope, torch.Size], list[int]] = {}
    for index, (layer, rope) in enumerate(zip(keys, ropes, strict=True)):
        if rope is not None:
            groups.setdefault((rope, layer.shape), []).append(index)
    turned = list(keys)
    for (rope, _), which in groups.items():
        angles = rope.angles(positions)
        joined = torch.cat([keys[index] for index in which], dim=1)
        parts = rotate(joined, angles.inverse() if inverse else angles).chunk(len(which), dim=1)
        for index, part in zip(which, parts, strict=True):
            turned[index] = part
    return turned


class StackRope:
    """Rotates a stack of layers in as many operations whatever their number: on a GPU each is a launch.

    What does not depend on positions is made once, and angles once for all stacks of the same positions.
    """

    def __init__(self, ropes: Sequence[Rope | None], device: torch.device | str) -> None:
        """Make the tables.

        Args:
            ropes: of each layer; None leaves it as it is.
            device: of the stacks.
        """
        self._groups: list[tuple[slice | Tensor, Tensor, Tensor | None]] = []
        for size in sorted({rope.rotary_dim for rope in ropes if rope is not None}):
            some = [(index, rope) for index, rope in enumerate(ropes) if rope is not None and rope.rotary_dim == size]
            kinds = list(dict.fromkeys(rope for _, rope in some))
            table = torch.tensor([rope.frequencies for rope in kinds])[:, None, None]
            kind = torch.tensor([kinds.index(rope) for _, rope in some]) if len(kinds) > 1 else None
            layers = _places([index for index, _ in some], device)
            self._groups.append((layers, table.to(device), None if kind is None else kind.to(device)))

    def angles(self, positions: Tensor) -> list[Angles]:
        """The rotation for each position, of layers of each rotary size.

        Args:
            positions: ``[tokens]``, the same for all layers, on the device of the stacks.
        """
        steps, found = positions[:, None].to(torch.float32), []
        for _, table, kind in self._groups:
            radians = steps * table
            both = radians.cos(), radians.sin()
            found.append(Angles(*(both if kind is None else (one.index_select(0, kind) for one in both))))
        return found

    def rotate_(self, stack: Tensor, angles: Sequence[Angles], inverse: bool = False) -> None:
        """Rotate in place; gradients flow through.

        Args:
            stack: ``[layers, kv_heads, tokens, head_dim]``.
            angles: as made by :meth:`angles`.
            inverse: take the rotation off.
        """
        for (layers, _, _), one in zip(self._groups, angles, strict=True):
            keys, turn = stack[layers], one.inverse() if inverse else one
            if keys.requires_grad or not isinstance(layers, slice):
                stack[layers] = rotate(keys, turn)
            else:
                rotate(keys, turn, out=keys)


def _places(which: Sequence[int], device: torch.device | str) -> slice | Tensor:
    """Indices as a slice, which takes a view, where they are evenly spaced."""
    step = which[1] - which[0] if len(which) > 1 else 1
    every = slice(which[0], which[-1] + 1, step)
    return every if list(range(every.stop)[every]) == list(which) else torch.tensor(which, device=device)


class AngleTable:
    """Angles computed once for all layers that share frequencies and positions."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._known: dict[tuple[Rope, bytes], Angles] = {}

    def angles(self, rope: Rope, positions: Tensor) -> Angles:
        """As :meth:`Rope.angles`, for positions that lie on the CPU."""
        key = (rope, repr(tuple(positions.shape)).encode() + positions.contiguous().numpy().tobytes())
        if key not in self._known:
            self._known[key] = rope.angles(positions.to(self.device))
        return self._known[key]
