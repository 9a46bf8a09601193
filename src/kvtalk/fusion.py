"""Fused placement: the receiver reads the same prompt as its sharers, and its cache is enriched by theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvtalk.adapters.cards import read_card, shipped_for
from kvtalk.adapters.earlier import Earlier
from kvtalk.adapters.enriched import Own
from kvtalk.adapters.fusing import ReceiverSide, SharerSide, receiver_side, sharer_side
from kvtalk.cache import KVCache, Prefix
from kvtalk.errors import AdapterError, BudgetError, InputError
from kvtalk.link import Answer, Cost, Link, Receiver, Sharer, bits_per_value, pack_rows
from kvtalk.models import LM
from kvtalk.packet import prefix, read_stream
from kvtalk.packet_writing import encode_rows, predict
from kvtalk.placed import PlacedCache
from kvtalk.planning import LADDER, LAST_RESORT, Budget, Plan, fit
from kvtalk.shared_prompts import Prompt, prompt_after, prompt_of, text_digest

Budgets = Budget | str | Sequence[Budget | str] | None
"""Of all sharers alike, or of each."""


class FusedSharer:
    """The side that lends its cache of the prompt; holds no weight and no cache of the receiver.

    Attributes:
        side: the model and what the fuser reads of it.
    """

    def __init__(self, side: SharerSide) -> None:
        self.side = side

    def read(self, *prompts: Prompt, earlier: Earlier | None = None) -> KVCache:
        """What may be sent of prompts: the aligned tokens in the layers that the fuser reads, one row each.

        Packets of it are made with the same prompts. ``earlier`` holds the turns before a single prompt.

        Raises:
            InputError: an empty text.
            AlignmentError: nothing of it aligns.
        """
        if not prompts or not all(prompt.shared.strip() for prompt in prompts):
            raise InputError("the question is empty")
        return self.side.read(prompts, earlier)

    def plan(self, cache: KVCache, budget: Budget | str | None, plan: Plan | None) -> Plan:
        """The plan to use: the given one, or the best that fits the budget; with both, tokens are thinned to fit.

        Args:
            cache: of one prompt, as :meth:`read` gives it.
            budget: bytes that may cross, in shares and bits of the sharer's whole cache of the text and the words after
                it; None for no limit.
            plan: codecs and token policy; None for the best.

        Raises:
            BudgetError: nothing fits.
        """
        spec, used = self.side.spec, self.side.plan(plan)
        if budget is None:
            return used
        limit = (Budget.parse(budget) if isinstance(budget, str) else budget).bytes_for(cache.length[0], spec)

        def size(candidate: Plan) -> int:
            return predict(cache, candidate, spec, text=text_digest(""))

        if plan is not None and size(used) <= limit:
            return used
        if plan is not None:
            return fit(cache, spec, limit, size, used, [used.rung])
        ladder, last_resort = ([replace(rung, rope=used.rope) for rung in rungs] for rungs in (LADDER, LAST_RESORT))
        try:
            return fit(cache, spec, limit, size, used, ladder)
        except BudgetError:
            return fit(cache, spec, limit, size, used, last_resort)

    def encode_rows(self, prompts: Sequence[Prompt], cache: KVCache, plans: Sequence[Plan]) -> list[memoryview]:
        """A packet of each prompt.

        Args:
            prompts: what was read.
            cache: of it, as :meth:`read` gives it.
            plans: of each.
        """
        plans = [self.side.plan(plan) for plan in plans]
        texts = [text_digest(prompt.shared) for prompt in prompts]

        def pack(part: KVCache, same: Plan, rows: Sequence[int]) -> list[memoryview]:
            which = [plans[row] for row in rows]
            scored = self.side.scored(part, same)
            return encode_rows(scored, which, self.side.spec, texts=[texts[row] for row in rows])

        return pack_rows(cache, plans, pack)

    def bits(self, blob: memoryview, tokens: int) -> float:
        """Bits per value of a packet, of the sharer's whole bf16 cache of so many tokens."""
        return bits_per_value(len(blob), tokens, self.side.lm)


