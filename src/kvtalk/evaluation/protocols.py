"""How an answer is drawn from a model: in words, as a letter, or by the likelihood of each option."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvtalk.device import sent
from kvtalk.errors import InputError
from kvtalk.evaluation.data import Choice, Item, Passage
from kvtalk.evaluation.letters import read_as_published, read_strictly
from kvtalk.evaluation.metrics import METRICS
from kvtalk.evaluation.tasks.base import BACKGROUND_PROMPT, LETTER_PROMPT, Task, options
from kvtalk.link import Receiver
from kvtalk.loading import bos
from kvtalk.models import LM
from kvtalk.placed import PlacedCache
from kvtalk.prompts import has_chat_template, render
from kvtalk.shared_prompts import Prompt, chat_prompt, prompt_of

LETTER_TOKENS = 64
"""As C2C."""

_BACKGROUND_STOP = ("\n\n",)
"""A model without a chat template knows no other end of an answer."""

RELAY_QUESTION = "What does the text say that helps to answer this question: {question}"


@dataclass(frozen=True)
class Outcome:
    """What came of one item.

    Attributes:
        answer: what the model wrote, or the letter of the option it finds most likely.
        scores: each 0 to 1, but ``nll`` in nats a token.
        confidence: how probable the model found its answer, 0 to 1.
        likelihoods: log-likelihood (nats) of each option, where those were compared.
    """

    answer: str
    scores: dict[str, float]
    confidence: float
    likelihoods: tuple[float, ...] = field(default=())


class Protocol(ABC):
    """One way to ask.

    Attributes:
        head: whether the model's own head (its BOS and what it says before any context) stands before the prompt.
    """

    name: ClassVar[str]
    head: ClassVar[bool]

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores, the leading one first."""

    @property
    @abstractmethod
    def answer_tokens(self) -> int:
        """How many tokens the model may write."""

    @abstractmethod
    def prompt_facts(self, lm: LM) -> dict[str, Any]:
        """Every text that goes around a question, for the manifest."""

    @property
    def room(self) -> int:
        """Columns to reserve for an answer, its own or an accepted one."""
        return self.answer_tokens + 64

    @abstractmethod
    def prompt(self, side: Receiver, item: Item, background: str | None) -> list[int]:
        """Tokens of the question, after a text that helps if there is one."""

    @abstractmethod
    def fused_prompts(self, sharer: LM, receiver: LM, item: Item) -> tuple[Prompt, Prompt]:
        """What both models read of one item where their caches are fused."""

    @abstractmethod
    def relay_prompt(self, side: Receiver, item: Item) -> list[int]:
        """Tokens that ask a sharer to write down what helps."""

    def answer_stop(self, lm: LM) -> Sequence[str]:
        """What ends an answer besides the model's own end of text."""
        return ()

    @abstractmethod
    def relay_stop(self, lm: LM) -> Sequence[str]:
        """What ends the text that a sharer writes."""

    @abstractmethod
    def answer(
        self,
        lm: LM,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        placed: PlacedCache,
        temperature: float = 0.0,
    ) -> list[Outcome]:
        """Ask; uses the placed cache up. At a temperature above 0 answers are sampled."""


class Free(Protocol):
    """The model answers in a few words; also the likelihood of the first accepted answer."""

    name = "free"
    head = True

    def __init__(self, task: Task, metrics: Sequence[str] | None = None, embedder: str = "") -> None:
        super().__init__(task)
        self._metrics = tuple(metrics or task.metrics)
        self.embedder = embedder

    @property
    def metrics(self) -> tuple[str, ...]:
        return self._metrics

    @property
    def answer_tokens(self) -> int:
        return self.task.max_new_tokens

    def prompt_facts(self, lm: LM) -> dict[str, Any]:
        return {**asdict(lm.prompt), "relay": RELAY_QUESTION}

    def prompt(self, side: Receiver, item: Item, background: str | None) -> list[int]:
        return (side.lm.encode(background) if background else []) + side.prompt(item.question)

    def fused_prompts(self, sharer: LM, receiver: LM, item: Item) -> tuple[Prompt, Prompt]:
        """The sharer reads the context, the receiver the question alone."""
        assert isinstance(item, Passage)
        theirs = prompt_of(sharer.prompt, item.question, item.context)
        return theirs, prompt_of(receiver.prompt, item.question)

    def relay_prompt(self, side: Receiver, item: Item) -> list[int]:
        assert isinstance(item, Passage)
        return side.lm.encode(item.context) + side.prompt(RELAY_QUESTION.format(question=item.question))

    def answer_stop(self, lm: LM) -> Sequence[str]:
        return lm.prompt.stop

    def relay_stop(self, lm: LM) -> Sequence[str]:
        return lm.prompt.stop

    def answer(
        self,
        lm: LM,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        placed: PlacedCache,
        temperature: float = 0.0,
    ) -> list[Outcome]:
        passages = [item for item in items if isinstance(item, Passage)]
        nlls = _answer_nll(lm, passages, prompts, placed)
        made = lm.generate(prompts, placed, max_new_tokens=self.answer_tokens, logprobs=True, **_sampling(temperature))
        texts = [generation.text for generation in made]
        named = [name for name in self.metrics if name != "nll"]
        columns = [METRICS[name].score(texts, passages, self.embedder) for name in named]
        for item, nll in zip(passages, nlls, strict=True):
            _check_finite(lm, item, torch.tensor(nll))
        return [
            Outcome(
                texts[row],
                {
                    **{name: round(column[row], 4) for name, column in zip(named, columns, strict=True)},
                    "nll": round(nlls[row], 4),
                },
                round(torch.tensor(made[row].logprob or 0.0).exp().item(), 4),
            )
            for row in range(len(items))
        ]


