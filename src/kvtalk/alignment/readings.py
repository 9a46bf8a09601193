"""Prompts in a model's tokens, with where the text lies that both models read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvtalk.alignment.tokens import Tokenized, tokenize
from kvtalk.loading import bos
from kvtalk.shared_prompts import Prompt


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
    found = []
    for prompt, shared in zip(prompts, tokenize(tokenizer, [prompt.shared for prompt in prompts]), strict=True):
        before = [*first, *_ids(tokenizer, prompt.before)]
        found.append(Reading([*before, *shared.ids, *_ids(tokenizer, prompt.after)], len(before), shared))
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Never kept for the next call: a text before the shared one may be private."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else ()
