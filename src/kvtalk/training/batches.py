"""What a translator is trained on, step by step: contexts in both models' tokens, and what follows them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from kvtalk.adapters.translator import Pairing, pair
from kvtalk.adapters.vectors import lead
from kvtalk.alignment.tokens import tokenize
from kvtalk.errors import TrainingError
from kvtalk.models import LM
from kvtalk.training.loop import Schedule
from kvtalk.training.texts import Question, Texts


@dataclass(frozen=True)
class Recipe:
    """How to train a translator.

    Attributes:
        schedule: steps, rate, optimizer.
        regression: share of the steps that only regress keys and values.
        tokens: of contexts in a step, about.
        questions: share of the later steps that ask questions.
        quotes: share of the other later steps in which the receiver reads the context a second time, as text: where it
            goes on as the text does, every word must have come through the latents.
        regression_weight: of the regression in later steps, of latents that stand for one token.
        shortest, longest: characters of plain contexts, drawn evenly on a log scale.
        codecs: with which latents are packed; drawn by chance, ``bf16`` stands for none.
        widths: to which latents are cut; drawn by chance.
        whole: share of the steps with whole latents.
        packing: codec in which the adapter's matrices will be stored; None for none.
        packed: share of the steps, the last ones, in which they are rounded by it.
        seed: of everything drawn.
    """

    schedule: Schedule = field(default_factory=Schedule)
    regression: float = 0.1
    tokens: int = 20_480
    questions: float = 0.5
    quotes: float = 0.0
    regression_weight: float = 0.3
    shortest: int = 40
    longest: int = 4000
    codecs: tuple[str, ...] = ("bf16", "bf16", "int8", "int4", "int4", "int2")
    widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    whole: float = 0.4
    packing: str | None = None
    packed: float = 0.2
    seed: int = 0

    def regresses(self, step: int) -> bool:
        """Whether a step only regresses."""
        return step < self.regression * self.schedule.steps


_MOST_ROWS = 384
"""Of a step that only regresses; with logits over a large vocabulary a quarter of that fills a GPU."""

_SPACED = 0.2
_UNKNOWN = 0.05
_WITHIN = re.compile(r"(?<=\d)([.,])(?=\d)|(?<=\w)(-)(?=\w)")
_PUNCTUATION = re.compile(r" ?([.,;:!?()\"])(?!@) ?")

_CONTINUATION = 280
"""Characters that follow a plain context."""
_QUOTED = 1500
"""Characters of a context that is read again at most."""


@dataclass(frozen=True)
class Batch:
    """What one step reads.

    Attributes:
        sharer: what the sharer reads, its head and a context in each row.
        start: tokens of its head.
        receiver: context tokens of the receiver.
        head: what the receiver reads before the context.
        pairing: of the two.
        tails: what follows the context at the receiver.
        answers: how many of each tail's last tokens are an answer to learn.
        width: to which latents are cut.
        codec: with which they are packed.
    """

    sharer: list[list[int]]
    start: int
    receiver: list[list[int]]
    head: list[int]
    pairing: Pairing
    tails: list[list[int]]
    answers: list[int]
    width: int
    codec: str


@dataclass(frozen=True)
class Example:
    """One row before it is tokenized.

    Attributes:
        context: what the sharer reads.
        tail: what the receiver reads after it.
        answer: what it should write then; empty where it only continues.
    """

    context: str
    tail: str
    answer: str = ""


class Batches(Dataset[Batch]):
    """The batch of every step and process; it depends on the seed and these two numbers alone."""

    def __init__(self, texts: Texts, sharer: LM, receiver: LM, recipe: Recipe, latent: int) -> None:
        self.texts, self.recipe, self.latent = texts, recipe, latent
        self.sharer, self.receiver = sharer.tokenizer, receiver.tokenizer
        self.sharer_head, self.receiver_head = lead(sharer), receiver.head_ids()
        self.bare_head = lead(receiver)
        self.prompt = receiver.prompt
        self.limits = sharer.spec.max_positions, receiver.spec.max_positions

    def __len__(self) -> int:
        return self.recipe.schedule.steps

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        step, process = key
        rng = random.Random(f"{self.recipe.seed} {step} {process}")
        recipe = self.recipe
        width = self.latent if rng.random() < recipe.whole else rng.choice([*recipe.widths, self.latent])
        noise = rng.choice(recipe.codecs)
        regressing = recipe.regresses(step)
        if self.texts.questions and rng.random() < recipe.questions * (0.5 if regressing else 1):
            others = rng.choice([0, 0, 1, 2])
            rows = max(4, recipe.tokens // (192 * (1 + others)))
            drawn = sorted(rng.choices(self.texts.questions, k=8 * rows), key=lambda question: len(question.context))
            first = rows * rng.randrange(8)
            asked = drawn[first : first + rows]  # of like lengths, so that little is padding
            longest = len(asked[-1].context) * (1 + others)
            asked = rng.sample(asked, min(rows, max(4, 4 * recipe.tokens // max(1, longest))))
            return self.of(self._questions(rng, asked, others), self.receiver_head, width, noise)
        context = int(math.exp(rng.uniform(math.log(recipe.shortest), math.log(recipe.longest))))
        quotes = bool(recipe.quotes) and not regressing and rng.random() < recipe.quotes
        if quotes:
            context = min(context, _QUOTED)
        rows = min(_MOST_ROWS if regressing else _MOST_ROWS // 4, max(4, recipe.tokens * 4 // (context * (1 + quotes))))
        head = self.bare_head if rng.random() < 0.7 else self.receiver_head
        places = [rng.random() for _ in range(rows)]
        spaced = rng.random() < _SPACED
        examples = self._passages(places, context, spaced)
        if quotes:
            examples = [replace(example, tail=f"\n\n{example.context}") for example in examples]
        return self.of(examples, head, width, noise)

    def checks(self, rows: int) -> list[Batch]:
        """Plain text and questions, always the same, for validation; no two rows have the same context."""
        length = min(1000, len(self.texts.plain) // 8)
        places = [(row + 0.5) / rows for row in range(min(rows, max(2, len(self.texts.plain) // (2 * length))))]
        found = [self.of(self._passages(places, length, False), self.bare_head)]
        of_context = {question.context: question for question in self.texts.questions}
        asked = random.Random(0).sample(list(of_context.values()), min(2 * rows, len(of_context)))
        for part in (asked[:rows], asked[rows:]):
            if len(part) > 1:  # a wrong context needs another one
                found.append(self.of(self._questions(random.Random(0), part, 0), self.receiver_head))
        return found

    def of(self, examples: Sequence[Example], head: list[int], width: int | None = None, codec: str = "bf16") -> Batch:
        """Examples in both models' tokens; those that are longer than a model reads are left out.

        Raises:
            TrainingError: all of them are.
        """
        contexts = [example.context for example in examples]
        both = tokenize(self.sharer, contexts), tokenize(self.receiver, contexts)
        rows = []
        for theirs, ours, example in zip(*both, examples, strict=True):
            tail, answer = _ids(self.receiver, example.tail), _ids(self.receiver, example.answer)
            read = len(self.sharer_head) + len(theirs.ids), len(head) + len(ours.ids) + len(tail) + len(answer)
            if read[0] <= self.limits[0] and read[1] <= self.limits[1]:
                rows.append((theirs, ours, tail, answer))
        if not rows:
            raise TrainingError(
                f"contexts are longer than the models read ({min(self.limits)} tokens): shorten longest"
            )
        return Batch(
            sharer=[self.sharer_head + theirs.ids for theirs, _, _, _ in rows],
            start=len(self.sharer_head),
            receiver=[ours.ids for _, ours, _, _ in rows],
            head=head,
            pairing=pair([theirs for theirs, _, _, _ in rows], [ours for _, ours, _, _ in rows]),
            tails=[tail + answer for _, _, tail, answer in rows],
            answers=[len(answer) for _, _, _, answer in rows],
            width=width or self.latent,
            codec=codec,
        )

    def _passages(self, places: Sequence[float], context: int, spaced: bool) -> list[Example]:
        """Running text; ``spaced`` as in corpora that were tokenized: see :func:`_apart`."""
        pairs = [self.texts.passage(at, context, _CONTINUATION) for at in places]
        if spaced:
            rng = random.Random(places[0])
            pairs = [(_apart(one, rng), _apart(other, rng)) for one, other in pairs]
        return [Example(*both) for both in pairs]

    def _questions(self, rng: random.Random, asked: Sequence[Question], others: int) -> list[Example]:
        """Each about its context among so many others."""
        made = []
        for question in asked:
            around = [rng.choice(self.texts.questions).context for _ in range(others)]
            around.insert(rng.randrange(len(around) + 1), question.context)
            answer = f" {rng.choice(question.answers)}{(self.prompt.stop or ('',))[0]}"
            made.append(Example("\n".join(around), self.prompt.tail(question.question), answer))
        return made


def _apart(text: str, rng: random.Random) -> str:
    """As in corpora that were tokenized: spaces around punctuation, ``@-@`` within words, rare words unknown."""
    within = _WITHIN.sub(lambda found: f" @{found[0]}@ ", text)
    words = _PUNCTUATION.sub(r" \1 ", within).replace("  ", " ").split(" ")
    return " ".join("<unk>" if word.isalpha() and rng.random() < _UNKNOWN else word for word in words)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
