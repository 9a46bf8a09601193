"""What a model is given in each arm, for a batch of items.

The harness stands on the wire: it takes the sharer's packets, hands the receiver those of another item (wrong) or
packets whose keys and values, or latents, it has set to zero (zeroed), and so finds out what reaches the receiver by
another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import torch

from kvtalk.alignment.readings import readings
from kvtalk.alignment.tokens import spread
from kvtalk.cache import LayerCache, Prefix
from kvtalk.evaluation.arms import Arm
from kvtalk.evaluation.data import Item, Passage
from kvtalk.evaluation.protocols import Outcome, Protocol
from kvtalk.evaluation.summary import Record
from kvtalk.fusion import FusedLink, FusedSharer, Fusion
from kvtalk.link import Link, Receiver, Sharer, bits_per_value
from kvtalk.placed import PlacedCache
from kvtalk.planning import Plan
from kvtalk.shared_prompts import Prompt

RELAY_TOKENS = 256
"""As long as C2C's relayed texts (arXiv 2510.03215)."""


@dataclass(frozen=True)
class Settings:
    """How a run is carried out.

    Attributes:
        batch: items at a time.
        relay_tokens: length of a relayed text at most.
        temperature: 0 answers greedily, above 0 samples.
        seed: of sampling.
    """

    batch: int = 16
    relay_tokens: int = RELAY_TOKENS
    temperature: float = 0.0
    seed: int = 0

    @classmethod
    def for_device(cls, device: torch.device) -> Settings:
        """Larger batches on a GPU."""
        return cls(batch=256 if device.type == "cuda" else 16)


