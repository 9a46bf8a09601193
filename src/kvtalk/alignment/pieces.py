"""Prompts made of pieces: around the same texts each model puts its own template and its own special tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvtalk.alignment.tokens import Alignment, Tokenized, runs, tokenize
from kvtalk.errors import AlignmentError

TEMPLATES = ("unfused", "role")
"""unfused: no sharer token stands for a special or template token; role: where both prompts have equally many template
pieces of a role, the first token of each stands for the first and the last for the last, and what is between stays
unfused."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a prompt in one model's tokens.

    Attributes:
        role: what it is in both prompts, such as ``context``.
        text: the text that both models read; None for special and template tokens.
        tokens: its tokens; those of no text cover no characters.
    """

    role: str
    text: str | None
    tokens: Tokenized


def text_piece(tokenizer: PreTrainedTokenizerBase, role: str, text: str) -> Piece:
    """A text that both models read.

    Raises:
        AlignmentError: a tokenizer that cannot tell which characters a token covers.
    """
    return Piece(role, text, tokenize(tokenizer, [text])[0])


def template_piece(role: str, ids: Sequence[int]) -> Piece:
    """Special or template tokens, which are each model's own."""
    return Piece(role, None, Tokenized(list(ids), np.zeros((len(ids), 2), dtype=np.int64)))


def joined(pieces: Sequence[Piece]) -> Tokenized:
    """The whole prompt; characters are counted through its texts alone, so that they agree between two prompts."""
    ids: list[int] = []
    spans = [np.zeros((0, 2), dtype=np.int64)]
    characters = 0
    for piece in pieces:
        ids += piece.tokens.ids
        spans.append(piece.tokens.spans + characters)
        characters += len(piece.text or "")
    return Tokenized(ids, np.concatenate(spans))


def align_pieces(
    sharer: Sequence[Piece], receiver: Sequence[Piece], strategy: str = "coverage", template: str = "unfused"
) -> Alignment:
    """The sharer tokens that stand for each receiver token, of two whole prompts.

    Args:
        sharer: its prompt.
        receiver: its prompt, with the same texts in the same order.
        strategy: for texts, see :data:`kvtalk.alignment.tokens.STRATEGIES`.
        template: for special and template tokens, see :data:`TEMPLATES`.

    Returns:
        indices into the tokens of the whole sharer prompt, ``[tokens of the whole receiver prompt]``.

    Raises:
        AlignmentError: other texts, an unknown strategy or template, or nothing that aligns.
    """
    if template not in TEMPLATES:
        raise AlignmentError(f"no template alignment {template!r}; there are {', '.join(TEMPLATES)}")
    _check_texts(sharer, receiver)
    made = runs(joined(sharer), joined(receiver), strategy)
    if template == "role":
        _align_ends(made, sharer, receiver)
    if not made.count.any():
        raise AlignmentError(
            "the prompts align on nothing: give both the same texts as text pieces, and a sharer whose tokenizer "
            "knows their script"
        )
    return made


def _check_texts(sharer: Sequence[Piece], receiver: Sequence[Piece]) -> None:
    theirs, ours = ([piece for piece in pieces if piece.text is not None] for pieces in (sharer, receiver))
    roles = [piece.role for piece in theirs], [piece.role for piece in ours]
    if roles[0] != roles[1]:
        named = [", ".join(names) or "none" for names in roles]
        raise AlignmentError(
            f"the sharer reads the texts {named[0]}, the receiver {named[1]}: "
            "give both the same in the same order, and what only one reads as template pieces"
        )
    for one, other in zip(theirs, ours, strict=True):
        if one.text != other.text:
            raise AlignmentError(f"the text {one.role!r} is not the same in both prompts: strip or wrap it for both")


def _align_ends(made: Alignment, sharer: Sequence[Piece], receiver: Sequence[Piece]) -> None:
    """A receiver piece of one token gets the sharer piece's last, which has read the whole piece."""
    theirs, ours = _templates(sharer), _templates(receiver)
    for role in theirs.keys() & ours.keys():
        if len(theirs[role]) != len(ours[role]):
            continue
        for (begin, end), (our_begin, our_end) in zip(theirs[role], ours[role], strict=True):
            if begin < end and our_begin < our_end:
                made.first[our_begin] = begin
                made.first[our_end - 1] = end - 1
                made.count[[our_begin, our_end - 1]] = 1


def _templates(pieces: Sequence[Piece]) -> dict[str, list[tuple[int, int]]]:
    """First token and the one after the last of each template piece, by role."""
    found = defaultdict(list)
    start = 0
    for piece in pieces:
        end = start + len(piece.tokens.ids)
        if piece.text is None:
            found[piece.role].append((start, end))
        start = end
    return found
