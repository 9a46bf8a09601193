"""What a fuser is trained on: prompts that both models read, and what the receiver should answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import xxhash
from torch.utils.data import Dataset

from kvtalk.adapters.fusing import Pairs, Prompt, chat_prompt, paired, prompt_of
from kvtalk.alignment.tokens import Tokenized, spread, tokenize
from kvtalk.errors import TrainingError
from kvtalk.evaluation.tasks.base import LETTER_PROMPT
from kvtalk.loading import bos
from kvtalk.models import LM
from kvtalk.prompts import has_chat_template
from kvtalk.training.texts import Question, question_in, rows_of

_LEAST_ROWS = 16
_USAGE = "prompt, response; or question, choices, answer (index of the right one); or context, question, answers"
_RESPONSE = 240
"""Characters of a response that are learned at most."""
_OPTIONS = 4
"""Of a multiple-choice question, about."""
_LONGEST = 3000
"""Characters of an instruction's prompt at most; what is longer is cut."""


@dataclass(frozen=True)
class Multiple:
    """A multiple-choice question."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Instruction:
    """A prompt and its response."""

    prompt: str
    response: str


Row = Multiple | Question | Instruction


@dataclass(frozen=True)
class Exchange:
    """One row as both models read it.

    Attributes:
        sharer: what it reads; it may know more than the receiver.
        receiver: what it reads.
        answer: what it should write then.
        ends: whether its end of text follows.
        question: number of the question, where several answers to one are compared.
        right: whether the answer is.
    """

    sharer: Prompt
    receiver: Prompt
    answer: str
    ends: bool
    question: int = -1
    right: bool = True


@dataclass(frozen=True)
class FusedBatch:
    """What one step reads.

    Attributes:
        sharer: what it reads, up to the end of the shared text.
        begins: index of the shared text's first token in each.
        counts: tokens of the shared text at the sharer.
        receiver: what it reads, but for the last token of each prompt.
        pairs: aligned tokens.
        lent: all aligned tokens; where the shared text ends the prompt, also the receiver's last one, which is not
            enriched: what it is aligned with crosses all the same.
        tails: that last token and the answer, but for its last token.
        answers: the answers.
        lengths: their characters.
        questions: number of the question that each row answers.
        right: whether it does so rightly.
        kind: of all rows: ``choices``, ``oracle`` (the sharer knows a context) or ``instructions``.
    """

    sharer: list[list[int]]
    begins: list[int]
    counts: list[int]
    receiver: list[list[int]]
    pairs: Pairs
    lent: Pairs
    tails: list[list[int]]
    answers: list[list[int]]
    lengths: list[int]
    questions: list[int]
    right: list[bool]
    kind: str


@dataclass
class Exchanges:
    """Rows to train on.

    Attributes:
        rows: by kind, see :class:`FusedBatch`.
    """

    rows: dict[str, list[Any]]

    @classmethod
    def load(cls, names: Sequence[str]) -> Exchanges:
        """Read files (``.jsonl``, also ``.gz``) or hub data sets.

        Raises:
            TrainingError: not found, unreadable, rows of another form (such as those without responses), or too few.
        """
        return cls.of([row for name in names for row in rows_of(name)])

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Exchanges:
        """Rows that are at hand.

        Raises:
            TrainingError: a row of another form, or too few.
        """
        if len(rows) < _LEAST_ROWS:
            raise TrainingError(f"{len(rows)} rows are too few to train on: give at least {_LEAST_ROWS}")
        found: dict[str, list[Any]] = {"choices": [], "oracle": [], "instructions": []}
        kinds = {Multiple: "choices", Question: "oracle", Instruction: "instructions"}
        for number, row in enumerate(rows, 1):
            read = _read(row, number)
            found[kinds[type(read)]].append(read)
        for listed in found.values():
            random.Random(0).shuffle(listed)
        return cls({kind: listed for kind, listed in found.items() if listed})

    @property
    def digest(self) -> str:
        """Of everything that is trained on."""
        return str(xxhash.xxh3_64_hexdigest(repr(self.rows).encode()))

    def split(self, share: float) -> tuple[Exchanges, Exchanges]:
        """A training and a validation part; no context, question or prompt is in both.

        Of each kind two texts at least are kept back where there are four: one alone has no other that a wrong cache
        could come from.
        """
        learned: dict[str, list[Any]] = {}
        checked: dict[str, list[Any]] = {}
        for kind, listed in self.rows.items():
            texts = list(dict.fromkeys(map(_text, listed)))
            kept = set(texts[-max(2 if len(texts) >= 4 else 1, int(share * len(texts))) :])
            checked[kind] = [row for row in listed if _text(row) in kept]
            if len(kept) < len(texts):
                learned[kind] = [row for row in listed if _text(row) not in kept]
        return Exchanges(learned), Exchanges(checked)


@dataclass(frozen=True)
class Mixture:
    """What steps are made of.

    Attributes:
        rows: of a step at most.
        tokens: characters ÷ 4 of its prompts, about, at most.
        shares: of the steps, by kind; kinds without rows are left out.
        letters: of multiple choice, how many rows ask for a letter; others for the right option's words.
        bare: of the latter, how many are asked without ``Question:`` and ``Answer:``.
        alignment: see :data:`kvtalk.alignment.tokens.STRATEGIES`.
    """

    rows: int = 96
    tokens: int = 16_384
    shares: tuple[tuple[str, float], ...] = (("choices", 0.45), ("oracle", 0.2), ("instructions", 0.35))
    letters: float = 0.35
    bare: float = 0.25
    alignment: str = "coverage"


class FusedBatches(Dataset[FusedBatch]):
    """The batch of every step and process; it depends on the seed and these two numbers alone."""

    def __init__(
        self, exchanges: Exchanges, sharer: LM, receiver: LM, mixture: Mixture, steps: int, seed: int = 0
    ) -> None:
        self.exchanges, self.mixture, self.steps, self.seed = exchanges, mixture, steps, seed
        self.parties = _Party(sharer), _Party(receiver)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, key: tuple[int, int]) -> FusedBatch:
        rng = random.Random(f"{self.seed} {key[0]} {key[1]}")
        shares = {kind: share for kind, share in self.mixture.shares if kind in self.exchanges.rows}
        kind = rng.choices(list(shares), list(shares.values()))[0]
        drawn = rng.choices(self.exchanges.rows[kind], k=self.mixture.rows)
        return self.of(self._within([self.exchange(row, rng) for row in drawn]), kind)

    def exchange(self, row: Row, rng: random.Random) -> Exchange:
        """A row as both models read it."""
        if isinstance(row, Question):
            theirs, ours = (party.form for party in self.parties)
            answer = f" {rng.choice(row.answers)}{(ours.stop or ('',))[0]}"
            both = prompt_of(theirs, row.question, row.context), prompt_of(ours, row.question)
            return Exchange(*both, answer, ends=not ours.stop)
        if isinstance(row, Instruction):
            return self._chat(row.prompt, _cut(row.response), "\n", ends=len(row.response) <= _RESPONSE)
        if rng.random() < self.mixture.letters:
            return self._chat(letter_turn(row), chr(65 + row.answer), " ", ends=True)
        text = row.question if rng.random() < self.mixture.bare else f"Question: {row.question}\nAnswer:"
        return Exchange(Prompt("", text), Prompt("", text), f" {row.choices[row.answer]}", ends=False)

    def of(self, exchanges: Sequence[Exchange], kind: str) -> FusedBatch:
        """Exchanges in both models' tokens; prompts of which nothing aligns are left out.

        Raises:
            TrainingError: all of them are.
        """
        made = self._of(exchanges, kind)
        aligned = sorted(set(made.pairs.rows.tolist()))
        if not aligned:
            raise TrainingError("nothing aligns in any prompt of a step: are the prompts single words?")
        return made if len(aligned) == len(exchanges) else self._of([exchanges[row] for row in aligned], kind)

    def _of(self, exchanges: Sequence[Exchange], kind: str) -> FusedBatch:
        (theirs, ours), prompts = self.parties, [exchange.receiver for exchange in exchanges]
        sharer, begins, shared = theirs.read([exchange.sharer for exchange in exchanges])
        receiver, starts, own = ours.read(prompts)
        receiver = [row + ours.ids(prompt.after) for row, prompt in zip(receiver, prompts, strict=True)]
        answers = [ours.ids(one.answer) + ours.end * one.ends for one in exchanges]
        lengths = torch.tensor([len(row) - 1 for row in receiver])
        ends = [start + len(one.ids) for start, one in zip(starts, own, strict=True)]
        lent = paired(shared, own, starts, ends, self.mixture.alignment)
        return FusedBatch(
            sharer=sharer,
            begins=begins,
            counts=[len(one.ids) for one in shared],
            receiver=[row[:-1] for row in receiver],
            pairs=lent.at(lent.ours < lengths[lent.rows]),
            lent=lent,
            tails=[row[-1:] + answer[:-1] for row, answer in zip(receiver, answers, strict=True)],
            answers=answers,
            lengths=[len(one.answer.strip()) for one in exchanges],
            questions=[number if one.question < 0 else one.question for number, one in enumerate(exchanges)],
            right=[one.right for one in exchanges],
            kind=kind,
        )

    def checks(self, rows: int) -> list[tuple[FusedBatch, FusedBatch | None]]:
        """Some rows of each kind, always the same, and each batch with wrong sharer caches, if there are others; of
        multiple choice a row for each option, in words."""
        found = []
        for kind, listed in self.exchanges.rows.items():
            rng = random.Random(0)
            groups = [self._answers(row, number, rng) for number, row in enumerate(_spaced(listed, rows))]
            while groups:
                count = len(self._within([group[0] for group in groups]))
                made = [exchange for group in groups[:count] for exchange in group]
                batch = self.of(made, kind)
                found.append((batch, self._elsewhere(made, batch) if kind == "oracle" else wrong_of(batch)))
                groups = groups[count:]
        return found

    def _answers(self, row: Row, number: int, rng: random.Random) -> list[Exchange]:
        """A row with each answer that is compared."""
        if not isinstance(row, Multiple):
            return [self.exchange(row, rng)]
        prompt = Prompt("", f"Question: {row.question}\nAnswer:")
        return [
            Exchange(prompt, prompt, f" {choice}", False, number, index == row.answer)
            for index, choice in enumerate(row.choices)
        ]

    def _elsewhere(self, exchanges: Sequence[Exchange], batch: FusedBatch) -> FusedBatch | None:
        """The same questions with the sharer's words before them, its context among these, from another row."""
        befores = list(dict.fromkeys(exchange.sharer.before for exchange in exchanges))
        if len(befores) == 1 or len(batch.sharer) < len(exchanges):
            return None
        ring = dict(zip(befores, befores[1:] + befores[:1], strict=True))
        moved = [replace(one, sharer=replace(one.sharer, before=ring[one.sharer.before])) for one in exchanges]
        return self._of(moved, batch.kind)

    def _within(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """The first ones, as many as a step may read; at least one."""
        read = [
            (1 if one.question < 0 else _OPTIONS) * (len(one.sharer.before) + 2 * len(one.sharer.shared))
            for one in exchanges
        ]
        fitting = [
            one for one, sum_ in zip(exchanges, accumulate(read), strict=True) if sum_ <= 4 * self.mixture.tokens
        ]
        return fitting or [exchanges[0]]

    def _chat(self, turn: str, answer: str, between: str, ends: bool) -> Exchange:
        theirs, ours = (party.chat(turn) for party in self.parties)
        if not self.parties[1].chats:
            answer = between + answer
        return Exchange(theirs, ours, answer, ends)


class _Party:
    """One model's words and tokens, without the model itself."""

    def __init__(self, lm: LM) -> None:
        self.tokenizer, self.form = lm.tokenizer, lm.prompt
        self.bos, self.chats = bos(lm.tokenizer), has_chat_template(lm.tokenizer)
        end = lm.tokenizer.eos_token_id
        self.end = [] if end is None else [int(end)]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def chat(self, turn: str) -> Prompt:
        return chat_prompt(self.tokenizer, turn)

    def read(self, prompts: Sequence[Prompt]) -> tuple[list[list[int]], list[int], list[Tokenized]]:
        """Tokens up to the end of the shared texts, where those begin, and these alone."""
        shared = tokenize(self.tokenizer, [prompt.shared for prompt in prompts])
        before = [self.bos + self.ids(prompt.before) for prompt in prompts]
        both = [lead + one.ids for lead, one in zip(before, shared, strict=True)]
        return both, [len(lead) for lead in before], shared


def letter_turn(row: Multiple) -> str:
    """A multiple-choice question as the protocol ``letter`` asks it."""
    options = "".join(f"{chr(65 + index)}. {choice}\n" for index, choice in enumerate(row.choices))
    return LETTER_PROMPT.format(question=row.question, choices=options)


def wrong_of(batch: FusedBatch) -> FusedBatch | None:
    """The same with another question's sharer cache in each row; None where all rows ask the same.

    Its tokens stand in for those of the right one as in evaluations, see :func:`kvtalk.alignment.tokens.spread`.
    """
    asked = [tuple(row) for row in batch.sharer]
    first = {text: row for row, text in reversed(list(enumerate(asked)))}
    if len(first) == 1:
        return None
    ring = dict(zip(first, [*first.values()][1:] + [*first.values()][:1], strict=True))
    others = [ring[text] for text in asked]
    shared = [row[begin:] for row, begin in zip(batch.sharer, batch.begins, strict=True)]
    places = [torch.from_numpy(spread(shared[row], shared[other])) for row, other in enumerate(others)]

    def moved(pairs: Pairs) -> Pairs:
        theirs = [int(places[row][at]) for row, at in zip(pairs.rows.tolist(), pairs.theirs.tolist(), strict=True)]
        return Pairs(pairs.rows, pairs.ours, torch.tensor(theirs))

    return replace(
        batch,
        sharer=[batch.sharer[other] for other in others],
        begins=[batch.begins[other] for other in others],
        counts=[batch.counts[other] for other in others],
        pairs=moved(batch.pairs),
        lent=moved(batch.lent),
    )


def _text(row: Row) -> str:
    """By which rows belong together."""
    return row.context if isinstance(row, Question) else row.prompt if isinstance(row, Instruction) else row.question


def _spaced(rows: Sequence[Row], count: int) -> list[Row]:
    """So many rows, of as many texts as possible."""
    one_each = list({_text(row): row for row in reversed(rows)}.values())[::-1]
    return one_each[:count]


def _cut(response: str) -> str:
    """The beginning of a long response, between words where it has any."""
    if len(response) <= _RESPONSE:
        return response
    words = response[:_RESPONSE].rsplit(maxsplit=1)[0]
    return words if len(words) > _RESPONSE // 2 else response[:_RESPONSE]


def _read(row: dict[str, Any], number: int) -> Row:
    if row.keys() >= {"context", "question", "answers"}:
        return question_in(row, number)
    if row.keys() >= {"question", "choices", "answer"}:
        question, choices, answer = row["question"], row["choices"], row["answer"]
        if not _worded(question):
            raise TrainingError(f"row {number}: question must be a text that is not empty")
        if not isinstance(choices, list) or not choices or not all(map(_worded, choices)):
            raise TrainingError(f"row {number}: choices must be a list of texts that are not empty")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise TrainingError(f"row {number}: answer must be the index of the right one of the choices, from 0")
        return Multiple(question, tuple(choices), answer)
    if row.keys() >= {"prompt", "response"}:
        texts = [row["prompt"], row["response"]]
        if all(map(_worded, texts)):
            return Instruction(texts[0].strip()[:_LONGEST], texts[1].strip())
        raise TrainingError(f"row {number}: prompt and response must be texts that are not empty")
    raise TrainingError(
        f"row {number} has {', '.join(map(str, row)) or 'nothing'}; a fuser learns answers: expected {_USAGE}"
    )


def _worded(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
