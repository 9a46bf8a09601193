"""What a fuser is trained on: prompts that both models read, and what the receiver should answer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import xxhash
from torch.utils.data import Dataset

from kvtalk.adapters.fuser import FuserGeometry
from kvtalk.adapters.pairs import Pairs, enriched_of, paired
from kvtalk.alignment.readings import Reading, readings
from kvtalk.alignment.tokens import NONE, spread
from kvtalk.errors import TrainingError
from kvtalk.evaluation.tasks.base import LETTER_PROMPT
from kvtalk.models import LM
from kvtalk.prompts import has_chat_template
from kvtalk.shared_prompts import Prompt, chat_prompt, prompt_of
from kvtalk.training.texts import Question, question_in, rows_of

_LEAST_ROWS = 16
_USAGE = (
    "prompt, response; or question, choices, answer (index of the right one), maybe context; or context, question, "
    "answers; or text"
)
_RESPONSE = 240
"""Characters of a response that are learned at most."""
_CONTEXT, _SHARED, _CONTINUED = (300, 1500), (20, 300), (40, 160)
"""Characters of running text that the sharer alone reads, that both read, and that come next; from, to."""
_OPTIONS = "\nOptions:"
"""What parts a prompt's question from its options in FLAN's form."""
_SLACK = 40
"""Characters that the end of a word may add."""
_PIECE = 400, sum(most for _, most in (_CONTEXT, _SHARED, _CONTINUED)) + 3 * _SLACK
"""Characters of a piece of running text; from, to."""
_LONGEST = 3000
"""Characters of an instruction's prompt at most; what is longer is cut."""


@dataclass(frozen=True)
class Multiple:
    """A multiple-choice question; a context, where it has one, is for the sharer alone."""

    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""


