"""What both models read, each with its own words around it."""

from __future__ import annotations

from dataclasses import dataclass

import xxhash
from transformers import PreTrainedTokenizerBase

from kvtalk.errors import AlignmentError
from kvtalk.models import LM
from kvtalk.prompts import PromptFormat, has_chat_template, render


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
