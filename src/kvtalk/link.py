"""Sharer and receiver, joined: ask a question about a context that only the sharer reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvtalk import packet as wire
from kvtalk.cache import KVCache, LayerSource, Prefix
from kvtalk.errors import BudgetError, InputError
from kvtalk.models import LM, Generation
from kvtalk.planning import Budget, Plan, fit


@dataclass(frozen=True)
class Cost:
    """What a transfer took.

    Attributes:
        bytes: ``len()`` of everything that crossed.
        bits_per_value: those bits, over the values of the whole bf16 cache of the context.
        context_tokens: tokens of the context.
        prefill: seconds the sharer read the context.
        encode: seconds to select, plan and encode.
        decode: seconds to verify and unpack the packet.
        place: seconds to turn its keys and put it before the prompt; layer by layer in turns with decoding.
        first_token: seconds from there to the first token of the answer.
        rest: seconds for the rest of the answer.
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
        plan: how the cache was packed; None where no cache was used.
    """

    text: str
    generation: Generation
    cost: Cost
    plan: Plan | None = None


class Sharer:
    """The side that reads; holds nothing of the receiver."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def read(self, *contexts: str) -> KVCache:
        """The cache of a context, or of several side by side, one row each.

        The sharer's own head is taken off, and what no later token can attend is left out.

        Raises:
            InputError: empty, or longer than the model reads.
        """
        if not contexts or not all(context.strip() for context in contexts):
            raise InputError("the context is empty: give a text to read")
        head = self.lm.head_ids()
        cache = self.lm.prefill([head + self.lm.encode(context) for context in contexts])
        return cache.since(self.start).attendable(self.lm.spec)

    @property
    def start(self) -> int:
        """Position of a context's first token."""
        return len(self.lm.head_ids())

    def plan(self, cache: KVCache, budget: Budget | str | None, plan: Plan | None, parts: int = 1) -> Plan:
        """The plan to use: the given one, or the best that fits the budget.

        A plan given together with a budget is kept if it fits, else its tokens are thinned until it does.

        Raises:
            BudgetError: nothing fits.
        """
        if budget is None:
            return plan or Plan()
        if isinstance(budget, str):
            budget = Budget.parse(budget)
        limit = budget.bytes_for(cache.length[0] - self.start, self.lm.spec)

        start = self.start

        def size(candidate: Plan) -> int:
            return wire.predict(cache, candidate, self.lm.spec, start, parts)

        if plan is None:
            return fit(cache, self.lm.spec, limit, size)
        if size(plan) <= limit:
            return plan
        if not plan.keeps_all:
            raise BudgetError(f"this plan takes {size(plan):,} bytes, the budget is {limit:,}: keep fewer tokens")
        return fit(cache, self.lm.spec, limit, size, plan, [plan.rung])

    def encode(self, cache: KVCache, plan: Plan) -> memoryview:
        """The packet, in memory, of a cache that was read with :meth:`read`."""
        return wire.encode(cache, plan, self.lm.spec, self.start)

    def encode_rows(self, cache: KVCache, plans: Sequence[Plan]) -> list[memoryview]:
        """A packet of each row; rows whose plans differ only in the tokens they keep are packed in one go."""
        blobs: dict[int, memoryview] = {}
        for same in {replace(plan, keep=1.0) for plan in plans}:
            rows = [row for row, plan in enumerate(plans) if replace(plan, keep=1.0) == same]
            part = cache if len(rows) == cache.batch else cache.of_rows(rows)
            made = wire.encode_rows(part, [plans[row] for row in rows], self.lm.spec, self.start)
            blobs.update(zip(rows, made, strict=True))
        return [blobs[row] for row in range(cache.batch)]

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
            return wire.write(target, cache, plan, self.lm.spec, self.start, parts)

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
        with _timed(self.lm) as encoding:
            plan = self.plan(cache, budget, plan, parts)
            size = pack(cache, plan)
        tokens = cache.length[0] - self.start
        return plan, Cost(size, bits_per_value(size, tokens, self.lm), tokens, prefill(), encoding())


class Receiver:
    """The side that answers; never sees the context's text."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def prefix(self, blob: bytes | bytearray | memoryview) -> Prefix:
        """A packet, or a stream of packets by layer group, verified and ready to place.

        Raises:
            PacketError: damaged, or of another model.
        """
        return wire.prefix(wire.read_stream(blob), self.lm.spec)

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
            watched = replace(received, layers=(_Watched(layer, decoding) for layer in received.layers))
            placed = self.lm.place([[watched]], room=len(prompt) + max_new_tokens, gaps=gaps)
        decode, place = decoding.seconds, opening() + both() - decoding.seconds
        made = self.lm.generate([prompt], placed, max_new_tokens=max_new_tokens, streamer=streamer, **options)[0]
        tokens = received.length - received.start
        cost = Cost(
            len(blob),
            bits_per_value(len(blob), tokens, self.lm),
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
    """A sharer and a receiver of the same model in one process, joined by real packets."""

    def __init__(self, sharer: LM | str, receiver: LM | str, *, dtype: torch.dtype | None = None) -> None:
        """Join two models, or names to load them by; a name given twice is loaded once.

        Args:
            sharer: reads the context.
            receiver: answers.
            dtype: of models that are loaded here; by default what is fast on the device.

        Raises:
            ModelError: a model cannot be loaded.
        """
        read = LM.load(sharer, dtype=dtype) if isinstance(sharer, str) else sharer
        if isinstance(receiver, str):
            receiver = read if receiver == sharer else LM.load(receiver, dtype=dtype)
        self.sharer, self.receiver = Sharer(read), Receiver(receiver)

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
        shared = self.sharer.share(context, budget, plan)
        answer = self.receiver.answer(shared.blob, question, **options)
        cost = replace(answer.cost, prefill=shared.cost.prefill, encode=shared.cost.encode)
        return replace(answer, cost=cost, plan=shared.plan)


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