@dataclass(frozen=True)
class Instruction:
    """A prompt and its response."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Running:
    """A piece of running text."""

    text: str


Row = Multiple | Question | Instruction | Running


@dataclass(frozen=True)
class Exchange:
    """One row as both models read it.

    Attributes:
        sharer: what it reads; it may know more than the receiver.
        receiver: what it reads.
        answers: what it may write then: the one that it should, or several that are compared.
        ends: whether its end of text follows.
        right: index of the answer that it should write.
    """

    sharer: Prompt
    receiver: Prompt
    answers: tuple[str, ...]
    ends: bool = False
    right: int = 0


@dataclass(frozen=True)
class FusedBatch:
    """What one step reads; of several answers to one prompt the prompt is read once.

    Attributes:
        sharer: what it reads, of every prompt.
        begins: index of the shared text's first token in each.
        receiver: what it reads.
        pairs: aligned tokens that are enriched.
        lent: all that cross; some of these are aligned with nothing (``ours`` is −1) or with a last token that is not
            enriched.
        prompts: which prompt each answer belongs to.
        tails: of each answer, its prompt's last token, which runs once more, and the answer, but for its last token.
        answers: the answers.
        lengths: their characters.
        right: whether each is the one that should be written.
        kind: of all prompts: ``choices``, ``known`` (choices of which the sharer knows a context), ``oracle`` (the same
            without choices), ``running`` (the same, to be gone on with) or ``instructions``.
    """

    sharer: list[list[int]]
    begins: list[int]
    receiver: list[list[int]]
    pairs: Pairs
    lent: Pairs
    prompts: list[int]
    tails: list[list[int]]
    answers: list[list[int]]
    lengths: list[int]
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
        found: dict[str, list[Any]] = {kind: [] for kind in ("choices", "known", *_KINDS.values())}
        for number, row in enumerate(rows, 1):
            for read in _read(row, number):
                found[_kind(read)].append(read)
        for listed in found.values():
            random.Random(0).shuffle(listed)
        if not any(found.values()):
            raise TrainingError(
                f"no text is long enough to be gone on with: give texts of {_PIECE[0]} characters or more"
            )
        return cls({kind: listed for kind, listed in found.items() if listed})

    @property
    def digest(self) -> str:
        """Of everything that is trained on."""
        return str(xxhash.xxh3_64_hexdigest(repr(self.rows).encode()))

    def split(self, share: float) -> tuple[Exchanges, Exchanges]:
        """A training and a validation part; no context, question or prompt is in both, of whatever kind its row is.

        Of each kind two texts at least are kept back where there are four: one alone has no other that a wrong cache
        could come from.

        Raises:
            TrainingError: nothing is left to train on.
        """
        kept: set[str] = set()
        checked: dict[str, list[Any]] = {}
        for kind, listed in self.rows.items():
            texts = list(dict.fromkeys(map(_text, listed)))
            some = set(texts[-max(2 if len(texts) >= 4 else 1, int(share * len(texts))) :])
            checked[kind] = [row for row in listed if _text(row) in some]
            kept.update(text for row in checked[kind] for text in _texts(row))
        left = {kind: [row for row in listed if kept.isdisjoint(_texts(row))] for kind, listed in self.rows.items()}
        learned = {kind: listed for kind, listed in left.items() if listed}
        if not learned:
            raise TrainingError("all rows ask the same: nothing is left to train on when some are kept back")
        return Exchanges(learned), Exchanges(checked)


@dataclass(frozen=True)
class Mixture:
    """What steps are made of.

    Attributes:
        rows: of a step at most.
        tokens: characters ÷ 4 of its prompts, about, at most.
        shares: by which the kind of a step's rows is drawn, in proportion; kinds without rows are left out.
        letters: of multiple choice, how many rows ask for a letter; of others all options are compared in words.
        bare: of the latter, how many are asked without ``Question:`` and ``Answer:``.
    """

    rows: int = 96
    tokens: int = 32_768
    shares: tuple[tuple[str, float], ...] = (
        ("choices", 0.6),
        ("known", 0.1),
        ("oracle", 0.1),
        ("running", 0.1),
        ("instructions", 0.2),
    )
    letters: float = 0.3
    bare: float = 0.25

    def shared(self, shares: Sequence[str]) -> Mixture:
        """The same with other shares of some kinds, such as ``oracle=0.5``.

        Raises:
            TrainingError: of another form.
        """
        found = dict(self.shares)
        for text in shares:
            kind, _, number = text.partition("=")
            try:
                share = float(number)
            except ValueError:
                share = -1.0
            if kind not in found or not 0 <= share < math.inf:
                known = ", ".join(found)
                raise TrainingError(f"{text}: give a share as KIND=NUMBER, 0 or more; kinds are {known}")
            found[kind] = share
        if not sum(found.values()) < math.inf:
            raise TrainingError("the shares' sum is too large a number: only their proportions count")
        return replace(self, shares=tuple(found.items()))

    def check(self, exchanges: Exchanges) -> None:
        """Find out whether any of these rows would be drawn.

        Raises:
            TrainingError: none.
        """
        if not any(share for kind, share in self.shares if kind in exchanges.rows):
            raise TrainingError(f"no share is left to the rows that are there: they are of {', '.join(exchanges.rows)}")


class FusedBatches(Dataset[FusedBatch]):
    """The batch of every step and process; it depends on the seed and these two numbers alone."""

    def __init__(
        self,
        exchanges: Exchanges,
        sharer: LM,
        receiver: LM,
        mixture: Mixture,
        geometry: FuserGeometry,
        steps: int,
        seed: int = 0,
    ) -> None:
        self.exchanges, self.mixture, self.geometry, self.steps, self.seed = exchanges, mixture, geometry, steps, seed
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
        """A row as both models read it; of multiple choice in words, with all options."""
        if isinstance(row, Multiple) and row.context:
            return _options_of(row, _asked(row))
        if isinstance(row, Multiple) and rng.random() < self.mixture.letters:
            shuffled = rng.sample(range(len(row.choices)), len(row.choices))
            right, choices = shuffled.index(row.answer), tuple(row.choices[index] for index in shuffled)
            return self._chat(letter_turn(Multiple(row.question, choices, right)), chr(65 + right), " ", ends=True)
        if isinstance(row, Multiple):
            return _options_of(row, row.question if rng.random() < self.mixture.bare else _asked(row))
        if isinstance(row, Question):
            theirs, ours = (party.form for party in self.parties)
            answer = f" {rng.choice(row.answers)}{(ours.stop or ('',))[0]}"
            both = prompt_of(theirs, row.question, row.context), prompt_of(ours, row.question)
            return Exchange(*both, (answer,), ends=not ours.stop)
        if isinstance(row, Running):
            return _continued(row.text, rng)
        assert isinstance(row, Instruction)
        return self._chat(row.prompt, _cut(row.response), "\n", ends=len(row.response) <= _RESPONSE)

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
        theirs, ours = self.parties
        sharer = readings(theirs.tokenizer, [exchange.sharer for exchange in exchanges])
        receiver = readings(ours.tokenizer, [exchange.receiver for exchange in exchanges])
        every = [(row, index) for row, one in enumerate(exchanges) for index in range(len(one.answers))]
        texts = [exchanges[row].answers[index] for row, index in every]
        prompts = [row for row, _ in every]
        answers = [ours.ids(text) + ours.end * exchanges[row].ends for text, row in zip(texts, prompts, strict=True)]
        shared, counts = [one.shared for one in sharer], [len(one.ids) - one.begin for one in sharer]
        aligned = paired(shared, counts, receiver, self.geometry)
        return FusedBatch(
            sharer=[one.ids for one in sharer],
            begins=[one.begin for one in sharer],
            receiver=[one.ids for one in receiver],
            pairs=enriched_of(aligned, receiver, self.geometry),
            lent=_with(aligned, *self._further(sharer, receiver)),
            prompts=prompts,
            tails=[receiver[row].ids[-1:] + answer[:-1] for row, answer in zip(prompts, answers, strict=True)],
            answers=answers,
            lengths=[len(text.strip()) for text in texts],
            right=[index == exchanges[row].right for row, index in every],
            kind=kind,
        )

    def _further(self, sharer: Sequence[Reading], receiver: Sequence[Reading]) -> tuple[list[int], list[int]]:
        """Row and index of sharer tokens that cross though the receiver has none for them: the first ones after the
        shared text, where its words there are more."""
        rows, theirs = [], []
        for row, (one, other) in enumerate(zip(sharer, receiver, strict=True)):
            more = range(max(0, one.after - other.after)) if self.geometry.roles else ()
            rows += [row for _ in more]
            theirs += [len(one.shared.ids) + index for index in more]
        return rows, theirs

    def checks(self, rows: int) -> list[tuple[FusedBatch, FusedBatch | None]]:
        """Some rows of each kind, always the same, and each batch with wrong sharer caches, if there are others;
        multiple choice in words."""
        found = []
        for kind, listed in self.exchanges.rows.items():
            rng = random.Random(0)
            left = [
                _options_of(row, _asked(row)) if isinstance(row, Multiple) else self.exchange(row, rng)
                for row in _spaced(listed, rows)
            ]
            while left:
                some = self._within(left)
                batch = self.of(some, kind)
                found.append((batch, self.wrong(some, batch)))
                left = left[len(some) :]
        return found

    def wrong(self, exchanges: Sequence[Exchange], batch: FusedBatch) -> FusedBatch | None:
        """A batch with wrong sharer caches: where the sharer knows a context, of the same questions after another one,
        else of other questions; None where there is no other."""
        return wrong_of(batch) if batch.kind in ("choices", "instructions") else self._elsewhere(exchanges, batch)

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
        read = [len(one.sharer.before) + 2 * len(one.sharer.shared) for one in exchanges]
        sums = zip(exchanges, accumulate(read), strict=True)
        return [one for one, sum_ in sums if sum_ <= 4 * self.mixture.tokens] or [exchanges[0]]

    def _chat(self, turn: str, answer: str, between: str, ends: bool) -> Exchange:
        theirs, ours = (party.chat(turn) for party in self.parties)
        if not self.parties[1].chats:
            answer = between + answer
        return Exchange(theirs, ours, (answer,), ends)


class _Party:
    """One model's words and tokens, without the model itself."""

    def __init__(self, lm: LM) -> None:
        self.tokenizer, self.form = lm.tokenizer, lm.prompt
        self.chats = has_chat_template(lm.tokenizer)
        end = lm.tokenizer.eos_token_id
        self.end = [] if end is None else [int(end)]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def chat(self, turn: str) -> Prompt:
        return chat_prompt(self.tokenizer, turn)


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
        pairs=moved(batch.pairs),
        lent=moved(batch.lent),
    )


