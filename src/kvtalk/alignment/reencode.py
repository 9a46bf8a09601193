"""C2C's published way, as a baseline: decode each receiver token by itself and encode the string with the sharer's
tokenizer (arXiv 2510.03215; github.com/thu-nics/C2C, ``rosetta/model/aligner.py``).

One piece of the new tokens is kept and the others are dropped, so the sharer reads as many tokens as the receiver, but
not the text: a token of bytes decodes to U+FFFD, and a long word becomes its first or its longest piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from kvtalk.alignment.tokens import Tokenized, ranges
from kvtalk.errors import AlignmentError

KEEP = ("first", "longest")
"""Which piece is kept: the first, or the one that decodes to most characters, of equals the first."""


def reencode(
    sharer: PreTrainedTokenizerBase, receiver: PreTrainedTokenizerBase, ids: Sequence[int], keep: str = "first"
) -> list[int]:
    """What the sharer reads in the place of each receiver token.

    Special tokens become the sharer's of the same purpose or name; what encodes to nothing becomes its unknown token,
    or token 0 if it has none.

    Args:
        sharer: its tokenizer.
        receiver: its tokenizer.
        ids: the receiver's tokens.
        keep: see :data:`KEEP`.

    Returns:
        sharer tokens, ``[receiver tokens]``.

    Raises:
        AlignmentError: an unknown ``keep``.
    """
    if keep not in KEEP:
        raise AlignmentError(f"no piece {keep!r} to keep; there are {', '.join(KEEP)}")
    special = _special(sharer, receiver)
    made = {token: _one(sharer, receiver, token, keep, special) for token in set(ids)}
    return [made[token] for token in ids]


def kept(ids: Sequence[int], sharer: Tokenized, receiver: Tokenized) -> npt.NDArray[np.bool_]:
    """Which re-encoded tokens are among the sharer's own tokens for the same characters, ``[receiver tokens]``.

    Args:
        ids: from :func:`reencode`.
        sharer: the text in the sharer's tokens.
        receiver: the same text in the receiver's, the tokens that were re-encoded.
    """
    first, stop = ranges(sharer.spans, receiver.spans)
    runs = zip(ids, first, stop, strict=True)
    return np.array([token in sharer.ids[begin:end] for token, begin, end in runs], dtype=np.bool_)


def _special(sharer: PreTrainedTokenizerBase, receiver: PreTrainedTokenizerBase) -> dict[int, int]:
    """Special tokens by purpose; where one serves several, the later purpose decides, and EOS pads if nothing does."""

    def purposes(tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return [pad, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]

    by_purpose = dict(zip(purposes(receiver), purposes(sharer), strict=True))
    return {
        token: _by_name(sharer, str(receiver.convert_ids_to_tokens(token))) if other is None else other
        for token in receiver.all_special_ids
        for other in [by_purpose.get(token)]
    }


def _by_name(sharer: PreTrainedTokenizerBase, name: str) -> int:
    found = sharer.convert_tokens_to_ids(name)
    return _unknown(sharer) if found is None else int(found)


def _unknown(sharer: PreTrainedTokenizerBase) -> int:
    return int(sharer.unk_token_id or 0)


def _one(
    sharer: PreTrainedTokenizerBase,
    receiver: PreTrainedTokenizerBase,
    token: int,
    keep: str,
    special: dict[int, int],
) -> int:
    if token in special:
        return special[token]
    pieces = list(sharer.encode(_decoded(receiver, token), add_special_tokens=False))
    if not pieces:
        return _unknown(sharer)
    return int(pieces[0] if keep == "first" else max(pieces, key=lambda piece: len(_decoded(sharer, piece))))


def _decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
