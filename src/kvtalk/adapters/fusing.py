"""A fuser at work: the sharer's side says which of its tokens may cross, the receiver's side adds them to its own.

Both models read the same text, each in its own tokens and with its own words around it. The text's tokens are aligned
by its characters, the words after it by their place before the answer; what stands before it stays as the receiver
alone would have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvtalk.adapters.fuser import Fuser, FuserGeometry
from kvtalk.adapters.halves import beside, tokenizer_of
from kvtalk.adapters.predictor import Predictor
from kvtalk.adapters.store import Card, load_fuser, load_predictor, open_slots, read_card
from kvtalk.alignment.tokens import Tokenized, aligned, tokenize
from kvtalk.cache import PADDING, KVCache, LayerCache, Prefix
from kvtalk.codecs import NOTHING
from kvtalk.device import sent
from kvtalk.errors import AdapterError, AlignmentError, InputError, PacketError
from kvtalk.loading import bos
from kvtalk.models import LM
from kvtalk.placement import PlacedCache, PlacedLayer, place
from kvtalk.planning import Plan
from kvtalk.prompts import PromptFormat, has_chat_template, render
from kvtalk.rope import Angles, StackRope, rotate_layers
from kvtalk.selection.tokens import FORETOLD
from kvtalk.spec import LayerSpec, ModelSpec, tokenizer_digest

_SLOTS_ON_CPU = 4
"""Slots to compute at a time: what they make of 512 tokens stays in a core's cache."""


_MOST_AFTER = 256
"""Tokens after the shared text that a packet may count."""


@dataclass(frozen=True)
class Prompt:
    """What one model reads.

    Attributes:
        before: only this model reads it; its BOS comes first where its tokenizer adds one.
        shared: the text that both models read.
        after: only this model reads it.
    """

    before: str
    shared: str
    after: str = ""


def text_digest(text: str) -> str:
    """By which a packet says what was read; xxh3 in hex."""
    return str(xxhash.xxh3_64_hexdigest(text.encode()))


def prompt_of(form: PromptFormat, question: str, context: str = "") -> Prompt:
    """A question in the words that a model puts around it.

    The space before the question belongs to what is shared: parted from its word it would be another token.

    Args:
        form: the model's.
        question: read by both models.
        context: read by this one alone.
    """
    before = f"{form.head}{context}{form.before_question}"
    return Prompt(before.removesuffix(" "), f" {question}", form.after_question)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, turn: str) -> Prompt:
    """A user's turn in a model's chat template, where it has one.

    Raises:
        AlignmentError: a template that changes the turn.
    """
    mark = "\x02turn\x03"
    before, found, after = render(tokenizer, [mark]).partition(mark)
    if not found:
        raise AlignmentError("the chat template changes what the user says: such prompts cannot be aligned")
    return Prompt(before, turn, after)


def prompt_after(lm: LM, answer: str, question: str) -> Prompt:
    """A further question in a model's words.

    Args:
        lm: the model.
        answer: what of the answer before it the model has not read, with or without the end of a turn.
        question: read by both models.
    """
    form, end = lm.prompt, (lm.prompt.stop or ("\n",))[0]
    between = end + form.before_question.removeprefix(end)
    if not form.stop and has_chat_template(lm.tokenizer):
        marks = "\x02a\x03", "\x02b\x03", "\x02c\x03"
        between = render(lm.tokenizer, marks).partition(marks[1])[2].partition(marks[2])[0]
    ended = next((size for size in range(len(between), 0, -1) if answer.endswith(between[:size])), 0)
    return Prompt((answer + between[ended:]).removesuffix(" "), f" {question}", form.after_question)


@dataclass
class Earlier:
    """What a model has read of a conversation; grows turn by turn.

    Attributes:
        placed: its cache, one row; None before the first turn.
        unread: the last token that it wrote, which it has not read.
    """

    placed: PlacedCache | None = None
    unread: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return 0 if self.placed is None else self.placed.columns


