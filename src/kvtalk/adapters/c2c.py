"""Fusers trained by the published code of C2C (github.com/thu-nics/C2C, arXiv 2510.03215), read from its checkpoints.

A checkpoint folder holds ``projector_N.pt`` (weights) and ``projector_N.json`` (class and sizes) of each projector, and
``projector_config.json``: ``{receiver model: {sharer model: {receiver layer: [[sharer layer, N], ...]}}}``, of whose
pairs that code uses the first. How tokens are aligned says the ``config.json`` of the training run, beside it or one
folder up.

No pickled code is run, and nothing is made of the sizes that files claim before every file was compared with them: of a
``.pt`` file only the names and sizes of its tensors are unpickled, by a reader that knows nothing else.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtalk.adapters.cards import Card, Party
from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape
from kvtalk.adapters.store import save_adapter
from kvtalk.errors import AdapterError
from kvtalk.models import LM
from kvtalk.spec import ModelSpec

PROJECTOR = "C2CProjector"
KINDS = "key", "value"
LAYERS = "projector_config.json"
RECIPE = "config.json"
ALIGNMENTS = {"first": "first", "longest": "coverage"}
"""Our strategy for each of theirs. They decode each receiver token and encode it again by itself, and keep the first or
the longest piece; we never re-encode, so a token that the sharer cuts differently may be given another one."""

_CLOSED = -1.0
_LARGEST = 1 << 16
_OTHER_ARGUMENTS = {"dropout", "initial_temperature", "final_temperature", "anneal_steps", "dtype", "zero_init"}
"""What matters in training only."""
_TEMPERATURE = "gate_temperature"
_WIDEST = 8
"""Bytes of a number in a checkpoint at most."""
_OVERHEAD = 1 << 20
"""Bytes of a checkpoint's file beside the numbers at most, of which its pickle is a part."""
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
}


@dataclass(frozen=True)
class Sizes:
    """Arguments of their projector that give it its shape, with their defaults."""

    source_dim: int
    target_dim: int
    source_num_heads: int = 1
    target_num_heads: int = 1
    intermediate_dim: int = 1024
    hidden_dim: int = 1024
    num_layers: int = 3

    @property
    def blocks(self) -> int:
        """Of the branch of the projection; the other two of its ``num_layers`` are shared and for the weights."""
        return self.num_layers - 2


def import_c2c(folder: Path, sharer: LM, receiver: LM, out: Path) -> Card:
    """Make a fuser of a checkpoint folder, as exact as the checkpoint is.

    Args:
        folder: the checkpoint.
        sharer: the model that the checkpoint was trained with as teacher.
        receiver: as base.
        out: folder for the fuser.

    Raises:
        AdapterError: incomplete, damaged, of another class, or not for these models.
    """
    fuser, facts = load_c2c(folder, sharer.spec, receiver.spec)
    reads, answers = (Party(lm.name, lm.spec.fingerprint) for lm in (sharer, receiver))
    return save_adapter(fuser, reads, answers, out, None if facts["dtype"] == "bfloat16" else "fp32", facts)


