"""Adapters on disk: a card (``adapter.json``) and the weights of each part (safetensors), in a folder or on the hub.

A translator has two parts, one for each side, and one is loaded without the other; a fuser has one, and a predictor
for the sharer's side once that is fitted. Matrices may be stored in 4 bits, by kvtalk's own codecs. Translators whose
halves were trained to one latent space name it on their cards, and any encoder of a space can be joined with any of its
decoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.translator import Decoder, Encoder, Geometry, Translator, by_name, joined
from kvtalk.codecs import codec
from kvtalk.codecs.registry import CODECS
from kvtalk.errors import AdapterError, CodecError
from kvtalk.spec import Fingerprint, ModelSpec, tokenizer_digest

CARD = "adapter.json"
SHIPPED = Path(__file__).parent / "shipped"
"""Adapters that come with kvtalk: a translator lies in ``SHARER+RECEIVER``, a fuser in ``SHARER+RECEIVER.fuser``."""

_FUSER = ".fuser"


def _translator(content: dict[str, Any]) -> Geometry:
    """Sizes of a translator; it checks most of them itself."""
    geometry = Geometry(**content)
    if type(geometry.expansion) not in (int, float) or not 0 <= geometry.expansion <= _MOST_EXPANSION:
        raise AdapterError(f"expansion {geometry.expansion!r:.60}: must be a number up to {_MOST_EXPANSION}")
    if max(geometry.sharer_blocks, geometry.encoder_blocks, geometry.decoder_blocks) > _MOST_BLOCKS:
        raise AdapterError(f"more than {_MOST_BLOCKS} blocks")
    return geometry


KINDS: dict[str, Callable[[dict[str, Any]], Geometry | FuserGeometry]] = {
    "translator": _translator,
    "fuser": FuserGeometry.of,
}
"""How the sizes of each kind of adapter are read from a card."""

PARTS = {"translator": ("encoder", "decoder"), "fuser": ("fuser",)}
"""Of each kind; a part's weights lie in the file of its name."""

_PREDICTOR = "predictor"
"""A part that a fuser may have besides."""

OPTIONS = {"translator": "--adapter", "fuser": "--fuser"}
"""By which each kind is given on the command line."""

Part = TypeVar("Part", bound=nn.Module)
Sizes = TypeVar("Sizes")
_LEAST = 16
"""Rows and columns of what counts as a matrix."""
_PACKED = ".codes", ".scales", ".shape"
_CODEC = ".codec:"
_FLOATS = "F32", "BF16", "F16"
_MOST_EXPANSION = 64
_MOST_BLOCKS = 256


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
        space: id of a translator's latent space, None for a fuser: encoders and decoders of one space fit together.
        facts: how and on what it was trained, for people.
    """

    kind: str
    sharer: Party
    receiver: Party
    geometry: Geometry | FuserGeometry
    weights: dict[str, str]
    space: str | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What packets name: a digest of everything but space, facts and the predictor, which only helps to choose what
        crosses."""
        content = asdict(self, dict_factory=by_name)
        content = {key: value for key, value in content.items() if key not in ("space", "facts")}
        content["weights"] = {part: digest for part, digest in self.weights.items() if part != _PREDICTOR}
        return str(xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode()))

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that it has, each in a file of its own."""
        return PARTS[self.kind] + (_PREDICTOR,) * (self.kind == "fuser" and _PREDICTOR in self.weights)

    def check(self, role: str, spec: ModelSpec) -> None:
        """Refuse another model than the one the adapter was trained with, and sizes that are not the model's.

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
        claimed, real = self._sizes(role, spec)
        if claimed != real:
            raise AdapterError(
                f"this adapter's card gives its {role} other sizes ({claimed}) than {party.name} has ({real}): "
                "the card is damaged"
            )

    def _sizes(self, role: str, spec: ModelSpec) -> tuple[str, str]:
        """What the geometry says of a model, and what is so."""
        if isinstance(self.geometry, FuserGeometry):
            shapes = getattr(self.geometry, role), Shape.of(spec)
            claimed, real = ("{} layers of {} KV heads of {}".format(*astuple(shape)) for shape in shapes)
            return claimed, real
        values = f"{spec.values_per_token} values a token"
        if role == "sharer":
            return f"{self.geometry.sharer_values} values a token", values
        claimed = f"{self.geometry.receiver_layers} layers, {self.geometry.receiver_values} values a token"
        return claimed, f"{len(spec.layers)} layers, {values}"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse another tokenizer than the receiver's.

        Raises:
            AdapterError: not the one that the adapter was trained with.
        """
        if tokenizer_digest(tokenizer) != self.receiver.fingerprint.tokenizer:
            raise AdapterError(f"the sharer needs the tokenizer of {self.receiver.name}, this is another one")


@dataclass(frozen=True)
class Half:
    """A translator's encoder or decoder where it is stored, to be built on as it is.

    Attributes:
        part: ``encoder`` or ``decoder``.
        card: of its adapter.
        folder: of its adapter.
    """

    part: str
    card: Card
    folder: Path

    @classmethod
    def of(cls, name: str | Path, part: str) -> Half:
        """One of a stored translator's.

        Raises:
            AdapterError: not found, or no translator.
        """
        return cls(part, *read_card(name, "translator"))

    @property
    def facts(self) -> Any:
        """What its adapter's card says of this half, or of the whole adapter if it was trained as one."""
        return self.card.facts.get(self.part, self.card.facts)

    def load(self) -> Encoder | Decoder:
        """It, with its weights.

        Raises:
            AdapterError: missing or damaged.
        """
        return (load_encoder if self.part == "encoder" else load_decoder)(self.card, self.folder)

    def blob(self) -> bytes:
        """Its file.

        Raises:
            AdapterError: missing or damaged.
        """
        return checked(self.card, self.folder, self.part).read_bytes()

    def fitted(self, geometry: Geometry, sharer: ModelSpec, receiver: ModelSpec) -> Geometry:
        """Sizes of a translator between two models that is to have this half: its own sizes on its side.

        Raises:
            AdapterError: this half is of another model, its latents stand for tokens of another tokenizer, or they are
                of another size.
        """
        assert isinstance(self.card.geometry, Geometry)
        if self.part == "encoder":
            self.card.check("sharer", sharer)
            _same_tokens(self.card.receiver.name, self.card.receiver.fingerprint, receiver.fingerprint)
            return joined(self.card.geometry, geometry)
        self.card.check("receiver", receiver)
        return joined(geometry, self.card.geometry)


