"""The two halves of a translator at work: one beside the sharer, one beside the receiver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvtalk import bundled
from kvtalk.adapters.cards import Card, read_card
from kvtalk.adapters.graphs import Graphed
from kvtalk.adapters.translator import Decoder, Encoder, Geometry, last_tokens, latent_count, pair
from kvtalk.adapters.vectors import from_vectors, lead, to_vectors
from kvtalk.adapters.weights import Part, is_matrix, load_decoder, load_encoder
from kvtalk.alignment.tokens import tokenize
from kvtalk.cache import PADDING, KVCache, LayerCache, Prefix
from kvtalk.codecs import NOTHING
from kvtalk.errors import AdapterError, PacketError
from kvtalk.loading import load_tokenizer
from kvtalk.models import LM
from kvtalk.planning import Plan
from kvtalk.spec import LayerSpec, ModelSpec


class SharerHalf:
    """Encodes the sharer's cache; holds the receiver's tokenizer and nothing else of the receiver.

    Attributes:
        card: of the adapter.
    """

    def __init__(self, card: Card, encoder: Encoder, lm: LM, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put an encoder beside the sharer.

        Args:
            card: of the adapter.
            encoder: its sharer's half.
            lm: the sharer.
            tokenizer: the receiver's.

        Raises:
            AdapterError: the sharer or the tokenizer is not the one that the adapter was trained with.
        """
        card.check("sharer", lm.spec)
        card.check_tokenizer(tokenizer)
        self.card, self.lm, self.tokenizer = card, lm, tokenizer
        self.encoder = beside(encoder, lm)

    @property
    def latent(self) -> int:
        """Numbers of a whole latent."""
        return _sizes(self.card).latent

    @torch.inference_mode()
    def read(self, contexts: Sequence[str]) -> KVCache:
        """Latents of contexts: a cache of one layer, each latent in the place of a key.

        Positions number the latents from 0; the length is the receiver's tokens.
        """
        head = lead(self.lm)
        theirs, ours = tokenize(self.lm.tokenizer, contexts), tokenize(self.tokenizer, contexts)
        cache, _ = self.lm.read_whole([head + one.ids for one in theirs])
        vectors = to_vectors(cache, self.lm.spec, len(head))
        pairing = pair(theirs, ours)
        latents = self.encoder(vectors, pairing.to(self.lm.device))[:, None]
        steps = torch.arange(latents.shape[2])
        positions = torch.where(steps < latent_count(pairing.counts, self.encoder.pool)[:, None], steps, PADDING)
        return KVCache((LayerCache(latents, latents, positions),), tuple(pairing.counts.tolist()))

    def plan(self, plan: Plan | None) -> Plan:
        """What of a plan applies to latents: their width, one codec, and which tokens.

        Raises:
            AdapterError: a latent has not so many numbers, or a plan for keys and values.
        """
        plan = plan or Plan()
        if plan.values not in (plan.keys, NOTHING) or plan.rope != "after" or plan.layers != "all":
            raise AdapterError(f"plan {plan}: latents have one codec and no layers; use CODEC [POLICY@KEEP] [width=N]")
        width = self.latent if plan.width is None else plan.width
        if not 0 < width <= self.latent:
            raise AdapterError(f"width {width}: a latent of this adapter has {self.latent} numbers")
        return replace(plan, values=NOTHING, rope="after", layers="all", width=width)

    def spec(self, width: int | None) -> ModelSpec:
        """Geometry of latents of a width."""
        return _latent_spec(self.card, self.lm.spec, width)

    def cut(self, latents: KVCache, width: int | None) -> KVCache:
        """The first numbers of each latent."""
        layer = latents.layers[0]
        cut = layer.keys[..., :width]
        return replace(latents, layers=(LayerCache(cut, cut, layer.positions),))


