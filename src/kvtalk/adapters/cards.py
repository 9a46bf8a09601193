"""What an adapter is: its card (``adapter.json``), in a folder, on the hub, or among those that come with kvtalk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from kvtalk.adapters.fuser import FuserGeometry, Shape
from kvtalk.adapters.translator import Geometry, by_name
from kvtalk.errors import AdapterError
from kvtalk.spec import Fingerprint, ModelSpec, tokenizer_digest

CARD = "adapter.json"
SHIPPED = Path(__file__).parent / "shipped"
"""Adapters that come with kvtalk: a translator lies in ``SHARER+RECEIVER``, a fuser in ``SHARER+RECEIVER.fuser``."""

_FUSER = ".fuser"


_MOST_EXPANSION = 64
_MOST_BLOCKS = 256


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

PREDICTOR = "predictor"
"""A part that a fuser may have besides."""

OPTIONS = {"translator": "--adapter", "fuser": "--fuser"}
"""By which each kind is given on the command line."""


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
        content["weights"] = {part: digest for part, digest in self.weights.items() if part != PREDICTOR}
        return str(xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode()))

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that it has, each in a file of its own."""
        return PARTS[self.kind] + (PREDICTOR,) * (self.kind == "fuser" and PREDICTOR in self.weights)

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
        space = content.get("space") or new_space(content["kind"], content["weights"])
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


def new_space(kind: str, weights: Mapping[str, str]) -> str | None:
    """The space of a translator whose halves were trained together; older cards do not name it."""
    if kind != "translator":
        return None
    return str(xxhash.xxh3_64_hexdigest(json.dumps(weights, sort_keys=True).encode()))


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