class Choosing(Protocol):
    """Multiple choice: the prompt is whole, and a sharer is asked for background as in C2C."""

    head = False

    def relay_prompt(self, side: Receiver, item: Item) -> list[int]:
        request = BACKGROUND_PROMPT.format(question=item.question)
        return _begun(side.lm, render(side.lm.tokenizer, [request]))

    def relay_stop(self, lm: LM) -> Sequence[str]:
        return _BACKGROUND_STOP


class Letter(Choosing):
    """The model writes the letter of an option.

    ``acc`` reads it strictly, ``parsed`` says where one was found, ``acc_published`` reads it as C2C does.
    """

    name = "letter"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("acc", "parsed", "acc_published")

    @property
    def answer_tokens(self) -> int:
        return LETTER_TOKENS

    def prompt_facts(self, lm: LM) -> dict[str, Any]:
        return {"question": LETTER_PROMPT, "relay": BACKGROUND_PROMPT, "chat": has_chat_template(lm.tokenizer)}

    def prompt(self, side: Receiver, item: Item, background: str | None) -> list[int]:
        assert isinstance(item, Choice)
        turns = [LETTER_PROMPT.format(question=item.question, choices=options(item))]
        if background is not None:
            turns = [BACKGROUND_PROMPT.format(question=item.question), background, *turns]
        return _begun(side.lm, render(side.lm.tokenizer, turns))

    def fused_prompts(self, sharer: LM, receiver: LM, item: Item) -> tuple[Prompt, Prompt]:
        assert isinstance(item, Choice)
        turn = LETTER_PROMPT.format(question=item.question, choices=options(item))
        return chat_prompt(sharer.tokenizer, turn), chat_prompt(receiver.tokenizer, turn)

    def answer(
        self,
        lm: LM,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        placed: PlacedCache,
        temperature: float = 0.0,
    ) -> list[Outcome]:
        made = lm.generate(
            prompts,
            placed,
            max_new_tokens=LETTER_TOKENS,
            logprobs=True,
            stop=self.answer_stop(lm),
            **_sampling(temperature),
        )
        outcomes = []
        for item, generation in zip(items, made, strict=True):
            assert isinstance(item, Choice)
            letter, right = read_strictly(generation.text, len(item.choices)), chr(65 + item.answer)
            scores = {
                "acc": float(letter == right),
                "parsed": float(bool(letter)),
                "acc_published": float(read_as_published(generation.text) == right),
            }
            confidence = round(torch.tensor(generation.logprob or 0.0).exp().item(), 4)
            outcomes.append(Outcome(generation.text, scores, confidence if letter else 0.0))
        return outcomes


class Likelihood(Choosing):
    """The option that the model finds most likely after the question.

    ``acc_norm`` divides an option's log-likelihood by its characters, ``acc`` does not, both as lm-evaluation-harness.
    """

    name = "likelihood"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("acc_norm", "acc")

    @property
    def answer_tokens(self) -> int:
        return 0

    def prompt_facts(self, lm: LM) -> dict[str, Any]:
        texts = [*self.task.question_prompt, self.task.option_prefix]
        return {"question": texts, "relay": BACKGROUND_PROMPT, "chat": has_chat_template(lm.tokenizer)}

    def prompt(self, side: Receiver, item: Item, background: str | None) -> list[int]:
        before, after = self.task.question_prompt
        text = f"{before}{item.question}{after}"
        return _begun(side.lm, text if background is None else f"{background}\n\n{text}")

    def fused_prompts(self, sharer: LM, receiver: LM, item: Item) -> tuple[Prompt, Prompt]:
        before, after = self.task.question_prompt
        prompt = Prompt("", f"{before}{item.question}{after}")
        return prompt, prompt

    def answer(
        self,
        lm: LM,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        placed: PlacedCache,
        temperature: float = 0.0,
    ) -> list[Outcome]:
        choices = [item for item in items if isinstance(item, Choice)]
        rows = [(row, self._continuation(lm, choice)) for row, item in enumerate(choices) for choice in item.choices]
        found = iter(_likelihoods(lm, prompts, placed, rows))
        outcomes = []
        for item in choices:
            sums = torch.tensor([next(found) for _ in item.choices], dtype=torch.float64)
            _check_finite(lm, item, sums)
            normal = sums / torch.tensor([float(len(choice)) for choice in item.choices])
            best, best_raw = int(normal.argmax()), int(sums.argmax())
            scores = {"acc_norm": float(best == item.answer), "acc": float(best_raw == item.answer)}
            confidence = round(float(normal.softmax(0)[best]), 4)
            likelihoods = tuple(round(value, 5) for value in sums.tolist())
            outcomes.append(Outcome(chr(65 + best), scores, confidence, likelihoods))
        return outcomes

    def _continuation(self, lm: LM, choice: str) -> list[int]:
        return lm.encode(f"{self.task.option_prefix}{choice}")