class FusedReceiver:
    """The side that answers: reads the prompt itself and adds what sharers send.

    Attributes:
        lm: the receiver.
        sides: a fuser for each sharer.
    """

    def __init__(self, lm: LM, sides: Sequence[ReceiverSide]) -> None:
        """Put fusers beside the receiver.

        Raises:
            AdapterError: several, of which one takes the place of the receiver's own cache.
        """
        if len(sides) > 1 and not all(side.geometry.residual for side in sides):
            raise AdapterError(
                "a fuser without residual replaces the receiver's own cache: it cannot be one of several"
            )
        self.lm, self.sides = lm, list(sides)

    def unpack(self, sharer: int, blob: memoryview) -> Prefix:
        """What a packet of a sharer holds, verified.

        Raises:
            PacketError: damaged, or of another model.
        """
        return prefix(read_stream(blob), self.sides[sharer].spec)

    @torch.no_grad()
    def fuse(
        self, prompts: Sequence[Prompt], received: Sequence[Sequence[Prefix]], earlier: Earlier | None = None
    ) -> tuple[list[list[int]], PlacedCache]:
        """Read prompts and enrich their cache.

        Residuals of several sharers are summed over the receiver's clean cache.

        Args:
            prompts: what the receiver reads.
            received: of each sharer, what its packet of each prompt holds.
            earlier: of a single prompt, the turns before it; they stay as they are.

        Returns:
            the last token of each prompt, and the cache that it follows.

        Raises:
            InputError: a sharer read another text.
        """
        own = Own(self.lm, prompts, earlier)
        additions = [
            addition
            for side, prefixes in zip(self.sides, received, strict=True)
            for addition in side.additions(own, prompts, prefixes)
        ]
        return own.last, own.placed(additions)


