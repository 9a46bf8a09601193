"""The fuser of Cache-to-Cache (C2C, arXiv 2510.03215): the receiver's cache, enriched by the sharer's, token by token.

For keys and for values of every receiver layer (a *slot* each) a small network reads the aligned sharer token and the
receiver's own one, and adds to the latter: ``K' = K + gate · weight · P``. The gate is one switch a slot, the weight
one number a token and KV head, ``P`` the projected vector. All slots are computed at once, as stacked matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtalk.alignment.tokens import STRATEGIES
from kvtalk.errors import AdapterError
from kvtalk.spec import ModelSpec

_EPSILON = 1e-6
_OPEN = 1.0
"""The logit of a gate before training. The projection begins at zero, so an open gate changes nothing yet."""
_FASTER = 20.0
"""A gate's learning rate over that of the matrices: it has far to go."""
_LARGEST = {"layers": 1024, "kv_heads": 1024, "head_dim": 4096, "blocks": 256, "width": 1 << 16}
"""What a card may claim at most; ``width`` is for the three widths of a slot's network."""


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise AdapterError(f"{name} {value!r:.60}: must be a whole number from {least} to {most:,}")


@dataclass(frozen=True)
class Shape:
    """A model's cache, of layers that are all alike.

    Attributes:
        layers: how many.
        kv_heads: of a layer.
        head_dim: channels of a head.
    """

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Shape:
        """Of a model.

        Raises:
            AdapterError: its layers differ in size.
        """
        sizes = {(layer.kv_heads, layer.head_dim) for layer in spec.layers}
        if len(sizes) > 1:
            raise AdapterError(f"{spec.fingerprint.arch}: layers of different sizes cannot be fused")
        return cls(len(spec.layers), *sizes.pop())

    def check(self, role: str) -> None:
        """Refuse sizes that cannot be.

        Args:
            role: whose they are.

        Raises:
            AdapterError: says which.
        """
        for name, value in vars(self).items():
            _check_whole(f"{role} {name}", value, 1, _LARGEST[name])

    @property
    def width(self) -> int:
        """Numbers of a token's keys, or values, in a layer."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class FuserGeometry:
    """Sizes and parts of a fuser.

    Attributes:
        sharer: its cache.
        receiver: its cache.
        layers: for each receiver layer the sharer layer that it is given.
        hidden: width of every slot's network; 1,024 in the paper.
        middle: width inside its residual blocks; 1,024 in the paper.
        weighing: the same in the branch of the weights; ``hidden`` in the paper.
        blocks: residual blocks in the branch of the projection.
        projects: C2C-C: a three-layer MLP makes a vector of the receiver's size of the sharer's, before both meet.
        residual: False for the ablation that puts the projection in the place of the receiver's own.
        gated: False for no gates.
        weighted: False for no weights.
        rope: keys ``before`` their rotary embedding (un-rotated) or ``after`` it, as in the paper.
        alignment: which sharer token a receiver token is given, see :data:`kvtalk.alignment.tokens.STRATEGIES`.
        roles: whether the words after the shared text, which are each model's own (the end of a chat template, say),
            are aligned too, from the last one on.
        last: whether the prompt's last token is enriched, too.
    """

    sharer: Shape
    receiver: Shape
    layers: tuple[int, ...]
    hidden: int = 320
    middle: int = 320
    weighing: int = 64
    blocks: int = 1
    projects: bool = False
    residual: bool = True
    gated: bool = True
    weighted: bool = True
    rope: Literal["before", "after"] = "before"
    alignment: str = "coverage"
    roles: bool = True
    last: bool = True

    @property
    def slots(self) -> int:
        """Keys and values of every receiver layer; slot 2·l holds the keys of layer l, 2·l + 1 its values."""
        return 2 * self.receiver.layers

    @classmethod
    def of(cls, content: dict[str, Any]) -> FuserGeometry:
        """From a card's JSON.

        Raises:
            AdapterError: sizes that cannot be, or some missing, as in a card of an earlier version.
            TypeError: a part that is no object or list, or one that is not known.
        """
        missing = [one.name for one in dataclass_fields(cls) if one.name not in content]
        if missing:
            raise AdapterError(f"{missing[0]!r} is missing, as in an earlier version's: train or import it again")
        fields = dict(content)
        sharer, receiver = (Shape(**fields.pop(name)) for name in ("sharer", "receiver"))
        geometry = cls(sharer, receiver, tuple(fields.pop("layers")), **fields)
        geometry.check()
        return geometry

    def check(self) -> None:
        """Refuse sizes that cannot be, before anything of them is made.

        Raises:
            AdapterError: says which.
        """
        self.sharer.check("sharer")
        self.receiver.check("receiver")
        for name in ("hidden", "middle", "weighing"):
            _check_whole(name, getattr(self, name), 1, _LARGEST["width"])
        _check_whole("blocks", self.blocks, 0, _LARGEST["blocks"])
        if len(self.layers) != self.receiver.layers:
            raise AdapterError(f"{len(self.layers)} layers are mapped, the receiver has {self.receiver.layers}")
        for layer in self.layers:
            _check_whole("mapped layer", layer, 0, self.sharer.layers - 1)
        for name in ("projects", "residual", "gated", "weighted", "roles", "last"):
            if type(getattr(self, name)) is not bool:
                raise AdapterError(f"{name} {getattr(self, name)!r:.60}: must be true or false")
        for name, known in (("rope", ("before", "after")), ("alignment", STRATEGIES)):
            if getattr(self, name) not in known:
                raise AdapterError(f"{name} {getattr(self, name)!r:.60}: must be one of {', '.join(known)}")


class Stacked(nn.Module):
    """A linear layer of every slot: ``[slots, tokens, inputs]`` to ``[slots, tokens, outputs]``."""

    def __init__(self, slots: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(slots, inputs, outputs))
        self.weight.stacked = True  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.zeros(slots, 1, outputs)) if bias else None
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def scale(self, by: Tensor) -> None:
        """Multiply inputs, ``[slots, inputs, 1]``, or outputs, ``[slots, 1, outputs]``, by something."""
        self.weight.data = (self.weight.float() * by.float()).to(self.weight.dtype)
        if self.bias is not None and by.shape[1] == 1:
            self.bias.data = self.bias.data * by

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply, in the type of the matrices."""
        inputs = inputs if torch.is_autocast_enabled(inputs.device.type) else inputs.to(self.weight.dtype)
        if self.bias is None:
            return torch.bmm(inputs, self.weight)
        return torch.baddbmm(self.bias.to(self.weight.dtype), inputs, self.weight)