@dataclass(frozen=True)
class Pairs:
    """Aligned tokens of a batch of prompts, one entry each.

    Where a receiver token is given the mean of several sharer tokens, their entries follow each other.

    Attributes:
        rows: number of the prompt.
        ours: index of the receiver's token in its prompt.
        theirs: index of the sharer's token in the shared text.
    """

    rows: Tensor
    ours: Tensor
    theirs: Tensor

    def at(self, where: Tensor) -> Pairs:
        """Some of them."""
        return Pairs(self.rows[where], self.ours[where], self.theirs[where])

    def once(self) -> tuple[Pairs, Tensor]:
        """Each receiver token's first entry, and for every entry the number of its receiver token."""
        tokens = torch.stack([self.rows, self.ours])
        first = torch.ones(tokens.shape[1], dtype=torch.bool)
        first[1:] = (tokens[:, 1:] != tokens[:, :-1]).any(dim=0)
        return self.at(first), first.cumsum(0) - 1

    def to(self, device: torch.device | str) -> Pairs:
        """On another device."""
        return Pairs(*sent(torch.stack([self.rows, self.ours, self.theirs]), device))


class Slots:
    """Slots of a fuser at the receiver: all that fusing needs of them whatever is fused, made once.

    Attributes:
        which: their numbers.
        places: 0, 1, 2 ..., ``[slots, 1]``, on the receiver's device.
    """

    def __init__(self, which: Sequence[int], spec: ModelSpec, rope: str, device: torch.device | str) -> None:
        """Make the tables.

        Args:
            which: their numbers.
            spec: of the receiver.
            rope: whether keys are fused ``before`` their rotary embedding or ``after`` it.
            device: of the receiver.
        """
        self.which = tuple(which)
        self.places = torch.arange(len(self.which), device=device)[:, None]
        self._kv_heads = spec.layers[0].kv_heads
        turned = [rope == "before" and slot % 2 == 0 for slot in self.which]
        ropes = [spec.layers[slot // 2].rope if turns else None for slot, turns in zip(self.which, turned, strict=True)]
        self._rope = StackRope(ropes, device)

    def angles(self, positions: Tensor) -> list[Angles]:
        """Of keys at some positions, ``[tokens]``."""
        return self._rope.angles(positions)

    def turned(self, vectors: Tensor, angles: Sequence[Angles], inverse: bool = False) -> Tensor:
        """Keys and values of some tokens, ``[slots, tokens, width]``, written over: keys rotated to their positions, or
        back, where they are fused before that."""
        heads = vectors.view(*vectors.shape[:2], self._kv_heads, -1)
        self._rope.rotate_(heads.transpose(1, 2), angles, inverse)
        return vectors


@dataclass(frozen=True)
class Reading:
    """A prompt in a model's tokens.

    Attributes:
        ids: all of them.
        begin: index of the shared text's first one.
        shared: that text.
    """

    ids: list[int]
    begin: int
    shared: Tokenized

    @property
    def end(self) -> int:
        """Index of the first token after the shared text."""
        return self.begin + len(self.shared.ids)

    @property
    def after(self) -> int:
        """Tokens after the shared text."""
        return len(self.ids) - self.end


def readings(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], begin: Sequence[int] | None = None
) -> list[Reading]:
    """Prompts in a model's tokens.

    Args:
        tokenizer: the model's.
        prompts: what it reads.
        begin: tokens before each; by default its BOS where its tokenizer adds one.
    """
    first = list(bos(tokenizer) if begin is None else begin)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []

    found = []
    for prompt, shared in zip(prompts, tokenize(tokenizer, [prompt.shared for prompt in prompts]), strict=True):
        before = first + ids(prompt.before)
        found.append(Reading([*before, *shared.ids, *ids(prompt.after)], len(before), shared))
    return found


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
        self.fuser = beside(fuser.opened(), lm).typed()
        self._parts = self.fuser.split(slots_at_once(lm.device.type, self.fuser))
        self._slots = Slots(self.fuser.slots, lm.spec, self.geometry.rope, lm.device)
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
        received = place(self.spec, None, [[prefix] for prefix in prefixes], room=0, device=self.lm.device).to_cache()
        if not all(received.layers[layer].tokens for layer in self.fuser.sharer_layers):
            raise PacketError("layers", "a layer that this fuser reads did not cross")
        columns = {layer: _columns(received.layers[layer].positions, pairs) for layer in self.fuser.sharer_layers}
        held = torch.zeros(len(pairs.rows), dtype=torch.bool)
        for where in columns.values():
            held |= where >= 0
        pairs, columns = pairs.at(held), {layer: where[held] for layer, where in columns.items()}
        if not len(pairs.rows) or not self.fuser.slots:
            return []
        slots = read_of(self.geometry, self.fuser.slots)
        there = sent(torch.stack([columns[layer] for layer, _ in slots]), self.lm.device)
        once, owners = pairs.once()
        once, rows, owners = once.to(self.lm.device), *sent(torch.stack([pairs.rows, owners]), self.lm.device)
        vectors = taken(received.layers, slots, self._slots.places, rows, there.clamp(min=0))
        vectors, missing = averaged(vectors, there < 0, owners, len(once.rows))
        angles = self._slots.angles(once.ours)
        added = computed(self._parts, vectors, own.vectors(once, self._slots, angles))
        added = self._slots.turned(added.masked_fill(missing[:, :, None], 0), angles)
        return [Addition(once, self._slots.which, added, self.geometry.last)]


@dataclass(frozen=True)
class Addition:
    """What one sharer adds.

    Attributes:
        pairs: to which tokens, each once; on the device of what is added.
        slots: to which layers' keys or values.
        added: ``[slots, tokens, width]``, keys rotated as the model holds them.
        last: whether it adds to the prompts' last tokens, too.
    """

    pairs: Pairs
    slots: Sequence[int]
    added: Tensor
    last: bool


class Own:
    """The receiver's own cache of prompts, whose last token runs a second time, on what is fused.

    Attributes:
        read: the prompts in its tokens.
        start: tokens of earlier turns.
        cache: of them all, the last token's too.
    """

    def __init__(self, lm: LM, prompts: Sequence[Prompt], earlier: Earlier | None = None) -> None:
        """Read prompts.

        Args:
            lm: the receiver.
            prompts: what it reads.
            earlier: of a single prompt, the turns before it, which are not read again.

        Raises:
            InputError: one of fewer than two tokens.
        """
        self.lm, self.start = lm, 0 if earlier is None else earlier.tokens
        begin = earlier.unread if earlier is not None and self.start else None
        self.read = readings(lm.tokenizer, prompts, begin)
        if min(len(one.ids) for one in self.read) < 2:
            raise InputError("the prompt is too short to be fused: it needs two tokens at least")
        self.cache = read_on(lm, [one.ids for one in self.read], earlier)

    @property
    def last(self) -> list[list[int]]:
        """The last token of each prompt, with which the receiver goes on."""
        return [one.ids[-1:] for one in self.read]

    def vectors(self, pairs: Pairs, slots: Slots, angles: Sequence[Angles]) -> Tensor:
        """See :func:`own_vectors`."""
        return own_vectors(self.cache, pairs, slots, angles)

    def placed(self, additions: Sequence[Addition]) -> PlacedCache:
        """The cache with what sharers add, ready for the last token."""
        return placed_but_last(self.lm, self.cache, additions, any(addition.last for addition in additions))


def read_on(lm: LM, rows: Sequence[list[int]], earlier: Earlier | None) -> KVCache:
    """Read tokens after those of earlier turns; the cache of them all."""
    if earlier is None or earlier.placed is None:
        return lm.read_whole(rows)[0]
    lm.states(rows, earlier.placed)
    return earlier.placed.to_cache()


def placed_whole(lm: LM, cache: KVCache) -> PlacedCache:
    """A model's own cache from position 0 on, to go on from."""
    held = [PlacedLayer(layer.keys, layer.values, layer.tokens) for layer in cache.layers]
    ends = torch.tensor(cache.length, device=lm.device)
    return PlacedCache(held, [layer.positions for layer in cache.layers], ends, lm.spec)


def placed_but_last(lm: LM, cache: KVCache, additions: Sequence[Addition], awaits: bool) -> PlacedCache:
    """A model's own cache from position 0 on with what sharers add, ready to read the last token of each row once more.

    Gradients flow into the additions.

    Args:
        lm: the model.
        cache: its own.
        additions: what sharers add.
        awaits: whether the last token's keys and values are those of the cache with what is added, or what the model
            makes of it now.
    """
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    for addition in additions:
        layers = enriched(layers, addition)
    ends = torch.tensor(cache.length) - 1
    rows, last = torch.arange(len(ends)), sent(ends, lm.device)
    held = [
        PlacedLayer(
            keys[:, :, :-1],
            values[:, :, :-1],
            keys.shape[2] - 1,
            (keys[rows, :, last], values[rows, :, last]) if awaits else None,
        )
        for keys, values in layers
    ]
    tracks: dict[int, Tensor] = {}
    for layer in cache.layers:
        if id(layer.positions) not in tracks:
            track = layer.positions.clone()
            track[rows, ends] = PADDING
            tracks[id(layer.positions)] = track[:, :-1]
    return PlacedCache(held, [tracks[id(layer.positions)] for layer in cache.layers], last, lm.spec)


def slots_at_once(device: str, fuser: Fuser) -> int:
    """How many slots of a fuser are computed together."""
    return len(fuser.slots) if device == "cuda" else _SLOTS_ON_CPU


def paired(
    sharer: Sequence[Tokenized], lengths: Sequence[int], receiver: Sequence[Reading], geometry: FuserGeometry
) -> Pairs:
    """Which sharer token stands for which receiver token, in a batch of prompts.

    Args:
        sharer: the shared texts in its tokens.
        lengths: its tokens of each prompt from the shared text's first one on.
        receiver: the prompts in its tokens.
        geometry: how to align, and whether the words after the shared text are.
    """
    rows, ours, theirs = [], [], []
    for row, (one, length, other) in enumerate(zip(sharer, lengths, receiver, strict=True)):
        there, index = map(torch.from_numpy, aligned(one, other.shared, geometry.alignment))
        both = min(length - len(one.ids), other.after) if geometry.roles else 0
        back = torch.arange(-both, 0)
        rows.append(torch.full((len(there) + both,), row))
        ours.append(torch.cat([there + other.begin, back + len(other.ids)]))
        theirs.append(torch.cat([index, back + length]))
    return Pairs(torch.cat(rows), torch.cat(ours), torch.cat(theirs))


def enriched_of(pairs: Pairs, receiver: Sequence[Reading], geometry: FuserGeometry) -> Pairs:
    """Those of aligned tokens that are enriched: all, or all but the last one of each prompt."""
    if geometry.last:
        return pairs
    return pairs.at(pairs.ours < torch.tensor([len(one.ids) - 1 for one in receiver])[pairs.rows])


def bare_layers(
    cache: KVCache, spec: ModelSpec, geometry: FuserGeometry, wanted: Sequence[int], start: int = 0
) -> dict[int, LayerCache]:
    """Some layers of a cache that holds every token, from position ``start`` on, keys as the fuser takes them."""
    layers = [cache.layers[index].span(start, cache.layers[index].tokens) for index in wanted]
    keys = [layer.keys for layer in layers]
    if geometry.rope == "before":
        steps = sent(torch.arange(start, start + keys[0].shape[2]), keys[0].device)
        keys = rotate_layers(keys, [spec.layers[index].rope for index in wanted], steps, inverse=True)
    return {index: replace(layer, keys=one) for index, layer, one in zip(wanted, layers, keys, strict=True)}


def taken(
    layers: Sequence[LayerCache] | Mapping[int, LayerCache],
    slots: Sequence[tuple[int, int]],
    places: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Keys and values of some tokens, all heads one after the other, ``[slots, tokens, width]``.

    Args:
        layers: of one shape.
        slots: index of the layer, and whether its keys (0) or values (1).
        places: see :class:`Slots`, on the device of the layers.
        rows: of each token, ``[tokens]``, there too.
        columns: of each token, ``[tokens]``, or ``[slots, tokens]`` where they differ between slots.
    """
    tensors = [(layers[index].keys, layers[index].values)[kind] for index, kind in slots]
    longest = max(tensor.shape[2] for tensor in tensors)
    filled = [one if one.shape[2] == longest else F.pad(one, (0, 0, 0, longest - one.shape[2])) for one in tensors]
    return torch.stack(filled).transpose(2, 3)[places, rows, columns].flatten(2)


def computed(parts: Sequence[Fuser], sharer: Tensor, receiver: Tensor) -> Tensor:
    """What a fuser that may be split by slots adds; see :meth:`kvtalk.adapters.fuser.Fuser.forward`."""
    if len(parts) == 1:
        return torch.as_tensor(parts[0](sharer, receiver))
    sizes = [len(part.slots) for part in parts]
    both = zip(parts, torch.split(sharer, sizes), torch.split(receiver, sizes), strict=True)
    return torch.cat([part(theirs, ours) for part, theirs, ours in both])


def averaged(vectors: Tensor, missing: Tensor, owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of the sharer tokens that stand for each receiver token, of those that were sent.

    Args:
        vectors: of every entry, ``[slots, entries, width]``.
        missing: which of them were not sent, bool ``[slots, entries]``.
        owners: number of each entry's receiver token, ``[entries]``, never decreasing.
        count: of the receiver tokens.

    Returns:
        means, ``[slots, count, width]``, of the same type, averaged in float32 or better; and which receiver tokens
        were sent nothing, bool ``[slots, count]``.
    """
    if len(owners) == count:
        return vectors, missing
    exact = torch.promote_types(vectors.dtype, torch.float32)
    there = (~missing)[:, :, None].to(exact)
    sums = vectors.new_zeros(len(vectors), count, vectors.shape[2], dtype=exact).index_add_(1, owners, vectors * there)
    counts = there.new_zeros(len(vectors), count, 1).index_add_(1, owners, there)
    return (sums / counts.clamp(min=1)).to(vectors.dtype), counts[:, :, 0] == 0


def own_vectors(cache: KVCache, pairs: Pairs, slots: Slots, angles: Sequence[Angles]) -> Tensor:
    """Keys and values of some tokens of a cache from position 0 on, keys as the fuser takes them.

    Args:
        cache: the receiver's.
        pairs: which tokens, each once.
        slots: which layers' keys or values.
        angles: of the tokens' positions, as ``slots`` gives them.

    Returns:
        ``[slots, tokens, width]``.
    """
    read = [divmod(slot, 2) for slot in slots.which]
    return slots.turned(taken(cache.layers, read, slots.places, pairs.rows, pairs.ours), angles, inverse=True)


def enriched(layers: Sequence[tuple[Tensor, Tensor]], addition: Addition) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer with an addition; gradients flow into it."""
    pairs, slots, added = addition.pairs, addition.slots, addition.added
    held = torch.stack([layers[slot // 2][slot % 2] for slot in slots])
    held.transpose(2, 3)[:, pairs.rows, pairs.ours] += added.reshape(*added.shape[:2], held.shape[2], -1)
    made = [list(layer) for layer in layers]
    for slot, tensor in zip(slots, held.unbind(), strict=True):
        made[slot // 2][slot % 2] = tensor
    return [(keys, values) for keys, values in made]


def geometry_of(card: Card) -> FuserGeometry:
    """A fuser's sizes.

    Raises:
        AdapterError: another kind of adapter.
    """
    if not isinstance(card.geometry, FuserGeometry):
        raise AdapterError(f"a {card.kind}, no fuser: give it by --adapter")
    return card.geometry


def read_of(geometry: FuserGeometry, slots: Sequence[int]) -> list[tuple[int, int]]:
    """What slots read: index of the sharer's layer, and whether its keys (0) or values (1)."""
    return [(geometry.layers[slot // 2], slot % 2) for slot in slots]


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
    """In which column of a layer each pair's sharer token lies, −1 where it was not sent.

    Args:
        positions: of the layer's tokens, ``[rows, tokens]``.
        pairs: aligned tokens.
    """
    longest = 1 + max(int(positions.max()) if positions.numel() else 0, int(pairs.theirs.max()))
    table = torch.full((len(positions), longest + 1), -1)
    rows = torch.arange(len(positions))[:, None].expand_as(positions)
    where = torch.where(positions == PADDING, longest, positions)
    table[rows, where] = torch.arange(positions.shape[1]).expand_as(positions)
    table[:, longest] = -1
    return table[pairs.rows, pairs.theirs]