def load_c2c(folder: Path, sharer: ModelSpec, receiver: ModelSpec) -> tuple[Fuser, dict[str, Any]]:
    """A checkpoint folder as a fuser, and where it comes from.

    Receiver layers that it does not map have closed gates.

    Raises:
        AdapterError: incomplete, damaged, of another class, or not for these models.
    """
    folder = _checkpoint(folder)
    mapped = _layer_map(folder / LAYERS, len(sharer.layers), len(receiver.layers))
    numbers = sorted({number for _, number in mapped.values()})
    first = folder / f"projector_{numbers[0]}.json"
    sizes = read_sizes(first)
    shapes = _shape(first, "sharer", sharer, sizes), _shape(first, "receiver", receiver, sizes)
    alignment, recipe = _recipe(folder)
    geometry = FuserGeometry(
        *shapes,
        layers=tuple(mapped.get(layer, (0, 0))[0] for layer in range(len(receiver.layers))),
        hidden=sizes.hidden_dim,
        middle=sizes.intermediate_dim,
        weighing=sizes.hidden_dim,
        blocks=sizes.blocks,
        rope="after",
        alignment=alignment,
        roles=False,
        last=False,
    )
    try:
        geometry.check()
    except AdapterError as error:
        raise AdapterError(f"{first}: {error}") from error
    with torch.device("meta"):
        fuser = Fuser(geometry)
    wanted = {kind: _wanted(fuser, kind, sizes) for kind in KINDS}
    for number in numbers:
        other = folder / f"projector_{number}.json"
        if read_sizes(other) != sizes:
            raise AdapterError(f"{other}: other sizes than {first.name}; kvtalk reads checkpoints of one size")
        with _projector(folder / f"projector_{number}.pt", wanted):
            pass  # all are compared before the first of them is read
    stacks = {name: torch.zeros(tensor.shape) for name, tensor in fuser.state_dict().items()}
    stacks["sharer_scale"].fill_(1)
    stacks["receiver_scale"].fill_(1)
    stacks["gates"].fill_(_CLOSED)
    dtypes = set()
    for number in numbers:
        layers = [layer for layer, (_, which) in mapped.items() if which == number]
        dtypes |= _fill(stacks, folder / f"projector_{number}.pt", wanted, layers)
    fuser.load_state_dict(stacks, assign=True)
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "mixed"
    facts = {"imported": "C2C", "projectors": len(numbers), "layers": len(mapped), "open": int(fuser.is_open.sum())}
    return fuser, {**facts, "dtype": dtype, **recipe}


def read_sizes(file: Path) -> Sizes:
    """What a ``projector_N.json`` says.

    Raises:
        AdapterError: missing, damaged, another class, or sizes that cannot be.
    """
    content = _json(file)
    name, arguments = content.get("class"), content.get("init_args")
    if name != PROJECTOR:
        raise AdapterError(f"{file}: of the class {name!r}; kvtalk reads {PROJECTOR}")
    if not isinstance(arguments, dict):
        raise AdapterError(f"{file}: no init_args")
    known = {field.name for field in fields(Sizes)}
    unknown = sorted(arguments.keys() - known - _OTHER_ARGUMENTS)
    if unknown:
        raise AdapterError(f"{file}: {PROJECTOR} with {', '.join(unknown)}, which this version does not know")
    for size, value in arguments.items():
        if size in known and (type(value) is not int or not 0 < value <= _LARGEST):
            raise AdapterError(f"{file}: {size} is {value!r}, not a whole number from 1 to {_LARGEST:,}")
    missing = sorted({"source_dim", "target_dim"} - arguments.keys())
    if missing:
        raise AdapterError(f"{file}: {missing[0]} is missing")
    sizes = Sizes(**{size: value for size, value in arguments.items() if size in known})
    if sizes.blocks < 1:
        raise AdapterError(f"{file}: num_layers is {sizes.num_layers}, at least 3 are needed")
    return sizes


def names(kind: str, blocks: int) -> dict[str, str]:
    """Each of our tensors by the name of theirs, for ``key`` or ``value``."""
    found = {f"{kind}_gate_logit": "gates"}
    for theirs, ours in (("in", "inward"), ("proj_out", "outward"), ("scalar_head", "weights")):
        found.update({f"{kind}_{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")})
    inner = {f"proj_mlp2.blocks.{number}": f"projection.{number}" for number in range(blocks)}
    for theirs, ours in {"mlp1.blocks.0": "shared", "scalar_mlp2.blocks.0": "weighing", **inner}.items():
        for part, own in (("norm.weight", "norm"), ("w1.weight", "up.weight"), ("w2.weight", "down.weight")):
            found[f"{kind}_{theirs}.{part}"] = f"{ours}.{own}"
    return found


Wanted = dict[str, tuple[str, tuple[int, ...]]]


def _wanted(fuser: Fuser, kind: str, sizes: Sizes) -> Wanted:
    """Name and size of our tensor's slice for a slot, turned as theirs, by the name of theirs."""
    shapes = {name: tuple(tensor.shape) for name, tensor in fuser.state_dict().items()}
    return {
        theirs: (ours, shapes[ours][1:][::-1] if ours.endswith("weight") else shapes[ours][2:])
        for theirs, ours in names(kind, sizes.blocks).items()
    }  # their Linear holds [outputs, inputs]