class ReceiverHalf:
    """Decodes latents into the receiver's cache.

    Attributes:
        card: of the adapter.
    """

    def __init__(self, card: Card, decoder: Decoder, lm: LM) -> None:
        """Put a decoder beside the receiver.

        Raises:
            AdapterError: the receiver is not the one that the adapter was trained with.
        """
        card.check("receiver", lm.spec)
        self.card, self.lm = card, lm
        self.decoder, self.pool = beside(decoder, lm), _sizes(card).pool
        weights = (*self.decoder.parameters(), *self.decoder.buffers())
        self._graphed = Graphed(partial(_vectors, self.decoder, lm.spec.dtype), weights)
        self.spec = _latent_spec(card, replace(lm.spec, fingerprint=card.sharer.fingerprint), None)

    @torch.inference_mode()
    def decode(self, prefixes: Sequence[Prefix]) -> list[Prefix]:
        """Latents, unpacked, as prefixes of the receiver's own kind.

        Raises:
            PacketError: more tokens than the receiver reads, latents beyond the last token's, or latents that decode to
                no numbers.
        """
        longest = max((prefix.length for prefix in prefixes), default=0)
        if longest > self.lm.spec.max_positions:
            raise PacketError("end", f"{longest} tokens, {self.lm.name} reads at most {self.lm.spec.max_positions}")
        found = [self._latents(prefix) for prefix in prefixes]
        made: list[Prefix | None] = [None] * len(found)
        for width in {latents.shape[2] for latents, _ in found}:
            rows = [row for row, (latents, _) in enumerate(found) if latents.shape[2] == width]
            padded = torch.nn.utils.rnn.pad_sequence([found[row][0][0] for row in rows], batch_first=True)
            # A single sequence waits for launches, several for kernels.
            vectors = self._graphed(padded) if len(rows) == 1 else _vectors(self.decoder, self.lm.spec.dtype, padded)
            if not bool(torch.isfinite(vectors).all()):
                raise PacketError("keys", "latents that decode to NaN or infinity")
            for number, row in enumerate(rows):
                count = found[row][0].shape[1]
                cache = from_vectors(vectors[number, None, :count], torch.tensor([count]), self.lm.spec)
                made[row] = _at(cache, found[row][1], prefixes[row])
        return [prefix for prefix in made if prefix is not None]

    def _latents(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """One sequence's latents ``[1, latents, width]`` and where each stands at the receiver, ``[1, latents]``."""
        layer, *others = prefix.layers
        if others:
            raise PacketError("covers", "a latent has one layer")
        if bool((layer.positions >= latent_count(prefix.length, self.pool)).any()):
            raise PacketError("end", f"{prefix.length} tokens have fewer latents, at {self.pool} tokens each")
        size = (1, 1, layer.positions.shape[1], layer.shape[1])
        latents = torch.empty(size, dtype=torch.float32, device=self.lm.device)
        layer.keys_into(latents)
        return latents[:, 0], last_tokens(layer.positions, torch.tensor([prefix.length]), self.pool)


def both_halves(name: str | Path, sharer: LM, receiver: LM) -> tuple[SharerHalf, ReceiverHalf]:
    """An adapter's halves beside their models, in one process.

    Raises:
        AdapterError: not an adapter, damaged, or not for these models.
    """
    card, folder = read_card(name, "translator")
    encoder, decoder = load_encoder(card, folder), load_decoder(card, folder)
    return SharerHalf(card, encoder, sharer, receiver.tokenizer), ReceiverHalf(card, decoder, receiver)


def sharer_half(name: str | Path, sharer: LM) -> SharerHalf:
    """The sharer's half alone, with the receiver's tokenizer loaded by the name on the card.

    Raises:
        AdapterError: not an adapter, damaged, or not for this sharer.
        ModelError: the receiver's tokenizer cannot be loaded.
    """
    card, folder = read_card(name, "translator")
    return SharerHalf(card, load_encoder(card, folder), sharer, tokenizer_of(card.receiver.name))


def receiver_half(name: str | Path, receiver: LM) -> ReceiverHalf:
    """The receiver's half alone.

    Raises:
        AdapterError: not an adapter, damaged, or not for this receiver.
    """
    card, folder = read_card(name, "translator")
    return ReceiverHalf(card, load_decoder(card, folder), receiver)


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a model that a card names; a LoRA after its name has none of its own.

    Raises:
        ModelError: it cannot be loaded.
    """
    base = name.partition("+")[0]
    return (bundled.load_tokenizer if base in bundled.MODELS else load_tokenizer)(base)


def beside(part: Part, lm: LM) -> Part:
    """An adapter's part beside its model: matrices in the model's type, everything else in float32."""
    for parameter in part.parameters():
        if is_matrix(parameter):
            parameter.data = parameter.data.to(lm.spec.dtype)
    return part.to(lm.device).eval()


def _vectors(decoder: Decoder, dtype: torch.dtype, latents: Tensor) -> Tensor:
    return torch.as_tensor(decoder(latents)).to(dtype)


def _sizes(card: Card) -> Geometry:
    assert isinstance(card.geometry, Geometry)
    return card.geometry


def _latent_spec(card: Card, spec: ModelSpec, width: int | None) -> ModelSpec:
    layer = LayerSpec(1, width or _sizes(card).latent, None, None, values=False)
    return replace(spec, layers=(layer,), adapter=card.identity)


def _at(cache: KVCache, positions: Tensor, prefix: Prefix) -> Prefix:
    """A decoded cache at the positions of its latents."""
    layers = tuple(replace(layer, positions=positions) for layer in cache.layers)
    return Prefix(layers, prefix.start, prefix.length, positions.shape[1], cache.rotated)
