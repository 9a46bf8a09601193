"""An adapter's weights: one safetensors file a part, matrices in bf16 or in 4 bits by kvtalk's own codecs.

Before anything of a claimed size is allocated, a file's checksum and header are compared with the card.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kvtalk.adapters.cards import CARD, PREDICTOR, Card
from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.translator import Decoder, Encoder, Geometry
from kvtalk.codecs import codec
from kvtalk.codecs.registry import CODECS
from kvtalk.errors import AdapterError, CodecError

Part = TypeVar("Part", bound=nn.Module)
Sizes = TypeVar("Sizes")
_LEAST = 16
"""Rows and columns of what counts as a matrix."""
_PACKED = ".codes", ".scales", ".shape"
_CODEC = ".codec:"
_FLOATS = "F32", "BF16", "F16"


def load_encoder(card: Card, folder: Path) -> Encoder:
    """The sharer's half.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, Geometry)
    return _filled(Encoder, card.geometry, card, folder, "encoder")


def load_decoder(card: Card, folder: Path) -> Decoder:
    """The receiver's half.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, Geometry)
    return _filled(Decoder, card.geometry, card, folder, "decoder")


def load_fuser(card: Card, folder: Path) -> Fuser:
    """All of a fuser.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, FuserGeometry)
    return _filled(Fuser, card.geometry, card, folder, "fuser")


def load_predictor(card: Card, folder: Path) -> Predictor | None:
    """A fuser's predictor; None where none was fitted.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, FuserGeometry)
    return _filled(Predictor, card.geometry, card, folder, PREDICTOR) if PREDICTOR in card.parts else None


def open_slots(card: Card, folder: Path) -> tuple[int, ...]:
    """Numbers of a fuser's slots whose gates are open, all of them where it has none; nothing else is loaded.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, FuserGeometry)
    with _stored(_meta(Fuser, card.geometry), card, folder, "fuser") as stored:
        if not card.geometry.gated:
            return tuple(range(card.geometry.slots))
        gates = stored.tensor("gates")
    return tuple((gates > 0).nonzero()[:, 0].tolist())