def _fill(stacks: dict[str, Tensor], file: Path, wanted: dict[str, Wanted], layers: list[int]) -> set[torch.dtype]:
    """Copy a projector to the slots of the layers that use it; the types that it is stored in."""
    dtypes = set()
    with _projector(file, wanted) as projector:
        for kind, name in enumerate(KINDS):
            for theirs, (ours, _) in wanted[name].items():
                tensor = projector.tensor(theirs)
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                    raise AdapterError(f"{file}: {theirs} holds what is no finite number")
                dtypes.add(tensor.dtype)
                for layer in layers:
                    stacks[ours][2 * layer + kind] = tensor.T if tensor.dim() == 2 else tensor
    return dtypes


@dataclass(frozen=True)
class _Record:
    """A file within the file."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _Slice:
    """Where a tensor lies."""

    record: _Record
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _State(dict[Any, Any]):
    """In the place of an ``OrderedDict``; holds what was set, copies nothing."""

    def __init__(self) -> None:
        super().__init__()


def _slice(record: _Record, offset: int, shape: Any, strides: Any, *_: object) -> _Slice:
    return _Slice(record, offset, shape, strides)


class _Unpickler(pickle.Unpickler):
    """Reads where the tensors of a state dict lie; knows nothing that could be run."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            "collections.OrderedDict": _State,
            "torch._utils._rebuild_tensor_v2": _slice,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Record:
        _, dtype, key, *_ = pid
        return _Record(dtype, key)


@dataclass(frozen=True)
class _Projector:
    """An open ``projector_N.pt``: a zip of what was pickled and of a record for each tensor, as torch writes it."""

    archive: zipfile.ZipFile
    root: str
    slices: dict[str, _Slice]

    def tensor(self, name: str) -> Tensor:
        """One of its tensors; the only thing that is read."""
        where = self.slices[name]
        held = bytearray(self.archive.read(f"{self.root}data/{where.record.key}"))
        flat = torch.frombuffer(held, dtype=where.record.dtype)
        return flat.as_strided(where.shape, where.strides, where.offset)


@contextmanager
def _projector(file: Path, wanted: dict[str, Wanted]) -> Iterator[_Projector]:
    """Open a projector, once its names and sizes are those that are wanted.

    Raises:
        AdapterError: missing, damaged, or others, also when found only while reading.
    """
    shapes = {theirs: shape for both in wanted.values() for theirs, (_, shape) in both.items()}
    most = _WIDEST * sum(map(prod, shapes.values())) + _OVERHEAD
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise AdapterError(f"{file}: compressed, which torch never does")
            total = sum(entry.file_size for entry in entries)
            if total > min(most, file.stat().st_size):
                raise AdapterError(f"{file}: holds {total:,} bytes, more than it is long or than its sizes say")
            root, state = _unpickled(archive)
            if not isinstance(state, dict) or not all(
                isinstance(name, str) and isinstance(value, _Slice) for name, value in state.items()
            ):
                raise AdapterError(f"{file}: not a state dict")
            missing = sorted(shapes.keys() - state.keys())
            unknown = sorted(state.keys() - shapes.keys() - {_TEMPERATURE})
            if missing:
                raise AdapterError(f"{file}: {missing[0]} is missing")
            if unknown:
                raise AdapterError(f"{file}: {unknown[0][:80]!r} is no part of a {PROJECTOR} of its sizes")
            for name, shape in shapes.items():
                if state[name].shape != shape:
                    claimed = f"{list(state[name].shape)}"[:80]
                    raise AdapterError(f"{file}: {name} is {claimed}, its sizes say {list(shape)}")
            if sum(prod(shape) * state[name].record.dtype.itemsize for name, shape in shapes.items()) > total:
                raise AdapterError(f"{file}: its tensors are larger than the file")
            yield _Projector(archive, root, state)
    except AdapterError:
        raise
    except FileNotFoundError as error:
        raise AdapterError(f"{file}: missing") from error
    except zipfile.BadZipFile as error:
        raise AdapterError(f"{file}: damaged, or of before torch 1.6: save it again with torch.save") from error
    except Exception as error:  # whatever a broken or hostile file makes of the readers
        raise AdapterError(f"{file}: damaged, or it holds more than tensors ({type(error).__name__})") from error