_KINDS = {Question: "oracle", Running: "running", Instruction: "instructions"}


def _kind(row: Row) -> str:
    """See :class:`FusedBatch`."""
    if isinstance(row, Multiple):
        return "known" if row.context else "choices"
    return _KINDS[type(row)]


def _text(row: Row) -> str:
    """By which rows belong together."""
    if isinstance(row, Running):
        return row.text
    if isinstance(row, Instruction):
        return row.prompt
    return row.context or row.question


def _asked(row: Multiple) -> str:
    """As the protocol ``likelihood`` asks."""
    return f"Question: {row.question}\nAnswer:"


def _texts(row: Row) -> set[str]:
    """What must not be in both parts: a context, a question, and a prompt without its options."""
    words = row.question if isinstance(row, (Question, Multiple)) else _text(row)
    context = row.context if isinstance(row, (Question, Multiple)) else ""
    return {words.partition(_OPTIONS)[0].strip(), context} - {""}


def _options_of(row: Multiple, text: str) -> Exchange:
    """A question with its options."""
    theirs = Prompt(f"{row.context}\n" if row.context else "", text)
    return Exchange(theirs, Prompt("", text), tuple(f" {choice}" for choice in row.choices), right=row.answer)


def _continued(text: str, rng: random.Random) -> Exchange:
    """Running text: a context for the sharer alone, words that both read, and what follows them."""
    sizes, room = [rng.randint(*size) for size in (_CONTEXT, _SHARED, _CONTINUED)], len(text) - 3 * _SLACK
    context, shared, continued = (max(1, int(min(1.0, room / sum(sizes)) * size)) for size in sizes)
    begin = rng.randint(0, max(0, room - sum(sizes)))
    first = _border(text, begin + context)
    second = _border(text, first + shared)
    third = _border(text, second + continued)
    both = text[first:second]
    return Exchange(Prompt(text[begin:first], both), Prompt("", both), (text[second:third],))