class Block(nn.Module):
    """Residual block of every slot: RMSNorm, a matrix, GELU, a matrix.

    Attributes:
        norm: gains, ``[slots, 1, hidden]``; None where they are in the first matrix.
    """

    norm: nn.Parameter | None

    def __init__(self, slots: int, hidden: int, middle: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(slots, 1, hidden))
        self.up, self.down = Stacked(slots, hidden, middle, bias=False), Stacked(slots, middle, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[slots, tokens, hidden]`` to the same."""
        normal = F.rms_norm(hidden, hidden.shape[-1:], eps=_EPSILON)
        if self.norm is not None:
            normal = normal * self.norm.to(hidden.dtype)
        return hidden + torch.as_tensor(self.down(F.gelu(self.up(normal))))


class Fuser(nn.Module):
    """What the sharer's cache adds to the receiver's.

    Attributes:
        geometry: sizes and parts.
        slots: numbers of the slots that it holds; all of them, but for what :meth:`opened` gives.
        temperature: of the gates while training; 0 for gates as at inference, with gradients passed straight through.
        folded: whether gains and scales are in the matrices beside them, see :meth:`fold`.
    """

    sharer_mean: Tensor
    sharer_scale: Tensor
    receiver_mean: Tensor
    receiver_scale: Tensor

    def __init__(self, geometry: FuserGeometry, slots: Sequence[int] | None = None) -> None:
        """An untrained one; it changes nothing.

        Args:
            geometry: sizes and parts.
            slots: those to hold; by default all.
        """
        super().__init__()
        self.geometry, self.temperature, self.folded = geometry, 1.0, False
        self.slots = tuple(range(geometry.slots) if slots is None else slots)
        count, theirs, ours = len(self.slots), geometry.sharer.width, geometry.receiver.width
        for name, width in (("sharer", theirs), ("receiver", ours)):
            self.register_buffer(f"{name}_mean", torch.zeros(count, 1, width))
            self.register_buffer(f"{name}_scale", torch.ones(count, 1, width))
        hidden = geometry.hidden
        if geometry.projects:
            layers = [Stacked(count, theirs, hidden), Stacked(count, hidden, hidden), Stacked(count, hidden, ours)]
            self.into = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
            theirs = ours
        self.inward = Stacked(count, theirs + ours, hidden)
        self.shared = Block(count, hidden, geometry.middle)
        self.projection = nn.Sequential(*(Block(count, hidden, geometry.middle) for _ in range(geometry.blocks)))
        self.outward = Stacked(count, hidden, ours)
        nn.init.zeros_(self.outward.weight)
        if geometry.weighted:
            self.weighing = Block(count, hidden, geometry.weighing)
            self.weights = Stacked(count, hidden, geometry.receiver.kv_heads)
        if geometry.gated and geometry.residual:
            self.gates = nn.Parameter(torch.full((count,), _OPEN))
            self.gates.faster = _FASTER  # type: ignore[attr-defined]

    def forward(self, sharer: Tensor, receiver: Tensor) -> Tensor:
        """What is to be added to the receiver's keys and values.

        Args:
            sharer: of the aligned tokens, keys or values of the layer that each slot is given,
                ``[slots, tokens, sharer.width]``, all heads one after the other.
            receiver: its own, ``[slots, tokens, receiver.width]``.

        Returns:
            ``[slots, tokens, receiver.width]``, float32; zeros from closed gates.
        """
        geometry = self.geometry
        ours = (receiver - self.receiver_mean) / self.receiver_scale
        theirs = (sharer - self.sharer_mean) / self.sharer_scale
        if geometry.projects:
            theirs = self.into(theirs)
        exact = self.inward.weight.dtype  # cast before they are joined: half as much to copy
        hidden = self.shared(self.inward(torch.cat([theirs.to(exact), ours.to(exact)], dim=2)))
        added = self.outward(self.projection(hidden))
        if geometry.weighted:
            weights = self.weights(self.weighing(hidden)).float().sigmoid()
            added = (added.unflatten(2, (geometry.receiver.kv_heads, -1)) * weights[..., None]).flatten(2)
        if not self.folded:
            added = added * self.receiver_scale
        if not geometry.residual:
            return torch.as_tensor(added + self.receiver_mean - receiver)
        return torch.as_tensor(added * self._openings(added) if geometry.gated else added)

    @property
    def is_open(self) -> Tensor:
        """Which of the slots' gates are open at inference, bool ``[slots]``."""
        if not hasattr(self, "gates"):
            return torch.ones(len(self.slots), dtype=torch.bool)
        return self.gates.detach().cpu() > 0

    def opened(self) -> Fuser:
        """The same without the slots whose gates are closed, and without gates."""
        fuser = self.of_slots(self.is_open.nonzero()[:, 0].tolist())
        if hasattr(fuser, "gates"):
            fuser.geometry = replace(fuser.geometry, gated=False)
            del fuser.gates
        return fuser

    def of_slots(self, which: Sequence[int]) -> Fuser:
        """The same with some of its slots, by their place in :attr:`slots`; those of a range share its memory."""
        fuser = Fuser(self.geometry, [self.slots[index] for index in which])
        fuser._drop_gains(self.folded)
        rows = slice(which.start, which.stop, which.step) if isinstance(which, range) else list(which)
        fuser.load_state_dict({name: tensor[rows] for name, tensor in self.state_dict().items()}, assign=True)
        return fuser.train(self.training)

    def split(self, slots: int) -> list[Fuser]:
        """So many slots each, in their order."""
        if slots >= len(self.slots):
            return [self]
        starts = range(0, len(self.slots), slots)
        return [self.of_slots(range(start, min(start + slots, len(self.slots)))) for start in starts]

    @torch.no_grad()
    def fold(self) -> Fuser:
        """Itself, for use alone: norms' gains and the scale of what is added are multiplied into the matrices beside
        them, and biases have these matrices' type, once and not in every call."""
        if self.folded:
            return self
        for block in self._blocks():
            if block.norm is not None:
                block.up.scale(block.norm.transpose(1, 2))
        self.outward.scale(self.receiver_scale)
        self._drop_gains(True)
        for module in self.modules():
            if isinstance(module, Stacked) and module.bias is not None:
                module.bias.data = module.bias.data.to(module.weight.dtype)
        return self

    def _blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def _drop_gains(self, folded: bool) -> None:
        self.folded = folded
        for block in self._blocks():
            block.norm = None if folded else block.norm

    @property
    def sharer_layers(self) -> list[int]:
        """The sharer's layers that its slots read."""
        return sorted({self.geometry.layers[slot // 2] for slot in self.slots})

    @torch.no_grad()
    def standardise(self, sharer: Tensor, receiver: Tensor) -> None:
        """Take means and deviations from examples, shaped as for :meth:`forward`."""
        for name, values in (("sharer", sharer), ("receiver", receiver)):
            deviation, mean = torch.std_mean(values.float(), dim=1, keepdim=True)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_scale").copy_(deviation.clamp(min=1e-4))

    def _openings(self, added: Tensor) -> Tensor:
        """Of each slot, or while training of each slot, token and head; ``[slots, tokens or 1, width or 1]``."""
        logits = self.gates[:, None, None]
        hard = (logits > 0).float()
        if not self.training:
            return hard
        if self.temperature == 0:
            soft = logits.sigmoid()
            return hard + soft - soft.detach()
        heads = self.geometry.receiver.kv_heads
        drawn = torch.rand(len(self.slots), added.shape[1], heads, device=added.device).clamp(1e-6, 1 - 1e-6)
        gates = ((logits + drawn.logit()) / self.temperature).sigmoid()
        return gates.repeat_interleave(self.geometry.receiver.head_dim, dim=2)


def narrowed(geometry: FuserGeometry, parameters: int) -> FuserGeometry:
    """The geometry with the widest network, a multiple of 64, that has at most so many parameters."""
    for hidden in range(1024, 64, -64):
        candidate = replace(geometry, hidden=hidden, middle=hidden)
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in Fuser(candidate).parameters()) <= parameters:
                return candidate
    return replace(geometry, hidden=64, middle=64)