def _unpickled(archive: zipfile.ZipFile) -> tuple[str, object]:
    """The folder within the file, and what was pickled in it.

    Raises:
        ValueError: not as torch writes it.
        Exception: whatever a hostile pickle makes of its reader.
    """
    (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    root = entry.filename.removesuffix("data.pkl")
    order = root + "byteorder"
    if entry.file_size > _OVERHEAD or (order in archive.namelist() and archive.read(order) != b"little"):
        raise ValueError(entry.filename)
    blob = archive.read(entry)
    for opcode, argument, _ in pickletools.genops(blob):  # the reader makes room for the greatest number of a PUT
        if "PUT" in opcode.name and (argument or 0) > len(blob):
            raise ValueError(opcode.name)
    return root, _Unpickler(io.BytesIO(blob)).load()


def _checkpoint(folder: Path) -> Path:
    """Where the projectors are: the folder, or its ``final``, where the published ones have them."""
    for place in (folder, folder / "final"):
        if (place / LAYERS).is_file():
            return place
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    raise AdapterError(f"{folder / LAYERS}: missing; give the folder of a C2C checkpoint, with projector_0.pt in it")


def _layer_map(file: Path, sharer_layers: int, receiver_layers: int) -> dict[int, tuple[int, int]]:
    """Of each receiver layer that is mapped: the sharer's layer and the number of the projector."""
    content = _json(file)
    sharers = [source for target in content.values() if isinstance(target, dict) for source in target.values()]
    if len(content) != 1 or len(sharers) != 1 or not isinstance(sharers[0], dict):
        raise AdapterError(f"{file}: not the layers of one sharer and one receiver; import each sharer's by itself")
    mapped = {}
    for layer, pairs in sharers[0].items():
        try:
            theirs, number = pairs[0]
            ours = int(layer)
            if not all(type(one) is int and one >= 0 for one in (ours, theirs, number)):
                raise TypeError
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise AdapterError(f"{file}: layer {layer!r} is not mapped as [[sharer layer, projector], ...]") from error
        if ours >= receiver_layers or theirs >= sharer_layers:
            raise AdapterError(
                f"{file}: sharer layer {theirs} for receiver layer {ours}, but the models have {sharer_layers} and "
                f"{receiver_layers} layers: is it for this pair?"
            )
        mapped[ours] = theirs, number
    if not mapped:
        raise AdapterError(f"{file}: maps no layer")
    return dict(sorted(mapped.items()))


def _shape(file: Path, role: str, spec: ModelSpec, sizes: Sizes) -> Shape:
    """A model's cache, which must be what the projector was made for."""
    shape = Shape.of(spec)
    made_for = {
        "sharer": (sizes.source_num_heads, sizes.source_dim),
        "receiver": (sizes.target_num_heads, sizes.target_dim),
    }[role]
    if made_for != (shape.kv_heads, shape.head_dim):
        raise AdapterError(
            f"{file}: for a {role} with {made_for[0]} KV heads of {made_for[1]}, the given one has {shape.kv_heads} of "
            f"{shape.head_dim}: give the models that it was trained with"
        )
    return shape


def _recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    """How tokens are aligned, and what else of the training's recipe is worth keeping."""
    file = next((place / RECIPE for place in (folder, folder.parent) if (place / RECIPE).is_file()), None)
    model = {} if file is None else _json(file).get("model")
    if not isinstance(model, dict):
        return ALIGNMENTS["first"], {}
    strategy = model.get("alignment_strategy", "first") if model.get("is_do_alignment") else "first"
    if not isinstance(strategy, str) or strategy not in ALIGNMENTS:
        raise AdapterError(f"{file}: alignment {strategy!r:.80}; kvtalk knows {', '.join(ALIGNMENTS)}")
    kept = ("base_model", "teacher_model", "mapping", "is_do_alignment", "alignment_strategy")
    return ALIGNMENTS[strategy], {name: model[name] for name in kept if name in model}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{file}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not JSON ({str(error)[:80]})") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{file}: not a JSON object")
    return content
