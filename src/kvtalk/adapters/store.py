"""Adapters on disk: a card (``adapter.json``) and the weights of each part (safetensors), in a folder or on the hub.

A translator has two parts, one for each side, and one is loaded without the other; a fuser has one. Matrices may be
stored in 4 bits, by kvtalk's own codecs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedTokenizerBase

from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.translator import Decoder, Encoder, Geometry, Translator
from kvtalk.codecs import codec
from kvtalk.errors import AdapterError
from kvtalk.spec import Fingerprint, ModelSpec, tokenizer_digest

CARD = "adapter.json"
SHIPPED = Path(__file__).parent / "shipped"
"""Adapters that come with kvtalk; a folder's name loads it: ``SHARER+RECEIVER`` a translator, with ``.fuser`` after it
a fuser."""

KINDS: dict[str, Callable[[dict[str, Any]], Geometry | FuserGeometry]] = {
    "translator": lambda content: Geometry(**content),
    "fuser": FuserGeometry.of,
}
"""How the sizes of each kind of adapter are read from a card."""

_OPTIONS = {"translator": "--adapter", "fuser": "--fuser"}

Part = TypeVar("Part", bound=nn.Module)
_LEAST = 16
"""Rows and columns of what counts as a matrix."""
_PACKED = ".codes", ".scales", ".shape"


@dataclass(frozen=True)
class Party:
    """One of the two models.

    Attributes:
        name: as it was loaded when the adapter was trained.
        fingerprint: of it.
    """

    name: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Card:
    """What an adapter is.

    Attributes:
        kind: ``translator`` or ``fuser``.
        sharer: the model that reads.
        receiver: the model that answers.
        geometry: sizes.
        weights: xxh3 of each part's file.
        facts: how and on what it was trained, for people.
    """

    kind: str
    sharer: Party
    receiver: Party
    geometry: Geometry | FuserGeometry
    weights: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What packets name: a digest of everything but the facts."""
        content = {key: value for key, value in asdict(self).items() if key != "facts"}
        return str(xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode()))

    def check(self, role: str, spec: ModelSpec) -> None:
        """Refuse another model than the one the adapter was trained with.

        Raises:
            AdapterError: says which part differs.
        """
        party: Party = getattr(self, role)
        different = party.fingerprint.differences(spec.fingerprint)
        if different:
            raise AdapterError(
                f"this adapter's {role} is {party.name}; {', '.join(different)} of the given model differ: "
                f"use that model or train an adapter for this pair (kvtalk train {self.kind})"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse another tokenizer than the receiver's.

        Raises:
            AdapterError: not the one that the adapter was trained with.
        """
        if tokenizer_digest(tokenizer) != self.receiver.fingerprint.tokenizer:
            raise AdapterError(f"the sharer needs the tokenizer of {self.receiver.name}, this is another one")


def save_adapter(
    adapter: Translator | Fuser,
    sharer: Party,
    receiver: Party,
    folder: Path,
    packing: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Card:
    """Write an adapter.

    Args:
        adapter: trained.
        sharer: what it was trained with.
        receiver: likewise.
        folder: created if need be.
        packing: codec of the matrices, such as ``nf4:1x64``; None for bf16.
        facts: for people.
    """
    parts: list[tuple[str, nn.Module]]
    if isinstance(adapter, Fuser):
        kind, parts = "fuser", [("fuser", adapter)]
    else:
        kind, parts = "translator", [("encoder", adapter.encoder), ("decoder", adapter.decoder)]
    blobs = {name: save(_packed(part, packing)) for name, part in parts}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, blob in blobs.items():
        (folder / f"{name}.safetensors").write_bytes(blob)
        weights[name] = str(xxhash.xxh3_64_hexdigest(blob))
    card = Card(kind, sharer, receiver, adapter.geometry, weights, facts or {})
    (folder / CARD).write_text(json.dumps(asdict(card), indent=1, ensure_ascii=False), "utf-8")
    return card


def read_card(name: str | Path, kind: str | None = None) -> tuple[Card, Path]:
    """The card of an adapter and the folder it lies in.

    Args:
        name: folder, hub id, or name of one that comes with kvtalk.
        kind: which kind it must be of; by default any.

    Raises:
        AdapterError: not found, not an adapter, or of another kind.
    """
    folder = _folder(name)
    try:
        content = json.loads((folder / CARD).read_text("utf-8"))
        card = Card(
            content["kind"],
            _party(content["sharer"]),
            _party(content["receiver"]),
            _geometry(content["kind"], content["geometry"]),
            dict(content["weights"]),
            content.get("facts", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{name}: not an adapter ({CARD} is missing or damaged: {error})") from error
    if kind is not None and card.kind != kind:
        raise AdapterError(f"{name}: a {card.kind}, no {kind}: give it by {_OPTIONS[card.kind]}")
    return card, folder


def load_encoder(card: Card, folder: Path) -> Encoder:
    """The sharer's half.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, Geometry)
    return _filled(Encoder(card.geometry), card, folder, "encoder")


def load_decoder(card: Card, folder: Path) -> Decoder:
    """The receiver's half.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, Geometry)
    return _filled(Decoder(card.geometry), card, folder, "decoder")


def load_fuser(card: Card, folder: Path) -> Fuser:
    """All of a fuser.

    Raises:
        AdapterError: missing or damaged.
    """
    assert isinstance(card.geometry, FuserGeometry)
    return _filled(Fuser(card.geometry), card, folder, "fuser")


def shipped_for(sharer: ModelSpec, receiver: ModelSpec, kind: str = "translator") -> Path | None:
    """The adapter of a kind for a pair that comes with kvtalk, if there is one."""
    for file in sorted(SHIPPED.glob(f"*/{CARD}")):
        card = read_card(file.parent)[0]
        both = (card.sharer.fingerprint, card.receiver.fingerprint)
        if card.kind == kind and both == (sharer.fingerprint, receiver.fingerprint):
            return file.parent
    return None


def _geometry(kind: str, content: Mapping[str, Any]) -> Geometry | FuserGeometry:
    if kind not in KINDS:
        raise AdapterError(f"an adapter of the kind {kind!r}, which this version does not know")
    return KINDS[kind](dict(content))


def _party(content: dict[str, Any]) -> Party:
    return Party(content["name"], Fingerprint(**content["fingerprint"]))


def _folder(name: str | Path) -> Path:
    if Path(name).is_dir():
        return Path(name)
    names = sorted(file.parent.name for file in SHIPPED.glob(f"*/{CARD}"))
    if str(name) in names:
        return SHIPPED / name
    if str(name).count("/") != 1 or str(name).startswith((".", "~", "/")):
        raise AdapterError(f"no adapter {str(name)!r}: give its folder, a hub id, or one of {', '.join(names)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CARD, "*.safetensors"]))
    except Exception as error:  # whatever the hub's client raises
        raise AdapterError(f"{name}: neither a folder nor an adapter on the hub ({str(error)[:200]})") from error


def shipped_as(identity: str) -> Path | None:
    """The adapter of an identity that comes with kvtalk, if there is one."""
    cards = (file.parent for file in sorted(SHIPPED.glob(f"*/{CARD}")))
    return next((folder for folder in cards if read_card(folder)[0].identity == identity), None)


def is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a tensor of an adapter is one, or several, and so may be stored in few bits."""
    return tensor.dim() > 1 and min(tensor.shape[-2:]) >= _LEAST


def _packed(part: nn.Module, packing: str | None) -> dict[str, torch.Tensor]:
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


def _filled(part: Part, card: Card, folder: Path, name: str) -> Part:
    file = folder / f"{name}.safetensors"
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise AdapterError(f"{file}: missing") from error
    if xxhash.xxh3_64_hexdigest(blob) != card.weights.get(name):
        raise AdapterError(f"{file}: damaged or of another adapter, its checksum is not the card's")
    tensors = load(blob)
    state = {key: value.float() for key, value in tensors.items() if ".codec:" not in key and not key.endswith(_PACKED)}
    for key in tensors:
        base, mark, packing = key.partition(".codec:")
        if mark:
            codes, scales, shape = (tensors[base + suffix] for suffix in _PACKED)
            out = torch.empty(1, codes.shape[1], int(shape[-1]))
            codec(packing).decode(codes, scales, out)
            state[base] = out.view(shape.tolist())
    try:
        part.load_state_dict(state)
    except RuntimeError as error:
        raise AdapterError(f"{file}: its weights do not have the sizes that {CARD} names") from error
    return part