def _same_tokens(name: str, theirs: Fingerprint, ours: Fingerprint) -> None:
    """Refuse an encoder that writes latents of other tokens than the receiver's."""
    if theirs.tokenizer != ours.tokenizer:
        raise AdapterError(
            f"this encoder writes one latent for each token of {name}, and the receiver has another tokenizer: "
            "train an encoder of its own"
        )


def save_adapter(
    adapter: Translator | Fuser,
    sharer: Party,
    receiver: Party,
    folder: Path,
    packing: str | None = None,
    facts: dict[str, Any] | None = None,
    frozen: Half | None = None,
) -> Card:
    """Write an adapter.

    Args:
        adapter: trained.
        sharer: what it was trained with.
        receiver: likewise.
        folder: created if need be.
        packing: codec of the matrices, such as ``nf4:1x64``; None for bf16.
        facts: for people.
        frozen: the half that a translator was trained to; its file is taken as it is, and its latent space.

    Raises:
        AdapterError: the frozen half's file is missing or damaged.
        CodecError: matrices that cannot be packed so.
    """
    kind = "fuser" if isinstance(adapter, Fuser) else "translator"
    blobs = {}
    for name in PARTS[kind]:
        part = adapter if isinstance(adapter, Fuser) else getattr(adapter, name)
        blobs[name] = frozen.blob() if frozen and frozen.part == name else save(_packed(part, packing))
    facts, space = dict(facts or {}), None
    if frozen is not None:
        facts[frozen.part], space = frozen.facts, frozen.card.space
    return _write(folder, blobs, Card(kind, sharer, receiver, adapter.geometry, {}, space, facts))


def join(encoder: str | Path, decoder: str | Path, folder: Path) -> Card:
    """Write the adapter of a pair that was never trained together, from two halves of one latent space.

    Args:
        encoder: adapter whose encoder to take, and so its sharer.
        decoder: adapter whose decoder to take, and so its receiver.
        folder: created if need be.

    Raises:
        AdapterError: they do not fit, either is missing or damaged, or the folder holds an adapter already.
    """
    ours, theirs = Half.of(encoder, "encoder"), Half.of(decoder, "decoder")
    sharer, receiver = ours.card.sharer, theirs.card.receiver
    _same_tokens(ours.card.receiver.name, ours.card.receiver.fingerprint, receiver.fingerprint)
    assert isinstance(ours.card.geometry, Geometry)
    assert isinstance(theirs.card.geometry, Geometry)
    geometry = joined(ours.card.geometry, theirs.card.geometry)
    if ours.card.space != theirs.card.space:
        raise AdapterError(
            f"{encoder} and {decoder} were not trained to one latent space: train either again with "
            "kvtalk train translator and the other's --encoder or --decoder"
        )
    if (folder / CARD).exists():
        raise AdapterError(f"{folder} holds an adapter already: give another folder")
    facts = {half.part: half.facts for half in (ours, theirs)}
    blobs = {half.part: half.blob() for half in (ours, theirs)}
    return _write(folder, blobs, Card("translator", sharer, receiver, geometry, {}, ours.card.space, facts))