def is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a tensor of an adapter is one, or several, and so may be stored in few bits."""
    return tensor.dim() > 1 and min(tensor.shape[-2:]) >= _LEAST


def packed(part: nn.Module, packing: str | None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in part.state_dict().items():
        matrix = tensor.detach().float().cpu()
        if not is_matrix(tensor):
            tensors[name] = matrix
        elif packing is None:
            tensors[name] = matrix.bfloat16()
        else:
            codes, scales = codec(packing).encode(matrix.reshape(1, -1, matrix.shape[-1]))
            parts = codes, scales, torch.tensor(matrix.shape)
            tensors.update({name + suffix: part.contiguous() for suffix, part in zip(_PACKED, parts, strict=True)})
            tensors[f"{name}.codec:{packing}"] = torch.empty(0)
    return tensors


@dataclass(frozen=True)
class _Stored:
    """An open file of weights, whose names, types and sizes are those of a module.

    Attributes:
        file: its path.
        reader: of safetensors.
        packings: codec of each tensor that is packed.
        shapes: of the module's tensors.
    """

    file: Path
    reader: Any
    packings: dict[str, str]
    shapes: dict[str, torch.Size]

    def check(self) -> None:
        """Compare the file's header with the module; no weights are read.

        Raises:
            AdapterError: says what differs.
        """
        wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            if name in self.packings:
                wanted |= self._packed(name, shape)
            else:
                wanted[name] = _FLOATS, tuple(shape)
        different = sorted(wanted.keys() ^ set(self.reader.keys()))
        for name, (types, sizes) in wanted.items():
            if not different:
                part = self.reader.get_slice(name)
                if part.get_dtype() not in types or tuple(part.get_shape()) != sizes:
                    different = [name]
        for name in self.packings:
            if not different and self.reader.get_tensor(f"{name}.shape").tolist() != list(self.shapes[name]):
                different = [f"{name}.shape"]
        if different:
            raise AdapterError(
                f"{self.file}: its weights do not have the sizes that {CARD} names ({different[0][:80]!r})"
            )

    def tensor(self, name: str) -> Tensor:
        """One of the module's, float32."""
        if name not in self.packings:
            return torch.as_tensor(self.reader.get_tensor(name)).to(torch.float32, copy=True)
        codes, scales = (self.reader.get_tensor(name + suffix).clone() for suffix in _PACKED[:2])
        shape = self.shapes[name]
        out = torch.empty(1, prod(shape[:-1]), shape[-1])
        codec(self.packings[name]).decode(codes, scales, out)
        return out.view(shape)

    def _packed(self, name: str, shape: torch.Size) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Types and sizes of what stands for a packed tensor."""
        packing = self.packings[name]
        if len(shape) < 2 or packing.partition(":")[0] not in CODECS:
            raise CodecError(f"{name[:80]} cannot be packed by {packing[:80]!r}")
        rows, columns, way = prod(shape[:-1]), shape[-1], codec(packing)
        parts = (1, rows, columns * way.bits // 8), (way.scales_size(1, rows, columns),), (len(shape),)
        types = ("U8",), ("U8",), ("I64",)
        found = {name + suffix: both for suffix, both in zip(_PACKED, zip(types, parts, strict=True), strict=True)}
        return {**found, name + _CODEC + packing: (_FLOATS, (0,))}


def checked(card: Card, folder: Path, name: str) -> Path:
    """The file of a part, once its checksum is what the card says.

    Raises:
        AdapterError: missing or damaged.
    """
    file = folder / f"{name}.safetensors"
    try:
        with file.open("rb") as stream:
            checksum = hashlib.file_digest(stream, xxhash.xxh3_64).hexdigest()
    except OSError as error:
        raise AdapterError(f"{file}: missing") from error
    if checksum != card.weights.get(name):
        raise AdapterError(f"{file}: damaged or of another adapter, its checksum is not the card's")
    return file


@contextmanager
def _stored(part: nn.Module, card: Card, folder: Path, name: str) -> Iterator[_Stored]:
    """The file of a part, once its checksum and its header are what the card says.

    Args:
        part: on the meta device.
        card: of the adapter.
        folder: of the adapter.
        name: of the part.

    Raises:
        AdapterError: missing or damaged, also when found only while reading.
    """
    file = checked(card, folder, name)
    shapes = {key: tensor.shape for key, tensor in part.state_dict().items()}
    try:
        with safe_open(file, "pt") as reader:
            names: list[str] = reader.keys()
            packings = dict(name.split(_CODEC, 1) for name in names if _CODEC in name)
            stored = _Stored(file, reader, packings, shapes)
            stored.check()
            yield stored
    except (OSError, SafetensorError, CodecError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{file}: damaged ({' '.join(str(error).split())[:120]})") from error


def _meta(kind: Callable[[Sizes], Part], geometry: Sizes) -> Part:
    """A part of an adapter without memory for its weights.

    Raises:
        AdapterError: sizes that no memory could hold.
    """
    try:
        with torch.device("meta"):
            return kind(geometry)
    except (RuntimeError, OverflowError) as error:
        raise AdapterError(f"{CARD}: sizes that cannot be ({' '.join(str(error).split())[:120]})") from error


def _filled(kind: Callable[[Sizes], Part], geometry: Sizes, card: Card, folder: Path, name: str) -> Part:
    part = _meta(kind, geometry)
    with _stored(part, card, folder, name) as stored:
        state = {key: stored.tensor(key) for key in stored.shapes}
    for key, parameter in part.named_parameters():
        state[key] = nn.Parameter(state[key], parameter.requires_grad)
        vars(state[key]).update(vars(parameter))  # what training marks it with
    part.load_state_dict(state, assign=True)
    return part