class Batch:
    """Items that are asked together.

    Attributes:
        items: what is asked.
    """

    def __init__(
        self,
        link: Link,
        protocol: Protocol,
        items: Sequence[Item],
        following: Mapping[str, str],
        settings: Settings,
        others: Mapping[str, Item] | None = None,
    ) -> None:
        """Prepare.

        Args:
            link: sharer and receiver.
            protocol: how questions are asked.
            items: of the batch.
            following: for each context another one, for the wrong-cache control.
            settings: length of a relayed text.
            others: for each item's id another item, for the same where both models read the question.
        """
        self.link, self.protocol, self.items = link, protocol, items
        self.following, self.others, self.settings = following, others or {}, settings
        self._reads: dict[int, _Read] = {}
        self._fused: dict[tuple[int, bool], _FusedRead] = {}
        self._last: tuple[tuple[int, str], _Sent] | None = None

    def run(self, arm: Arm) -> list[Record]:
        """Every item in one arm."""
        # Drawn anew for each batch and arm, so that a run that was interrupted draws what it would have drawn.
        torch.manual_seed(crc32(f"{self.settings.seed} {arm.name} {self.items[0].id}".encode()))
        receiver, writer = self.link.receiver, Receiver(self.link.sharer.lm)
        if arm.kind == "receiver":
            return self._ask(arm, receiver, [None] * len(self.items), [0] * len(self.items))
        if arm.kind == "sharer":
            return self._ask(arm, writer, self._contexts, [0] * len(self.items))
        if arm.kind == "text":
            return self._ask(arm, receiver, self._contexts, [len((text or "").encode()) for text in self._contexts])
        if arm.kind == "relay":
            texts = self._relayed
            return self._ask(arm, receiver, texts, [len(text.encode()) for text in texts], texts)
        return self._ask_fused(self.link, arm) if isinstance(self.link, FusedLink) else self._ask_from_cache(arm)

    def _ask(
        self,
        arm: Arm,
        side: Receiver,
        backgrounds: Sequence[str | None],
        sizes: Sequence[int],
        sent: Sequence[str] = (),
    ) -> list[Record]:
        prompts = [self.protocol.prompt(side, item, text) for item, text in zip(self.items, backgrounds, strict=True)]
        outcomes = self.protocol.answer(
            side.lm, self.items, prompts, self._blank(side, prompts), self.settings.temperature
        )
        return [
            _record(item, arm, outcome, size, sent=text)
            for item, outcome, size, text in zip(self.items, outcomes, sizes, sent or [""] * len(sizes), strict=True)
        ]

    def _ask_from_cache(self, arm: Arm) -> list[Record]:
        receiver = self.link.receiver
        prompts = [self.protocol.prompt(receiver, item, None) for item in self.items]
        contexts = [text or "" for text in self._contexts]
        if arm.kind == "wrong":
            contexts = [self.following[context] for context in contexts]
        sent = self._packets(arm)
        rows = [sent.read.index[context] for context in contexts]
        room = max(map(len, prompts)) + self.protocol.room
        placed = sent.place(receiver, room, zeroed=arm.kind == "zeroed").rows(rows)
        outcomes = self.protocol.answer(receiver.lm, self.items, prompts, placed, self.settings.temperature)
        return [
            _record(item, arm, outcome, len(sent.blobs[row]), sent.bits(row), str(sent.plans[row]))
            for item, outcome, row in zip(self.items, outcomes, rows, strict=True)
        ]

    def _ask_fused(self, link: FusedLink, arm: Arm) -> list[Record]:
        fusion = link.own if arm.kind == "self" and link.own is not None else link.fusion
        own = self._fused_read(fusion, wrong=False)
        blobs, plans = own.send(arm)
        received = [fusion.receiver.unpack(0, blob) for blob in blobs]
        if arm.kind == "zeroed":
            received = [replace(prefix, layers=_zeros(prefix)) for prefix in received]
        if arm.kind == "wrong":
            blobs, plans = self._fused_read(fusion, wrong=True).send(arm)
            others = [fusion.receiver.unpack(0, blob) for blob in blobs]
            texts = zip(own.crossing, self._fused_read(fusion, wrong=True).crossing, strict=True)
            places = [torch.from_numpy(spread(*both)) for both in texts]
            received = [_in_place_of(*three) for three in zip(received, others, places, strict=True)]
        last, placed = fusion.receiver.fuse(own.prompts, [received])
        outcomes = self.protocol.answer(fusion.receiver.lm, self.items, last, placed, self.settings.temperature)
        sizes = zip(self.items, outcomes, blobs, own.tokens, plans, strict=True)
        return [
            _record(item, arm, outcome, len(blob), own.sharer.bits(blob, tokens), str(plan))
            for item, outcome, blob, tokens, plan in sizes
        ]

    def _fused_read(self, fusion: Fusion, wrong: bool) -> _FusedRead:
        key = (id(fusion), wrong)
        if key not in self._fused:
            sharer, lm = fusion.sharers[0], fusion.receiver.lm
            both = [self.protocol.fused_prompts(sharer.side.lm, lm, item) for item in self.items]
            read = [
                self.protocol.fused_prompts(sharer.side.lm, lm, self._other(item)) if wrong else pair
                for item, pair in zip(self.items, both, strict=True)
            ]
            self._fused[key] = _FusedRead(sharer, [theirs for theirs, _ in read], [ours for _, ours in both])
        return self._fused[key]

    def _other(self, item: Item) -> Item:
        """The question about another text, or another question."""
        if isinstance(item, Passage):
            return item.model_copy(update={"context": self.following[item.context]})
        return self.others[item.id]

    def _packets(self, arm: Arm) -> _Sent:
        """The packets of every context as an arm sends them; the last ones are kept for the arms that send the same."""
        sharer = self.link.receiver.lm if arm.kind == "self" else self.link.sharer.lm
        key = (id(sharer), arm.way)
        if self._last is None or self._last[0] != key:
            self._last = None
            read = self._read(self.link.sharer if arm.kind != "self" else Sharer(sharer))
            self._last = key, read.send(arm)
        return self._last[1]

    def _read(self, sharer: Sharer) -> _Read:
        """What a sharer makes of every context of the batch, and of those that stand in for them."""
        key = id(sharer.lm)
        if key not in self._reads:
            own = [text for text in self._contexts if text is not None]
            self._reads[key] = _Read(
                sharer, list(dict.fromkeys([*own, *(self.following.get(text, text) for text in own)]))
            )
        return self._reads[key]

    def _blank(self, side: Receiver, prompts: Sequence[list[int]]) -> PlacedCache:
        room = max(map(len, prompts)) + self.protocol.room
        return side.lm.place([[]], room=room, head=self.protocol.head).rows([0] * len(prompts))

    @property
    def _contexts(self) -> list[str | None]:
        return [item.context if isinstance(item, Passage) else None for item in self.items]

    @cached_property
    def _relayed(self) -> list[str]:
        """What the sharer writes for each item."""
        writer = Receiver(self.link.sharer.lm)
        prompts = [self.protocol.relay_prompt(writer, item) for item in self.items]
        made = writer.lm.generate(
            prompts,
            self._blank(writer, prompts),
            max_new_tokens=self.settings.relay_tokens,
            stop=self.protocol.relay_stop(writer.lm),
        )
        return [generation.text for generation in made]


