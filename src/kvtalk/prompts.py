"""How a question is asked: what stands before the context, and what follows it.

The text a model reads is ``head + context + tail``. The head does not depend on the context, so the receiver reads
it by itself and it never crosses the wire; the tail holds the question. Sharer and receiver tokenize the three
parts apart, which is what makes "the cache" and "the context as text" the very same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_CONTEXT, _QUESTION = "\x02context\x03", "\x02question\x03"
_INSTRUCTION = "Answer the question with a few words from the text."
_EXAMPLES = (
    "Text: The Lindau ferry was built in 1931 by the Harlow yard. It carried timber until 1960.\n"
    "Question: Who built the Lindau ferry?\nAnswer: the Harlow yard\n\n"
    "Text: Mara Oduya opened her bakery in the old mill because the rent was low. She sells rye bread on Fridays.\n"
    "Question: When does Mara Oduya sell rye bread?\nAnswer: on Fridays\n\n"
)


@dataclass(frozen=True)
class PromptFormat:
    """The text around a context and a question.

    Attributes:
        head: before the context.
        before_question: between context and question.
        after_question: after the question, up to the answer.
        stop: strings that end the answer.
    """

    head: str
    before_question: str
    after_question: str
    stop: tuple[str, ...] = ()

    def tail(self, question: str) -> str:
        """What the receiver reads after the context."""
        return f"{self.before_question}{question}{self.after_question}"


BARE = PromptFormat("", "\nQuestion: ", "\nAnswer:", ("\n",))
"""The context, then the question; nothing before."""

EXAMPLES = PromptFormat(_EXAMPLES + "Text: ", "\nQuestion: ", "\nAnswer:", ("\n",))
"""Two worked examples first, so that small and base models answer in a few words."""


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> str:
    """A conversation up to where the model speaks, without a thinking phase where there is one.

    Args:
        tokenizer: its chat template is used if it has one; otherwise the turns stand one after the other.
        turns: user, assistant, user and so on; the last is the user's.
    """
    if not has_chat_template(tokenizer):
        return "\n\n".join(turns)
    roles = ("user", "assistant")
    text = str(
        tokenizer.apply_chat_template(
            [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    )
    bos = tokenizer.bos_token
    adds_bos = bos and list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


def chat_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The tokenizer's own chat template around context and question."""
    text = render(tokenizer, [f"{_INSTRUCTION}\n\n{_CONTEXT}\n\nQuestion: {_QUESTION}"])
    head, _, rest = text.partition(_CONTEXT)
    before, _, after = rest.partition(_QUESTION)
    return PromptFormat(head, before, after)


def default_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """The chat template where there is one, otherwise worked examples."""
    return chat_format(tokenizer) if has_chat_template(tokenizer) else EXAMPLES
