"""A fuser at work: the sharer's side says which of its tokens may cross, the receiver's side adds them to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvtalk.adapters.cards import Card, read_card
from kvtalk.adapters.earlier import Earlier, placed_whole, read_on
from kvtalk.adapters.enriched import Addition, Own
from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.halves import beside, tokenizer_of
from kvtalk.adapters.pairs import Pairs, enriched_of, paired
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.slots import Network, bare_layers, read_of
from kvtalk.adapters.weights import load_fuser, load_predictor, open_slots
from kvtalk.alignment.readings import readings
from kvtalk.alignment.tokens import aligned, tokenize
from kvtalk.cache import PADDING, KVCache, LayerCache, Prefix, unpacked
from kvtalk.codecs import NOTHING
from kvtalk.errors import AdapterError, AlignmentError, InputError, PacketError
from kvtalk.models import LM
from kvtalk.planning import Plan
from kvtalk.selection.tokens import FORETOLD
from kvtalk.shared_prompts import Prompt, text_digest
from kvtalk.spec import LayerSpec, ModelSpec, tokenizer_digest

_MOST_AFTER = 256
"""Tokens after the shared text that a packet may count."""


class SharerSide:
    """Reads the prompts; holds the receiver's tokenizer and nothing else of the receiver.

    Attributes:
        card: of the fuser.
        lm: the sharer.
    """

    def __init__(
        self,
        card: Card,
        slots: Sequence[int],
        lm: LM,
        tokenizer: PreTrainedTokenizerBase,
        predictor: Predictor | None = None,
    ) -> None:
        """Put a fuser's knowledge of what it reads beside the sharer.

        Args:
            card: of the fuser.
            slots: those whose gates are open, which say what layers are read.
            lm: the sharer.
            tokenizer: the receiver's.
            predictor: of the fuser, for token policies that choose by what it foretells; None if none was fitted.

        Raises:
            AdapterError: the sharer or the tokenizer is not the one that the fuser was trained with, or nothing of it
                is open.
        """
        card.check("sharer", lm.spec)
        card.check_tokenizer(tokenizer)
        self.card, self.lm, self.tokenizer = card, lm, tokenizer
        self.geometry = geometry_of(card)
        self.layers = sorted({layer for layer, _ in read_of(self.geometry, slots)})
        if not self.layers:
            raise AdapterError("every gate of this fuser is closed: it adds nothing")
        self.spec = wire_spec(card, slots, lm.spec)
        self.predictor = None if predictor is None else predictor.to(lm.device)

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt], earlier: Earlier | None = None) -> KVCache:
        """The cache of the aligned tokens in the layers that the fuser reads; other layers are empty.

        Positions count the sharer's tokens from the shared text's first one on.

        Args:
            prompts: what to read.
            earlier: of a single prompt, the turns before it, which are not read again; it grows by this one.

        Raises:
            AlignmentError: no token of the receiver's overlaps any of the sharer's, or too many follow the text.
        """
        start = 0 if earlier is None else earlier.tokens
        theirs = readings(self.lm.tokenizer, prompts, [] if start else None)
        ours = tokenize(self.tokenizer, [prompt.shared for prompt in prompts])
        cache = read_on(self.lm, [one.ids for one in theirs], earlier)
        if earlier is not None and earlier.placed is None:
            earlier.placed = placed_whole(self.lm, cache)
        wanted = torch.full((len(prompts), max(cache.length) - start), PADDING)
        for row, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            chosen = torch.unique(torch.from_numpy(aligned(one.shared, other, self.geometry.alignment)[1]))
            if not len(chosen):
                raise AlignmentError("no token of the receiver overlaps one of the sharer: is the prompt empty?")
            if one.after * self.geometry.roles > _MOST_AFTER:
                raise AlignmentError(f"{one.after} tokens after the text: a fuser takes at most {_MOST_AFTER}")
            last = torch.arange(one.end, one.end + one.after * self.geometry.roles) - one.begin
            chosen = torch.cat([chosen, last])
            wanted[row, chosen + one.begin] = chosen
        layers = bare_layers(cache, self.lm.spec, self.geometry, self.layers, start)
        nothing = torch.zeros(len(prompts), 0, dtype=torch.long)
        empty = LayerCache(layers[self.layers[0]].keys[:, :, :0], layers[self.layers[0]].values[:, :, :0], nothing)
        held = tuple(
            replace(layers[index], positions=wanted) if index in layers else empty
            for index in range(len(self.lm.spec.layers))
        )
        return KVCache(held, tuple(len(one.shared.ids) + one.after * self.geometry.roles for one in theirs))

    def plan(self, plan: Plan | None) -> Plan:
        """What of a plan applies here: codecs and tokens; which layers cross, and how keys lie, the fuser says.

        Raises:
            AdapterError: a plan for latents, or with layers of its own, or a token policy that needs a predictor where
                none was fitted.
        """
        plan = plan or Plan()
        if plan.width is not None or NOTHING in (plan.keys, plan.values) or plan.layers != "all":
            raise AdapterError(f"plan {plan}: a fuser chooses the layers itself; use CODEC [POLICY@KEEP]")
        if plan.tokens in FORETOLD and self.predictor is None:
            raise AdapterError(
                f"{plan.tokens}: nothing foretells it for this fuser from {self.card.sharer.name} to "
                f"{self.card.receiver.name}; fit that: kvtalk train predictor --fuser FOLDER --data ROWS.jsonl"
            )
        return replace(plan, rope=self.geometry.rope)

    def scored(self, cache: KVCache, plan: Plan) -> KVCache:
        """The cache with the scores by which the plan's token policy chooses, if it needs any.

        Args:
            cache: as :meth:`read` gives it.
            plan: as :meth:`plan` gives it.
        """
        if self.predictor is None or plan.tokens not in FORETOLD:
            return cache
        return self.predictor.scored(cache, plan.tokens)


class ReceiverSide:
    """Adds what was received to the receiver's own cache of the same text.

    Attributes:
        card: of the fuser.
        lm: the receiver.
        spec: of the packets that it takes.
    """

    def __init__(self, card: Card, fuser: Fuser, lm: LM, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put a fuser beside the receiver.

        Args:
            card: of the fuser.
            fuser: trained.
            lm: the receiver.
            tokenizer: the sharer's.

        Raises:
            AdapterError: the receiver or the tokenizer is not the one that the fuser was trained with.
        """
        card.check("receiver", lm.spec)
        if tokenizer_digest(tokenizer) != card.sharer.fingerprint.tokenizer:
            raise AdapterError(f"the receiver needs the tokenizer of {card.sharer.name}, this is another one")
        self.card, self.lm, self.tokenizer = card, lm, tokenizer
        self.geometry = geometry_of(card)
        self.fuser = beside(fuser.opened(), lm).fold()
        self._network = Network(self.fuser, lm.spec, lm.device)
        self.spec = wire_spec(card, self.fuser.slots, replace(lm.spec, fingerprint=card.sharer.fingerprint))

    def additions(self, own: Own, prompts: Sequence[Prompt], prefixes: Sequence[Prefix]) -> list[Addition]:
        """What the received caches add to the receiver's own, in the layers whose gates are open.

        Args:
            own: the receiver's cache of the prompts.
            prompts: what the receiver reads.
            prefixes: what each prompt's packet holds.

        Raises:
            PacketError: a packet that was not made for a fuser, or lacks a layer that it reads.
            InputError: the sharer read another text.
        """
        theirs = tokenize(self.tokenizer, [prompt.shared for prompt in prompts])
        for prompt, one, prefix in zip(prompts, theirs, prefixes, strict=True):
            if prefix.rotated != (self.geometry.rope == "after") or prefix.text is None:
                raise PacketError("text", "a cache to be put before a prompt, not one for this fuser")
            if prefix.text != text_digest(prompt.shared):
                raise InputError("sharer and receiver read different texts: give both the same text")
            if not 0 <= prefix.length - len(one.ids) <= _MOST_AFTER * self.geometry.roles:
                raise InputError(
                    f"the sharer read {prefix.length} tokens, the receiver's text has {len(one.ids)} of them: "
                    "give both the same text"
                )
        counts = [prefix.length for prefix in prefixes]
        pairs = enriched_of(paired(theirs, counts, own.read, self.geometry), own.read, self.geometry)
        if own.start:
            pairs = replace(pairs, ours=pairs.ours + own.start)
        received, positions = unpacked(prefixes, self.spec, self.lm.device)
        read = self.fuser.sharer_layers
        if not bool((positions[read] != PADDING).any(dim=2).any(dim=1).all()):
            raise PacketError("layers", "a layer that this fuser reads did not cross")
        columns = _columns(positions[read], pairs)
        held = (columns >= 0).any(dim=0)
        pairs, columns = pairs.at(held), columns[:, held]
        if not len(pairs.rows) or not self.fuser.slots:
            return []
        once, owners = pairs.once()
        return [self._network.added(received, pairs.rows, columns, owners, own.held, once)]