PROTOCOLS: dict[str, type[Protocol]] = {protocol.name: protocol for protocol in (Free, Letter, Likelihood)}


def protocol_for(
    task: Task, name: str | None = None, metrics: Sequence[str] | None = None, embedder: str = ""
) -> Protocol:
    """How to ask a task's questions.

    Args:
        task: the task.
        name: of the protocol; by default the task's first.
        metrics: for answers in words; by default the task's own.
        embedder: the embedding model that metrics of relevance use.

    Raises:
        InputError: a protocol that the task does not know, or metrics for one that has its own.
    """
    name = name or task.protocols[0]
    if name not in task.protocols:
        raise InputError(f"{task.name} has no protocol {name!r}; there are {', '.join(task.protocols)}")
    if name == Free.name:
        return Free(task, metrics, embedder)
    made = PROTOCOLS[name](task)
    if metrics and set(metrics) - set(made.metrics):
        raise InputError(f"no metric {metrics[0]!r} in the protocol {name}; there are {', '.join(made.metrics)}")
    return made


def _check_finite(lm: LM, item: Item, scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"{lm.name} gives NaN or infinity in {lm.spec.dtype} for item {item.id}: use another --dtype")


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {}


def _begun(lm: LM, text: str) -> list[int]:
    return bos(lm.tokenizer) + lm.encode(text)


def _answer_nll(lm: LM, items: Sequence[Passage], prompts: Sequence[list[int]], placed: PlacedCache) -> list[float]:
    """Nats a token of the first accepted answer after each prompt; leaves the placed cache as it was."""
    answers = [lm.encode(" " + item.answers[0]) for item in items]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    before = placed.mark()
    logits = lm.logits(rows, placed, keep=max(map(len, answers)) + 1)
    placed.rewind(before)
    return [-float(told.mean()) for told in _ending(logits[:, :-1], answers)]


_LOGITS = 1 << 28
"""Logits to compute at a time: 1,024 tokens of a vocabulary of 262k."""
_WIDENED = 1 << 25
"""Of these to hold in float32 at a time."""


def _likelihoods(
    lm: LM, prompts: Sequence[list[int]], placed: PlacedCache, rows: Sequence[tuple[int, list[int]]]
) -> list[float]:
    """Log-likelihood of each continuation after its prompt, which is read once for all of them."""
    last = lm.logits(prompts, placed, keep=1)
    firsts = _logprobs(last, [row for row, _ in rows], [0] * len(rows), [ids[0] for _, ids in rows])
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][1]))
    for chunk in _chunks([len(rows[index][1]) for index in order], _LOGITS // last.shape[-1]):
        which = order[chunk]
        continuations = [rows[index][1] for index in which]
        if max(map(len, continuations)) > 1:
            logits = lm.logits(continuations, placed.rows([rows[index][0] for index in which]))
            others: Sequence[Tensor] = _ending(logits[:, :-1], [ids[1:] for ids in continuations])
        else:
            others = [firsts[:0]] * len(which)
        for index, rest in zip(which, others, strict=True):
            found[index] = float(torch.cat([firsts[index : index + 1], rest]).sum())
    return found


def _chunks(lengths: Sequence[int], limit: int) -> list[slice]:
    """Ranges of ascending lengths whose padded size stays within a limit; a single row may exceed it."""
    ranges, begin = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - begin) * lengths[end] > limit:
            ranges.append(slice(begin, end))
            begin = end
    return ranges


def _ending(logits: Tensor, tokens: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """Log-probability of each token; ``logits``, ``[rows, steps, vocabulary]``, end where the tokens end."""
    counts, steps = [len(ids) for ids in tokens], logits.shape[1]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    places = [step for count in counts for step in range(steps - count, steps)]
    return torch.split(_logprobs(logits, rows, places, [token for ids in tokens for token in ids]), counts)


def _logprobs(logits: Tensor, rows: Sequence[int], steps: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Log-probability of so many tokens, each at a row and a step of ``[rows, steps, vocabulary]``, on the CPU."""
    where = sent(torch.tensor([rows, steps, tokens]), logits.device)
    found = []
    for row, step, token in torch.split(where, max(1, _WIDENED // logits.shape[-1]), dim=1):
        told = logits[row, step].float()
        found.append(told.gather(1, token[:, None])[:, 0] - told.logsumexp(dim=-1))
    return torch.cat(found).cpu()