def _border(text: str, at: int) -> int:
    """The first space from a character on, or, in text without any, that character."""
    found = text.find(" ", at, at + _SLACK)
    return min(at, len(text)) if found < 0 else found


def _with(pairs: Pairs, rows: Sequence[int], theirs: Sequence[int]) -> Pairs:
    """Aligned tokens and further ones of the sharer."""
    ours = torch.full((len(rows),), NONE)
    more = (torch.tensor(rows, dtype=torch.long), ours, torch.tensor(theirs, dtype=torch.long))
    both = zip((pairs.rows, pairs.ours, pairs.theirs), more, strict=True)
    return Pairs(*(torch.cat(two) for two in both))


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


def _read(row: dict[str, Any], number: int) -> list[Row]:
    """What a row teaches; of a text its pieces, of one that is too short for any nothing."""
    if row.keys() >= {"context", "question", "answers"}:
        return [question_in(row, number)]
    if row.keys() >= {"question", "choices", "answer"}:
        question, choices, answer = row["question"], row["choices"], row["answer"]
        if not _worded(question):
            raise TrainingError(f"row {number}: question must be a text that is not empty")
        if not isinstance(choices, list) or not choices or not all(map(_worded, choices)):
            raise TrainingError(f"row {number}: choices must be a list of texts that are not empty")
        if len(choices) < 2:
            raise TrainingError(f"row {number}: one choice alone leaves nothing to choose")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise TrainingError(f"row {number}: answer must be the index of the right one of the choices, from 0")
        context = row.get("context", "")
        if not isinstance(context, str):
            raise TrainingError(f"row {number}: context must be a text")
        return [Multiple(question, tuple(choices), answer, context.strip())]
    if row.keys() >= {"prompt", "response"}:
        texts = [row["prompt"], row["response"]]
        if all(map(_worded, texts)):
            return [Instruction(texts[0].strip()[:_LONGEST], texts[1].strip())]
        raise TrainingError(f"row {number}: prompt and response must be texts that are not empty")
    if "text" in row:
        if not _worded(row["text"]):
            raise TrainingError(f"row {number}: text must be a text that is not empty")
        text, (least, most) = row["text"].strip(), _PIECE
        pieces = (text[begin : begin + most] for begin in range(0, len(text), most))
        return [Running(piece) for piece in pieces if len(piece) >= least]
    raise TrainingError(
        f"row {number} has {', '.join(map(str, row)) or 'nothing'}; a fuser learns answers: expected {_USAGE}"
    )


def _worded(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