def geometry_of(card: Card) -> FuserGeometry:
    """A fuser's sizes.

    Raises:
        AdapterError: another kind of adapter.
    """
    if not isinstance(card.geometry, FuserGeometry):
        raise AdapterError(f"a {card.kind}, no fuser: give it by --adapter")
    return card.geometry


def wire_spec(card: Card, slots: Sequence[int], spec: ModelSpec) -> ModelSpec:
    """Geometry of what crosses: the sharer's layers, whose keys no one turns on the way, of each what slots read."""
    geometry = geometry_of(card)
    shape, read = geometry.sharer, set(read_of(geometry, slots))
    layers = [
        LayerSpec(shape.kv_heads, shape.head_dim, None, None, keys=(layer, 0) in read, values=(layer, 1) in read)
        for layer in range(shape.layers)
    ]
    return replace(spec, layers=tuple(layers))


def sharer_side(name: str | Path, sharer: LM) -> SharerSide:
    """The sharer's side of a fuser, with the receiver's tokenizer loaded by the name on the card.

    Raises:
        AdapterError: not a fuser, damaged, or not for this sharer.
        ModelError: the receiver's tokenizer cannot be loaded.
    """
    card, folder = read_card(name, "fuser")
    slots, predictor = open_slots(card, folder), load_predictor(card, folder)
    return SharerSide(card, slots, sharer, tokenizer_of(card.receiver.name), predictor)


def receiver_side(name: str | Path, receiver: LM) -> ReceiverSide:
    """The receiver's side of a fuser, with the sharer's tokenizer loaded by the name on the card.

    Raises:
        AdapterError: not a fuser, damaged, or not for this receiver.
        ModelError: the sharer's tokenizer cannot be loaded.
    """
    card, folder = read_card(name, "fuser")
    return ReceiverSide(card, load_fuser(card, folder), receiver, tokenizer_of(card.sharer.name))


def _columns(positions: Tensor, pairs: Pairs) -> Tensor:
    """In which column of each layer each pair's sharer token lies, −1 where it was not sent, ``[layers, pairs]``.

    Args:
        positions: of the layers' tokens, ``[layers, rows, tokens]``.
        pairs: aligned tokens.
    """
    longest = 1 + max(int(positions.max()) if positions.numel() else 0, int(pairs.theirs.max()))
    table = torch.full((*positions.shape[:2], longest + 1), -1)
    where = torch.where(positions == PADDING, longest, positions)
    table.scatter_(2, where, torch.arange(positions.shape[2]).expand_as(positions))
    table[:, :, longest] = -1
    return table[:, pairs.rows, pairs.theirs]