class _Read:
    """Contexts that a sharer has read once, for all arms."""

    def __init__(self, sharer: Sharer, contexts: Sequence[str]) -> None:
        self.sharer = sharer
        self.index = {context: row for row, context in enumerate(contexts)}
        self.cache = sharer.read(*contexts)
        self.rows = list(self.cache.rows())
        self.tokens = [sharer.count(context) for context in contexts]

    def send(self, arm: Arm) -> _Sent:
        """A packet of each."""
        if arm.budget is None:
            plans = [self.sharer.plan(self.rows[0], self.tokens[0], None, arm.plan)] * len(self.rows)
        else:
            counted = zip(self.rows, self.tokens, strict=True)
            plans = [self.sharer.plan(row, tokens, arm.budget, arm.plan) for row, tokens in counted]
        return _Sent(self, self.sharer.encode_rows(self.cache, plans), plans, arm.gaps)


class _FusedRead:
    """Prompts that a sharer has read once, for all arms."""

    def __init__(self, sharer: FusedSharer, theirs: Sequence[Prompt], prompts: Sequence[Prompt]) -> None:
        self.sharer, self.theirs, self.prompts = sharer, theirs, prompts
        self.cache = sharer.read(*theirs)
        self.tokens = self.cache.length
        self._last: tuple[tuple[Plan | None, str | None], tuple[list[memoryview], list[Plan]]] | None = None

    @property
    def crossing(self) -> list[list[int]]:
        """The sharer's tokens whose positions the packets count."""
        read = readings(self.sharer.side.lm.tokenizer, self.theirs)
        return [one.ids[one.begin :][:length] for one, length in zip(read, self.tokens, strict=True)]

    def send(self, arm: Arm) -> tuple[list[memoryview], list[Plan]]:
        """A packet of each, and how it was packed; the last ones are kept for the arms that send the same."""
        key = arm.plan, arm.budget
        if self._last is None or self._last[0] != key:
            self._last = None
            if arm.budget is None:
                plans = [self.sharer.plan(self.cache, None, arm.plan)] * self.cache.batch
            else:
                plans = [self.sharer.plan(row, arm.budget, arm.plan) for row in self.cache.rows()]
            self._last = key, (self.sharer.encode_rows(self.theirs, self.cache, plans), plans)
        return self._last[1]


@dataclass(frozen=True)
class _Sent:
    """Packets on the wire.

    Attributes:
        read: whence they come.
        blobs: one for each context.
        plans: of each.
        gaps: see :func:`kvtalk.placement.place`.
    """

    read: _Read
    blobs: Sequence[memoryview]
    plans: Sequence[Plan]
    gaps: bool

    def bits(self, row: int) -> float:
        """Bits per value of one of them."""
        sharer = self.read.sharer
        return bits_per_value(len(self.blobs[row]), self.read.tokens[row], sharer.lm)

    def place(self, receiver: Receiver, room: int, zeroed: bool) -> PlacedCache:
        """All of them before the receiver's prompts."""
        prefixes = [receiver.unpack(blob) for blob in self.blobs]
        if zeroed:
            prefixes = [replace(prefix, layers=_zeros(prefix)) for prefix in prefixes]
        return receiver.lm.place([[prefix] for prefix in receiver.decode(prefixes)], room=room, gaps=self.gaps)


def _zeros(prefix: Prefix) -> Iterator[LayerCache]:
    for layer in prefix.layers:
        kv_heads, head_dim = layer.shape
        nothing = torch.zeros(1, kv_heads, layer.positions.shape[1], head_dim)
        yield LayerCache(nothing, nothing, layer.positions)


def _in_place_of(own: Prefix, other: Prefix, places: torch.Tensor) -> Prefix:
    """Another prompt's tokens where those of this one lie.

    Args:
        own: this one's packet.
        other: the other one's.
        places: which token of the other stands in for each of this one's; the nearest that was sent is taken.
    """

    def layers() -> Iterator[LayerCache]:
        for mine, theirs in zip(own.layers, other.layers, strict=True):
            held = theirs.positions.shape[1]
            keys = torch.empty(1, theirs.shape[0], held, theirs.shape[1])
            values = torch.empty_like(keys)
            theirs.keys_into(keys)
            theirs.values_into(values)
            columns = torch.searchsorted(theirs.positions[0], places[mine.positions[0]]).clamp(max=max(held - 1, 0))
            yield LayerCache(keys[:, :, columns], values[:, :, columns], mine.positions)

    return replace(own, layers=layers())


def _record(
    item: Item, arm: Arm, outcome: Outcome, size: int = 0, bits: float = 0.0, plan: str = "", sent: str = ""
) -> Record:
    return Record(
        id=item.id,
        arm=arm.name,
        answer=outcome.answer,
        scores=outcome.scores,
        confidence=outcome.confidence,
        bytes=size,
        bits_per_value=round(bits, 4),
        plan=plan,
        sent=sent,
        likelihoods=outcome.likelihoods,
    )