class Fusion:
    """A receiver and its sharers in one process, joined by real packets.

    Attributes:
        sharers: lend their caches.
        receiver: answers.
    """

    def __init__(
        self,
        receiver: LM | str | None,
        sharers: Sequence[LM | str] = (),
        fusers: Sequence[str | Path] = (),
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Join models, or names to load them by.

        Args:
            receiver: answers; None for the one that the first fuser was trained for.
            sharers: by default those that the fusers were trained with.
            fusers: a folder, a hub id or the name of one that comes with kvtalk for each sharer; by default what
                comes with kvtalk.
            dtype: of models that are loaded here.

        Raises:
            ModelError: a model cannot be loaded.
            AdapterError: no fuser for a pair, or not for this one.
        """
        if not sharers and not fusers:
            raise AdapterError("give a sharer, or a fuser whose sharer is loaded")
        cards = [read_card(name, "fuser")[0] for name in fusers]
        if receiver is None and not cards:
            raise AdapterError("give a receiver, or a fuser whose receiver is loaded")
        wanted = cards[0].receiver.name if receiver is None else receiver
        lm = LM.load(wanted, dtype=dtype) if isinstance(wanted, str) else wanted
        named = sharers or [card.sharer.name for card in cards]
        loaded = [LM.load(one, dtype=dtype) if isinstance(one, str) else one for one in named]
        names = list(fusers) or [_shipped(one, lm) for one in loaded]
        if len(names) != len(loaded):
            raise AdapterError(f"{len(names)} fusers for {len(loaded)} sharers: give one for each")
        self.sharers = [FusedSharer(sharer_side(name, one)) for name, one in zip(names, loaded, strict=True)]
        self.receiver = FusedReceiver(lm, [receiver_side(name, lm) for name in names])

    def ask(
        self,
        question: str,
        context: str | None = None,
        *,
        private: bool = False,
        budget: Budgets = None,
        plan: Plan | None = None,
        max_new_tokens: int = 48,
        **options: Any,
    ) -> Answer:
        """Let all models read a question, and the receiver answer it.

        Args:
            question: read by all.
            context: a text before it, read by all.
            private: only the sharers read the context; what crosses is their cache of the question.
            budget: bytes that may cross from each sharer; a list has one for each.
            plan: what of a sharer's cache to send and how; by default the best that fits the budget.
            max_new_tokens: at most so many.
            options: for `transformers`' ``generate``.

        Raises:
            KVTalkError: the question, budget or pair of models cannot be used.
        """
        if not question.strip():
            raise InputError("the question is empty")
        form = self.receiver.lm.prompt
        theirs = [sharer.side.lm.prompt for sharer in self.sharers]
        if context is None or private:
            prompts, ours = [prompt_of(one, question, context or "") for one in theirs], prompt_of(form, question)
        else:
            space = " " if form.head.endswith(" ") else ""  # belongs to the word after it
            shared = f"{space}{context}{form.before_question}{question}"
            made = [Prompt(one.head.removesuffix(" "), shared, one.after_question) for one in (*theirs, form)]
            prompts, ours = made[:-1], made[-1]
        return self.answer(prompts, ours, budget=budget, plan=plan, max_new_tokens=max_new_tokens, **options)

    def conversation(self) -> Conversation:
        """Questions one after the other, each fused without redoing those before it."""
        return Conversation(self)

    def answer(
        self,
        theirs: Sequence[Prompt],
        ours: Prompt,
        *,
        budget: Budgets = None,
        plan: Plan | None = None,
        max_new_tokens: int = 48,
        turns: Turns | None = None,
        **options: Any,
    ) -> Answer:
        """Let every model read a prompt of its own around the same text, and the receiver answer.

        Args:
            theirs: what each sharer reads.
            ours: what the receiver reads.
            budget: see :meth:`ask`.
            plan: see :meth:`ask`.
            max_new_tokens: see :meth:`ask`.
            turns: what all have read of a conversation; grows by this question and its answer.
            options: see :meth:`ask`.

        Raises:
            KVTalkError: the prompts, budget or pair of models cannot be used.
        """
        turns = turns or Turns(Earlier(), [Earlier() for _ in self.sharers])
        budgets = self._budgets(budget)
        with turns.kept():
            return self._answered(theirs, ours, budgets, plan, max_new_tokens, turns, options)

    def _answered(
        self,
        theirs: Sequence[Prompt],
        ours: Prompt,
        budgets: Sequence[Budget | str | None],
        plan: Plan | None,
        max_new_tokens: int,
        turns: Turns,
        options: dict[str, Any],
    ) -> Answer:
        plans: list[Plan] = []
        sizes: list[int] = []
        values, tokens, sent = 0, 0, []
        clock = _Clock(self.receiver.lm)
        every = zip(self.sharers, theirs, turns.theirs, budgets, strict=True)
        for number, (sharer, prompt, earlier, allowed) in enumerate(every):
            cache = sharer.read(prompt, earlier=earlier)
            clock.lap("prefill")
            plans.append(sharer.plan(cache, allowed, plan))
            blob = sharer.encode_rows([prompt], cache, plans[-1:])[0]
            clock.lap("encode")
            sent.append([self.receiver.unpack(number, blob)])
            clock.lap("decode")
            sizes.append(len(blob))
            tokens += cache.length[0]
            values += cache.length[0] * sharer.side.lm.spec.values_per_token
        last, placed = self.receiver.fuse([ours], sent, turns.ours)
        clock.lap("place")
        made = self.receiver.lm.generate(last, placed, max_new_tokens=max_new_tokens, **options)[0]
        turns.ours = Earlier(placed, list(made.ids[-1:]))
        seconds = {**clock.seconds, "first_token": made.first_token_seconds, "rest": made.rest_seconds}
        several = len(sizes) > 1
        each = tuple(sizes) if several else ()
        cost = Cost(sum(sizes), 8 * sum(sizes) / values, tokens, **seconds, each=each)
        return Answer(made.text, made, cost, plans[0], tuple(plans) if several else ())

    def _budgets(self, budget: Budgets) -> list[Budget | str | None]:
        """Of each sharer.

        Raises:
            BudgetError: another number of them.
        """
        if budget is None or isinstance(budget, Budget | str):
            return [budget] * len(self.sharers)
        if len(budget) != len(self.sharers):
            raise BudgetError(
                f"{len(budget)} budgets for {len(self.sharers)} sharers: give one for each, or one for all"
            )
        return list(budget)


@dataclass
class Turns:
    """What the models have read of a conversation.

    Attributes:
        ours: the receiver.
        theirs: each sharer.
    """

    ours: Earlier
    theirs: list[Earlier]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What all have read of earlier turns stays as it is, if this one fails."""
        before = [(one, one.placed, one.placed and one.placed.mark(), one.unread) for one in (self.ours, *self.theirs)]
        try:
            yield
        except BaseException:
            for one, placed, mark, unread in before:
                one.placed, one.unread = placed, unread
                if placed is not None and mark is not None:
                    placed.rewind(mark)
            raise


class Conversation:
    """Questions one after the other. A turn's packets hold that turn alone, and only it is fused: earlier turns stay in
    every model's cache as they are.
    """

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion
        self.turns = Turns(Earlier(), [Earlier() for _ in fusion.sharers])
        self._answer: str | None = None

    def ask(self, question: str, **options: Any) -> Answer:
        """The next question.

        Args:
            question: read by all.
            options: for :meth:`Fusion.answer`; no beams.

        Raises:
            KVTalkError: the question, budget or pair of models cannot be used.
        """
        if not question.strip():
            raise InputError("the question is empty")
        lms = [sharer.side.lm for sharer in self.fusion.sharers]
        lm, said = self.fusion.receiver.lm, self._answer
        if said is None:
            theirs, ours = [prompt_of(one.prompt, question) for one in lms], prompt_of(lm.prompt, question)
        else:
            unread = lm.tokenizer.decode(self.turns.ours.unread)
            whole = prompt_after(lm, unread, question)
            ours = replace(whole, before=whole.before.removeprefix(unread))
            theirs = [prompt_after(one, f" {said}", question) for one in lms]
        made = self.fusion.answer(theirs, ours, turns=self.turns, **options)
        self._answer = made.text
        return made


class FusedLink(Link):
    """A sharer and a receiver that are fused, as something to evaluate.

    Attributes:
        fusion: of both.
        own: the receiver with itself as the sharer, for the control ``self``; None without a fuser for that.
    """

    def __init__(
        self,
        sharer: LM | str | None,
        receiver: LM | str,
        fuser: str | Path | None = None,
        own: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Join two models, or names to load them by.

        Args:
            sharer: lends its cache; None for the one that the fuser was trained with.
            receiver: answers.
            fuser: folder, hub id or name; by default the one that comes with kvtalk.
            own: the same for the receiver as its own sharer.
            dtype: of models that are loaded here.

        Raises:
            ModelError: a model cannot be loaded.
            AdapterError: no fuser, or not for this pair.
        """
        fusers = [] if fuser is None else [fuser]
        self.fusion = Fusion(receiver, [] if sharer is None else [sharer], fusers, dtype=dtype)
        lm = self.fusion.receiver.lm
        self.own = None if own is None else Fusion(lm, [lm], [own])
        self.card = self.fusion.sharers[0].side.card
        self.sharer, self.receiver = Sharer(self.fusion.sharers[0].side.lm), Receiver(lm)

    def usable(self, plan: Plan) -> Plan:
        """What of a plan applies to this pair; see :meth:`kvtalk.link.Link.usable`."""
        return self.fusion.sharers[0].side.plan(plan)

    def ask(
        self,
        context: str,
        question: str,
        *,
        budget: Budget | str | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> Answer:
        """Let the sharer read the context, both models the question, and the receiver answer it.

        Args:
            context: read by the sharer alone.
            question: read by both.
            budget: see :meth:`Link.ask`.
            plan: see :meth:`Link.ask`.
            options: for :meth:`Fusion.ask`.

        Raises:
            KVTalkError: the context, question, budget or pair of models cannot be used.
        """
        return self.fusion.ask(question, context, private=True, budget=budget, plan=plan, **options)


def _shipped(sharer: LM, receiver: LM) -> Path:
    folder = shipped_for(sharer.spec, receiver.spec, "fuser")
    if folder is None:
        raise AdapterError(
            f"no fuser from {sharer.name} to {receiver.name} is at hand; train one: kvtalk train fuser "
            f"--sharer {sharer.name} --receiver {receiver.name} --data TEXTS.jsonl --out FOLDER"
        )
    return folder


class _Clock:
    """Seconds of each stage, the device's work included."""

    def __init__(self, lm: LM) -> None:
        self.lm, self.seconds, self._at = lm, dict.fromkeys(("prefill", "encode", "decode", "place"), 0.0), 0.0
        self._at = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] += now - self._at
        self._at = now

    def _now(self) -> float:
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)
        return time.perf_counter()
