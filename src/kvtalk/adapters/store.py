"""Adapters written: a card and the weights of each part, joined from the halves of others, or their mean.

A translator has two parts, one for each side, and one is loaded without the other; a fuser has one, and a predictor
for the sharer's side once that is fitted. Translators whose halves were trained to one latent space name it on their
cards, and any encoder of a space can be joined with any of its decoders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save

from kvtalk.adapters.cards import CARD, PARTS, PREDICTOR, Card, Party, new_space, read_card
from kvtalk.adapters.fuser import Fuser
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.translator import Decoder, Encoder, Geometry, Translator, by_name, joined
from kvtalk.adapters.weights import checked, load_decoder, load_encoder, packed
from kvtalk.errors import AdapterError
from kvtalk.spec import Fingerprint, ModelSpec


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
        blobs[name] = frozen.blob() if frozen and frozen.part == name else save(packed(part, packing))
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


def average(
    names: Sequence[str | Path],
    folder: Path,
    packing: str | None = None,
    exact: Sequence[Mapping[str, torch.Tensor]] = (),
) -> Card:
    """Write the translator whose weights are the mean of others', after model soups
    ([2203.05482](https://arxiv.org/abs/2203.05482)).

    Args:
        names: two translators at least, of which each was trained on from another one, or all from one: means of
            others are worth nothing, and that cannot be seen from here. A half that is the same in all stays as it is,
            and so does the latent space.
        folder: created if need be.
        packing: codec of the matrices, such as ``nf4:1x64``; None for bf16.
        exact: of each, weights to take in place of those in its files, by their names in a translator; empty for none.

    Raises:
        AdapterError: fewer than two, of other models or sizes, all the same, missing or damaged, or the folder holds an
            adapter already.
        CodecError: matrices that cannot be packed so.
    """
    found = [read_card(name, "translator") for name in names]
    if len(found) < 2:
        raise AdapterError("a mean needs two adapters at least")
    if (folder / CARD).exists():
        raise AdapterError(f"{folder} holds an adapter already: give another folder")
    last = found[-1][0]
    for name, (card, _) in zip(names, found, strict=True):
        for what in ("sharer", "receiver"):
            if getattr(card, what).fingerprint != getattr(last, what).fingerprint:
                raise AdapterError(f"{name} has another {what} than {names[-1]}: they have no mean")
        if card.geometry != last.geometry:
            raise AdapterError(f"{name} has other sizes than {names[-1]}: they have no mean")
    same = [part for part in PARTS["translator"] if len({card.weights[part] for card, _ in found}) == 1]
    if len(same) == len(PARTS["translator"]):
        raise AdapterError("these adapters are all the same")
    assert isinstance(last.geometry, Geometry)
    translator = Translator(last.geometry)
    exact = exact or [{}] * len(found)
    for part in PARTS["translator"]:
        states = [Half(part, *one).load().state_dict() for one in found]
        for state, weights in zip(states, exact, strict=True):
            state |= {key: weights[f"{part}.{key}"] for key in state if f"{part}.{key}" in weights}
        means = {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}
        getattr(translator, part).load_state_dict(means)
    frozen = Half(same[0], *found[-1]) if same else None
    facts = {
        "mean of": [card.identity + ", exact" * bool(weights) for (card, _), weights in zip(found, exact, strict=True)]
    }
    return save_adapter(translator, last.sharer, last.receiver, folder, packing, facts, frozen)


def _write(folder: Path, blobs: Mapping[str, bytes], card: Card) -> Card:
    """An adapter's files; the card still lacks its weights' digests, and its space if that is a new one."""
    weights = {name: str(xxhash.xxh3_64_hexdigest(blob)) for name, blob in blobs.items()}
    card = replace(card, weights=weights, space=card.space or new_space(card.kind, weights))
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
    blob = save(packed(predictor, None))
    weights = {**card.weights, PREDICTOR: str(xxhash.xxh3_64_hexdigest(blob))}
    card = replace(card, weights=weights, facts={**card.facts, PREDICTOR: dict(facts or {})})
    partial = folder / f"{PREDICTOR}.partial"
    partial.write_bytes(blob)
    partial.replace(folder / f"{PREDICTOR}.safetensors")
    _write_card(folder, card)
    return card
