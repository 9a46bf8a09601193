"""Sharer and receiver, joined: ask a question about a context that only the sharer reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvtalk.adapters.cards import Card, shipped_for
from kvtalk.adapters.halves import ReceiverHalf, SharerHalf, both_halves
from kvtalk.cache import KVCache, LayerSource, Prefix
from kvtalk.errors import AdapterError, BudgetError, InputError
from kvtalk.models import LM, Generation
from kvtalk.packet import prefix, read_stream
from kvtalk.packet_writing import encode_rows, predict, write
from kvtalk.planning import Budget, Plan, fit, fit_latent
from kvtalk.spec import ModelSpec


@dataclass(frozen=True)
class Cost:
    """What a transfer took.

    Attributes:
        bytes: ``len()`` of everything that crossed.
        bits_per_value: those bits, over the values of the whole bf16 cache of the context at the sharer, or at all
            sharers; 0 at a receiver of latents, which does not know it.
        context_tokens: tokens of the context.
        prefill: seconds the sharer read the context.
        encode: seconds to select, plan and encode.
        decode: seconds to verify and unpack the packet.
        place: seconds to turn its keys and put it before the prompt; layer by layer in turns with decoding.
        first_token: seconds from there to the first token of the answer.
        rest: seconds for the rest of the answer.
        each: of several sharers, the bytes of each.
    """

    bytes: int
    bits_per_value: float
    context_tokens: int
    prefill: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    place: float = 0.0
    first_token: float = 0.0
    rest: float = 0.0
    each: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shared:
    """A context as a packet.

    Attributes:
        blob: what crosses.
        plan: how it was packed.
        cost: so far.
    """

    blob: memoryview
    plan: Plan
    cost: Cost


@dataclass(frozen=True)
class Answer:
    """What the receiver answered.

    Attributes:
        text: the answer.
        generation: its tokens and times.
        cost: of the whole way.
        plan: how the cache was packed; None where no cache was used. Of several sharers the first one's.
        plans: of several sharers, each one's.
    """

    text: str
    generation: Generation
    cost: Cost
    plan: Plan | None = None
    plans: tuple[Plan, ...] = ()


class Sharer:
    """The side that reads; holds no weight and no cache of the receiver."""

    def __init__(self, lm: LM, half: SharerHalf | None = None) -> None:
        """Join a model and, for a receiver of another kind, its half of an adapter."""
        self.lm, self.half = lm, half

    def read(self, *contexts: str) -> KVCache:
        """What may be sent of a context, or of several side by side, one row each: caches, or an adapter's latents.

        The sharer's own head is taken off a cache, and what no later token can attend is left out.

        Raises:
            InputError: empty, or longer than the model reads.
        """
        if not contexts or not all(context.strip() for context in contexts):
            raise InputError("the context is empty: give a text to read")
        if self.half is not None:
            return self.half.read(contexts)
        head = self.lm.head_ids()
        cache = self.lm.prefill([head + self.lm.encode(context) for context in contexts])
        return cache.since(self.start).attendable(self.lm.spec)

    @property
    def start(self) -> int:
        """Position of a context's first token."""
        return 0 if self.half is not None else len(self.lm.head_ids())

    def count(self, context: str) -> int:
        """Tokens of a context at the sharer: what bits per value are counted by."""
        return len(self.lm.encode(context))

    def usable(self, plan: Plan | None) -> Plan:
        """What of a plan applies to what this side sends.

        Raises:
            AdapterError: a plan that does not fit an adapter's latents.
            BudgetError: a plan for latents where there is no adapter.
        """
        if self.half is not None:
            return self.half.plan(plan)
        if plan is not None and plan.width is not None:
            raise BudgetError(f"plan {plan}: width= is for latents, give an adapter")
        return plan or Plan()

    def plan(self, cache: KVCache, tokens: int, budget: Budget | str | None, plan: Plan | None, parts: int = 1) -> Plan:
        """The plan to use: the given one, or the best that fits the budget.

        A plan given together with a budget is kept if it fits, else its tokens are thinned until it does.

        Args:
            cache: of one context, as :meth:`read` gives it.
            tokens: of the context, see :meth:`count`.
            budget: bytes that may cross; None for no limit.
            plan: what to send and how; None for the best.
            parts: packets.

        Raises:
            BudgetError: nothing fits.
        """
        given = plan
        if plan is not None or self.half is not None:
            plan = self.usable(plan)
        if budget is None:
            return plan or Plan()
        if isinstance(budget, str):
            budget = Budget.parse(budget)
        limit = budget.bytes_for(tokens, self.lm.spec)

        def size(candidate: Plan) -> int:
            return predict(cache, candidate, self._spec(candidate), self.start, parts)

        if self.half is not None and plan is not None:
            return fit_latent(plan, limit, size, self.half.latent if given is None else None)
        if plan is None:
            return fit(cache, self.lm.spec, limit, size)
        if size(plan) <= limit:
            return plan
        if not plan.keeps_all:
            raise BudgetError(f"this plan takes {size(plan):,} bytes, the budget is {limit:,}: keep fewer tokens")
        return fit(cache, self.lm.spec, limit, size, plan, [plan.rung])

    def encode(self, cache: KVCache, plan: Plan) -> memoryview:
        """The packet, in memory, of a cache that was read with :meth:`read`."""
        return self.encode_rows(cache, [plan])[0]

    def _spec(self, plan: Plan) -> ModelSpec:
        return self.lm.spec if self.half is None else self.half.spec(plan.width)

    def _cut(self, cache: KVCache, plan: Plan) -> KVCache:
        return cache if self.half is None else self.half.cut(cache, plan.width)

    def encode_rows(self, cache: KVCache, plans: Sequence[Plan]) -> list[memoryview]:
        """A packet of each row; rows whose plans differ only in the tokens they keep are packed in one go."""
        plans = plans if self.half is None else [self.half.plan(plan) for plan in plans]

        def pack(part: KVCache, same: Plan, rows: Sequence[int]) -> list[memoryview]:
            return encode_rows(self._cut(part, same), [plans[row] for row in rows], self._spec(same), self.start)

        return pack_rows(cache, plans, pack)

    def share(self, context: str, budget: Budget | str | None = None, plan: Plan | None = None) -> Shared:
        """Read a context and pack its cache into memory.

        Raises:
            InputError: an unusable context.
            BudgetError: a budget that cannot be met.
        """
        packed: list[memoryview] = []

        def pack(cache: KVCache, plan: Plan) -> int:
            packed.append(self.encode(cache, plan))
            return len(packed[0])

        used, cost = self._send(context, budget, plan, 1, pack)
        return Shared(packed[0], used, cost)

    def write(
        self,
        target: BinaryIO,
        context: str,
        budget: Budget | str | None = None,
        plan: Plan | None = None,
        parts: int = 1,
    ) -> tuple[Plan, Cost]:
        """Read a context and write its cache into an open, seekable file, one packet or several by layer group.

        Returns:
            how it was packed, and what that took.

        Raises:
            InputError: an unusable context.
            BudgetError: a budget that cannot be met.
        """

        def pack(cache: KVCache, plan: Plan) -> int:
            return write(target, self._cut(cache, plan), plan, self._spec(plan), self.start, parts)

        return self._send(context, budget, plan, parts, pack)

    def _send(
        self,
        context: str,
        budget: Budget | str | None,
        plan: Plan | None,
        parts: int,
        pack: Callable[[KVCache, Plan], int],
    ) -> tuple[Plan, Cost]:
        """Read, plan, and pack; ``pack`` gives the bytes."""
        with _timed(self.lm) as prefill:
            cache = self.read(context)
        tokens = self.count(context)
        with _timed(self.lm) as encoding:
            plan = self.plan(cache, tokens, budget, plan, parts)
            size = pack(cache, plan)
        return plan, Cost(size, bits_per_value(size, tokens, self.lm), tokens, prefill(), encoding())