def _write(folder: Path, blobs: Mapping[str, bytes], card: Card) -> Card:
    """An adapter's files; the card still lacks its weights' digests, and its space if that is a new one."""
    weights = {name: str(xxhash.xxh3_64_hexdigest(blob)) for name, blob in blobs.items()}
    card = replace(card, weights=weights, space=card.space or _new_space(card.kind, weights))
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in blobs.items():
        (folder / f"{name}.safetensors").write_bytes(blob)
    _write_card(folder, card)
    return card


def _write_card(folder: Path, card: Card) -> None:
    (folder / CARD).write_text(json.dumps(asdict(card, dict_factory=by_name), indent=1, ensure_ascii=False), "utf-8")


def add_predictor(folder: Path, predictor: Predictor, facts: dict[str, Any] | None = None) -> Card:
    """Write a predictor beside its fuser, in the place of an earlier one.

    Args:
        folder: of the fuser.
        predictor: fitted to it.
        facts: on what, for people.

    Raises:
        AdapterError: no fuser lies there.
    """
    card, folder = read_card(folder, "fuser")
    blob = save(_packed(predictor, None))
    weights = {**card.weights, _PREDICTOR: str(xxhash.xxh3_64_hexdigest(blob))}
    card = replace(card, weights=weights, facts={**card.facts, _PREDICTOR: dict(facts or {})})
    partial = folder / f"{_PREDICTOR}.partial"
    partial.write_bytes(blob)
    partial.replace(folder / f"{_PREDICTOR}.safetensors")
    _write_card(folder, card)
    return card


def _new_space(kind: str, weights: Mapping[str, str]) -> str | None:
    """The space of a translator whose halves were trained together; older cards do not name it."""
    if kind != "translator":
        return None
    return str(xxhash.xxh3_64_hexdigest(json.dumps(weights, sort_keys=True).encode()))


def read_card(name: str | Path, kind: str | None = None) -> tuple[Card, Path]:
    """The card of an adapter and the folder it lies in.

    Args:
        name: folder, hub id (``@REVISION`` after it for a branch), or name of one that comes with kvtalk, such as
            ``smollm2-135m+gemma3-270m``; without a kind, that is a translator, and a fuser has ``.fuser`` after it.
        kind: which kind it must be of; by default any.

    Raises:
        AdapterError: not found, not an adapter, or of another kind.
    """
    folder = _folder(name, kind)
    try:
        content = json.loads((folder / CARD).read_text("utf-8"))
        if not isinstance(content.get("facts", {}), dict):
            raise TypeError("facts that are no object")
        space = content.get("space") or _new_space(content["kind"], content["weights"])
        if not isinstance(space, str | None):
            raise TypeError("a space that is no text")
        card = Card(
            content["kind"],
            _party(content["sharer"]),
            _party(content["receiver"]),
            _geometry(content["kind"], content["geometry"]),
            dict(content["weights"]),
            space,
            content.get("facts", {}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{name}: not an adapter ({CARD} is missing or damaged: {error})") from error
    if kind is not None and card.kind != kind:
        raise AdapterError(f"{name}: a {card.kind}, no {kind}: give it by {OPTIONS[card.kind]}")
    return card, folder


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
    return _filled(Predictor, card.geometry, card, folder, _PREDICTOR) if _PREDICTOR in card.parts else None


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
    try:
        return KINDS[kind](dict(content))
    except AdapterError as error:
        raise ValueError(str(error)) from error


def _party(content: dict[str, Any]) -> Party:
    party = Party(content["name"], Fingerprint(**content["fingerprint"]))
    if not all(isinstance(text, str) for text in (party.name, *astuple(party.fingerprint))):
        raise TypeError("a model's name and fingerprint must be text")
    return party


def _folder(name: str | Path, kind: str | None = None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    names = _shipped_names(kind)
    found = names.get(str(name)) or _shipped_names(None).get(str(name))
    if found is not None:
        return found
    if str(name).count("/") != 1 or str(name).startswith((".", "~", "/")):
        others = f", a hub id, or one of {', '.join(names)}" if names else " or a hub id"
        raise AdapterError(f"no adapter {str(name)!r}: give its folder{others}")
    from huggingface_hub import snapshot_download

    repo, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[CARD, "*.safetensors"]))
    except Exception as error:  # whatever the hub's client raises
        raise AdapterError(f"{name}: neither a folder nor an adapter on the hub ({str(error)[:200]})") from error


def _shipped_names(kind: str | None) -> dict[str, Path]:
    """Folders of what comes with kvtalk, of one kind or any, by name; of one kind without ``.fuser``."""
    folders = sorted(file.parent for file in SHIPPED.glob(f"*/{CARD}"))
    if kind is None:
        return {folder.name: folder for folder in folders}
    wanted = kind == "fuser"
    return {folder.name.removesuffix(_FUSER): folder for folder in folders if folder.name.endswith(_FUSER) == wanted}


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
