"""Fusers trained by the published code of C2C (github.com/thu-nics/C2C, arXiv 2510.03215), read from its checkpoints.

A checkpoint folder holds ``projector_N.pt`` (weights) and ``projector_N.json`` (class and sizes) of each projector, and
``projector_config.json``: ``{receiver model: {sharer model: {receiver layer: [[sharer layer, N], ...]}}}``, of whose
pairs that code uses the first. How tokens are aligned says the ``config.json`` of the training run, beside it or one
folder up. No pickled code is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape
from kvtalk.adapters.store import Card, Party, save_adapter
from kvtalk.errors import AdapterError
from kvtalk.models import LM
from kvtalk.spec import ModelSpec

PROJECTOR = "C2CProjector"
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
    )
    _check_names(folder / f"projector_{numbers[0]}.pt", sizes)  # before anything of the sizes it claims is made
    with torch.device("meta"):
        fuser = Fuser(geometry)
    stacks = {name: torch.zeros(tensor.shape) for name, tensor in fuser.state_dict().items()}
    stacks["sharer_scale"].fill_(1)
    stacks["receiver_scale"].fill_(1)
    stacks["gates"].fill_(_CLOSED)
    dtypes = set()
    for number in numbers:
        other = folder / f"projector_{number}.json"
        if read_sizes(other) != sizes:
            raise AdapterError(f"{other}: other sizes than {first.name}; kvtalk reads checkpoints of one size")
        layers = [layer for layer, (_, which) in mapped.items() if which == number]
        dtypes |= _fill(stacks, folder / f"projector_{number}.pt", sizes, layers)
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


def _fill(stacks: dict[str, Tensor], file: Path, sizes: Sizes, layers: list[int]) -> set[torch.dtype]:
    """Copy a projector to the slots of the layers that use it; the types that it is stored in."""
    state = _check_names(file, sizes)
    dtypes = set()
    for kind, name in enumerate(("key", "value")):
        for theirs, ours in names(name, sizes.blocks).items():
            tensor, stack = state[theirs], stacks[ours]
            turned = tensor.dim() == 2  # their Linear holds [outputs, inputs]
            wanted = stack.shape[1:][::-1] if ours.endswith("weight") else stack.shape[2:]
            if tensor.shape != wanted:
                raise AdapterError(f"{file}: {theirs} is {list(tensor.shape)}, its sizes say {list(wanted)}")
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{file}: {theirs} holds what is no finite number")
            dtypes.add(tensor.dtype)
            for layer in layers:
                stack[2 * layer + kind] = tensor.T if turned else tensor
    return dtypes


def _check_names(file: Path, sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of a ``projector_N.pt``: all that the sizes ask for and no others."""
    state = _tensors(file)
    wanted = {_TEMPERATURE, *names("key", sizes.blocks), *names("value", sizes.blocks)}
    missing, unknown = sorted(wanted - state.keys() - {_TEMPERATURE}), sorted(state.keys() - wanted)
    if missing:
        raise AdapterError(f"{file}: {missing[0]} is missing")
    if unknown:
        raise AdapterError(f"{file}: {unknown[0]!r} is no part of a {PROJECTOR} of {sizes.num_layers} layers")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        size = file.stat().st_size
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AdapterError(f"{file}: missing") from error
    except Exception as error:  # whatever a broken or hostile file makes of the reader
        raise AdapterError(f"{file}: damaged, or it holds more than tensors ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise AdapterError(f"{file}: not a state dict")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > size:
        raise AdapterError(f"{file}: its tensors are larger than the file")
    return state


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
    if strategy not in ALIGNMENTS:
        raise AdapterError(f"{file}: alignment {strategy!r}; kvtalk knows {', '.join(ALIGNMENTS)}")
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