class Receiver:
    """The side that answers; never sees the context's text."""

    def __init__(self, lm: LM, half: ReceiverHalf | None = None) -> None:
        """Join a model and, for a sharer of another kind, its half of the adapter."""
        self.lm, self.half = lm, half

    def unpack(self, blob: bytes | bytearray | memoryview) -> Prefix:
        """What a packet, or a stream of packets by layer group, holds: verified, not yet decoded by an adapter.

        Raises:
            PacketError: damaged, or of another model or adapter.
        """
        return prefix(read_stream(blob), self.lm.spec if self.half is None else self.half.spec)

    def decode(self, prefixes: Sequence[Prefix]) -> list[Prefix]:
        """What was unpacked as caches of this model's own kind."""
        return list(prefixes) if self.half is None else self.half.decode(prefixes)

    def prefix(self, blob: bytes | bytearray | memoryview) -> Prefix:
        """A packet, or a stream of packets by layer group, verified and ready to place.

        Raises:
            PacketError: damaged, or of another model.
        """
        return self.decode([self.unpack(blob)])[0]

    def answer(
        self,
        blob: bytes | bytearray | memoryview,
        question: str,
        *,
        gaps: bool = True,
        max_new_tokens: int = 48,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question from a packet.

        Args:
            blob: one packet, or a stream of them by layer group.
            question: what is asked.
            gaps: see :func:`kvtalk.placement.place`.
            max_new_tokens: at most this many.
            streamer: receives tokens as they come.
            options: for `transformers`' ``generate``.

        Raises:
            PacketError: damaged, or of another model.
            InputError: an empty question.
        """
        prompt = self.prompt(question)
        with _timed(self.lm) as opening:
            received = self.prefix(blob)
        decoding = _Stopwatch(self.lm, opening())
        with _timed(self.lm) as both:
            if self.half is None:  # else nothing is packed any more
                received = replace(received, layers=(_Watched(layer, decoding) for layer in received.layers))
            placed = self.lm.place([[received]], room=len(prompt) + max_new_tokens, gaps=gaps)
        decode, place = decoding.seconds, opening() + both() - decoding.seconds
        made = self.lm.generate([prompt], placed, max_new_tokens=max_new_tokens, streamer=streamer, **options)[0]
        tokens = received.length - received.start
        cost = Cost(
            len(blob),
            0.0 if self.half is not None else bits_per_value(len(blob), tokens, self.lm),
            tokens,
            decode=decode,
            place=place,
            first_token=made.first_token_seconds,
            rest=made.rest_seconds,
        )
        return Answer(made.text, made, cost)

    def answer_text(self, context: str | None, question: str, *, max_new_tokens: int = 48, **options: Any) -> Answer:
        """The same question with the context as text before it, or with none: what a transfer is measured against.

        The head is read beforehand, as it is for a cache.
        """
        read = [] if context is None else self.lm.encode(context)
        prompt = [*read, *self.prompt(question)]
        placed = self.lm.place([[]], room=len(prompt) + max_new_tokens)
        made = self.lm.generate([prompt], placed, max_new_tokens=max_new_tokens, **options)[0]
        size = len((context or "").encode())
        cost = Cost(size, 0.0, len(read), first_token=made.first_token_seconds, rest=made.rest_seconds)
        return Answer(made.text, made, cost)

    def prompt(self, question: str) -> list[int]:
        """Tokens of what follows the context.

        Raises:
            InputError: an empty question.
        """
        if not question.strip():
            raise InputError("the question is empty")
        return self.lm.encode(self.lm.prompt.tail(question))


class Link:
    """A sharer and a receiver in one process, joined by real packets.

    Attributes:
        sharer: reads.
        receiver: answers.
        card: of the adapter between them; None where there is none.
    """

    sharer: Sharer
    receiver: Receiver
    card: Card | None

    def __init__(
        self,
        sharer: LM | str,
        receiver: LM | str,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Join two models, or names to load them by; a name given twice is loaded once.

        Args:
            sharer: reads the context.
            receiver: answers.
            adapter: folder or hub id; by default none for equal models, else the one that comes with kvtalk, if any.
            dtype: of models that are loaded here; by default what is fast on the device.

        Raises:
            ModelError: a model cannot be loaded.
            AdapterError: an adapter that is not one, or not for this pair.
        """
        read = LM.load(sharer, dtype=dtype) if isinstance(sharer, str) else sharer
        if isinstance(receiver, str):
            receiver = read if receiver == sharer else LM.load(receiver, dtype=dtype)
        if adapter is None and read.spec.fingerprint != receiver.spec.fingerprint:
            adapter = shipped_for(read.spec, receiver.spec)
        halves = (None, None) if adapter is None else both_halves(adapter, read, receiver)
        self.card = None if halves[0] is None else halves[0].card
        self.sharer, self.receiver = Sharer(read, halves[0]), Receiver(receiver, halves[1])

    def usable(self, plan: Plan) -> Plan:
        """What of a plan applies to this pair.

        Raises:
            AdapterError: a plan that does not fit what crosses.
            BudgetError: a plan for latents where there is no adapter.
        """
        return self.sharer.usable(plan)

    def check(self) -> None:
        """Refuse a pair between which no cache can be sent.

        Raises:
            AdapterError: different models without an adapter; names the command that would train one.
        """
        theirs, ours = self.sharer.lm, self.receiver.lm
        different = theirs.spec.fingerprint.differences(ours.spec.fingerprint)
        if different and self.card is None:
            raise AdapterError(
                f"a cache of {theirs.name} does not fit {ours.name} ({', '.join(different)} differ) and no adapter for "
                f"the two is at hand; train one: kvtalk train translator --sharer {theirs.name} "
                f"--receiver {ours.name} --data TEXTS.jsonl --out FOLDER"
            )

    def warm_up(self) -> None:
        """Read both heads and run the kernels once, so that the first question is timed like any other."""
        self.ask("A text.", "A question?", max_new_tokens=2)

    def ask(
        self,
        context: str,
        question: str,
        *,
        budget: Budget | str | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> Answer:
        """Let the sharer read the context and the receiver answer the question.

        Args:
            context: read by the sharer alone.
            question: read by the receiver alone.
            budget: bytes that may cross, such as ``"200KB"``, ``"4bits"`` or ``"25%"``; None for no limit.
            plan: what to send and how; by default the best that fits the budget.
            options: for :meth:`Receiver.answer`.

        Raises:
            KVTalkError: the context, question, budget or pair of models cannot be used.
        """
        self.receiver.prompt(question)
        self.check()
        shared = self.sharer.share(context, budget, plan)
        answer = self.receiver.answer(shared.blob, question, **options)
        sent = shared.cost
        cost = replace(
            answer.cost,
            prefill=sent.prefill,
            encode=sent.encode,
            context_tokens=sent.context_tokens,
            bits_per_value=sent.bits_per_value,
        )
        return replace(answer, cost=cost, plan=shared.plan)


def pack_rows(
    cache: KVCache, plans: Sequence[Plan], pack: Callable[[KVCache, Plan, Sequence[int]], list[memoryview]]
) -> list[memoryview]:
    """A packet of each row; rows whose plans differ only in the tokens they keep are packed in one go.

    Args:
        cache: of all rows.
        plans: of each.
        pack: packs some rows; is given these, their plan but for the tokens kept, and their numbers.
    """
    blobs: dict[int, memoryview] = {}
    for same in {replace(plan, keep=1.0) for plan in plans}:
        rows = [row for row, plan in enumerate(plans) if replace(plan, keep=1.0) == same]
        part = cache if len(rows) == cache.batch else cache.of_rows(rows)
        blobs.update(zip(rows, pack(part, same, rows), strict=True))
    return [blobs[row] for row in range(cache.batch)]


def bits_per_value(size: int, tokens: int, lm: LM) -> float:
    """Bits of ``size`` bytes over the values of the whole bf16 cache of that many tokens."""
    return 8 * size / (tokens * lm.spec.values_per_token)


class _Stopwatch:
    """Adds up the seconds of what it runs, the device's work included."""

    def __init__(self, lm: LM, seconds: float) -> None:
        self.lm, self.seconds = lm, seconds

    def run(self, work: Callable[[Tensor], None], out: Tensor) -> None:
        """Run ``work`` on ``out``."""
        start = _now(self.lm)
        work(out)
        self.seconds += _now(self.lm) - start


@dataclass(frozen=True, eq=False)
class _Watched:
    """A layer whose unpacking is timed."""

    layer: LayerSource
    watch: _Stopwatch

    @property
    def positions(self) -> Tensor:
        return self.layer.positions

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.shape

    @property
    def kind(self) -> Hashable:
        return _Watched, self.layer.kind

    def stacked(self, others: Sequence[_Watched]) -> _Watched:
        return _Watched(self.layer.stacked([other.layer for other in others]), self.watch)

    def keys_into(self, out: Tensor) -> None:
        self.watch.run(self.layer.keys_into, out)

    def values_into(self, out: Tensor) -> None:
        self.watch.run(self.layer.values_into, out)


@contextmanager
def _timed(lm: LM) -> Iterator[Callable[[], float]]:
    """Yields a function that gives the seconds the block took, the device's work included."""
    end = start = _now(lm)
    yield lambda: end - start
    end = _now(lm)


def _now(lm: LM) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()
