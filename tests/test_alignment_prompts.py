"""Whole prompts, each with its own template around the same texts; and the published way, decoding and encoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvtalk import bundled
from kvtalk.alignment.coverage import coverage
from kvtalk.alignment.pieces import TEMPLATES, Piece, align_pieces, joined, template_piece, text_piece
from kvtalk.alignment.reencode import KEEP, kept, reencode
from kvtalk.alignment.tokens import NONE, STRATEGIES, align, tokenize
from kvtalk.errors import AlignmentError
from test_alignment import PROSE, TOKENIZERS, both, overlap, pairs, texts, tokenizer_named

templates = st.lists(st.integers(2, 90), max_size=4)


def chat(name: str, contents: list[str], around: list[list[int]]) -> list[Piece]:
    """Template tokens before, between and after texts."""
    made = [template_piece("begin", around[0])]
    for content, ids in zip(contents, around[1:], strict=True):
        made += [text_piece(tokenizer_named(name), "turn", content), template_piece("end", ids)]
    return made


def owners(pieces: list[Piece]) -> list[int]:
    return [number for number, piece in enumerate(pieces) for _ in piece.tokens.ids]


@given(st.data(), st.lists(texts, min_size=1, max_size=3), pairs, st.sampled_from(STRATEGIES))
@settings(max_examples=150, deadline=None)
def test_each_text_is_aligned_as_by_itself_whatever_the_templates(data, contents, names, strategy):
    theirs, ours = (chat(name, contents, [data.draw(templates) for _ in range(len(contents) + 1)]) for name in names)
    try:
        made = align_pieces(theirs, ours, strategy)
    except AlignmentError:
        assert all((align(*both(*names, text)) == NONE).all() for text in contents)
        return
    their_owners, our_owners = owners(theirs), owners(ours)
    whole = joined(theirs), joined(ours)
    assert len(made.first) == len(whole[1].ids)
    for token, (first, count) in enumerate(zip(made.first, made.count, strict=True)):
        if ours[our_owners[token]].text is None:
            assert count == 0
        elif count:
            assert {their_owners[first], their_owners[first + count - 1]} == {our_owners[token]}
            assert overlap(whole[0].spans[first], whole[1].spans[token]) > 0
    for number, piece in enumerate(ours):
        if piece.text is not None and strategy != "mean":
            start = their_owners.index(number) if number in their_owners else 0
            alone = align(theirs[number].tokens, piece.tokens, strategy)
            here = made.index()[np.array(our_owners) == number]
            assert (here == np.where(alone == NONE, NONE, alone + start)).all()


def test_template_tokens_are_left_alone_or_aligned_end_to_end_by_role():
    theirs = chat("bytes", ["the x"], [[1, 2, 3], [4, 5, 6, 7]])
    ours = chat("words", ["the x"], [[9], [9, 9, 9]])
    assert align_pieces(theirs, ours, "first").index().tolist() == [NONE, 3, 7, NONE, NONE, NONE]
    by_role = align_pieces(theirs, ours, "first", template="role")
    assert by_role.index().tolist() == [2, 3, 7, 8, NONE, 11]
    assert coverage(joined(theirs), joined(ours), by_role).aligned == 5


def test_roles_that_one_prompt_has_more_often_stay_unfused():
    theirs = chat("bytes", ["the"], [[1], [4]])
    ours = [template_piece("begin", [8]), *chat("bytes", ["the"], [[1], [4]])]
    assert align_pieces(theirs, ours, template="role").index().tolist() == [NONE, NONE, 1, 2, 3, 4]


def test_prompts_that_do_not_match_are_refused():
    one = chat("bytes", ["the"], [[1], [4]])
    with pytest.raises(AlignmentError, match="texts turn, the receiver none.*template pieces"):
        align_pieces(one, [template_piece("begin", [1])])
    with pytest.raises(AlignmentError, match="'turn' is not the same in both prompts"):
        align_pieces(one, chat("bytes", ["the "], [[1], [4]]))
    with pytest.raises(AlignmentError, match="align on nothing.*the same texts"):
        align_pieces(chat("pieces", [" \n"], [[1], [4]]), chat("bytes", [" \n"], [[1], [4]]))
    with pytest.raises(AlignmentError, match="unfused, role"):
        align_pieces(one, one, template="all")
    with pytest.raises(AlignmentError, match="first, last, coverage, mean"):
        align_pieces(one, one, "best")
    assert TEMPLATES[0] == "unfused"


def encoded(name: str, text: str) -> list[int]:
    return tokenize(tokenizer_named(name), [text])[0].ids


def test_reencoding_keeps_one_piece_of_each_token():
    sharer, receiver = TOKENIZERS["bytes"], TOKENIZERS["words"]
    ids = encoded("words", "the 北京 x")
    assert sharer.decode(reencode(sharer, receiver, ids, "first")[0:1]) == "t"
    assert reencode(sharer, receiver, ids, "first")[1] == encoded("bytes", "北京")[0]
    assert reencode(sharer, receiver, ids, "first")[2] == encoded("bytes", "x")[0]
    pieces = TOKENIZERS["pieces"]
    wholes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({";fox": 0, "北京": 1}, "")))
    assert pieces.decode(reencode(pieces, wholes, [0], "first")) == ";"
    assert pieces.decode(reencode(pieces, wholes, [0], "longest")) == "fox"
    assert pieces.decode(reencode(pieces, wholes, [1], "longest")) == "北"  # of equals the first
    with pytest.raises(AlignmentError, match="first, longest"):
        reencode(sharer, receiver, ids, "last")


def test_reencoding_loses_what_no_token_holds_alone():
    """The bytes of a character decode to U+FFFD, one by one; spans are exact where this baseline is not."""
    sharer, receiver = TOKENIZERS["words"], TOKENIZERS["bytes"]
    theirs, ours = both("words", "bytes", "北京")
    again = reencode(sharer, receiver, ours.ids)
    assert set(again) == {sharer.unk_token_id}
    assert not kept(again, theirs, ours).any()
    assert (align(theirs, ours) == 0).all()


def test_special_tokens_are_reencoded_by_purpose_and_by_name():
    pieces, plain = TOKENIZERS["pieces"], TOKENIZERS["bytes"]
    assert reencode(pieces, plain, [plain.pad_token_id]) == [pieces.pad_token_id]
    assert reencode(pieces, plain, [plain.bos_token_id]) == [pieces.unk_token_id]  # it has none
    assert reencode(pieces, plain, encoded("bytes", " ")) == [pieces.unk_token_id]  # encodes to nothing
    assert reencode(plain, pieces, [pieces.unk_token_id]) == [0]  # it has no unknown token


@given(texts, st.sampled_from(["bytes", "words", "pieces"]), st.sampled_from(KEEP))
@settings(max_examples=50, deadline=None)
def test_reencoded_tokens_that_are_kept_are_the_sharers_own(text, name, keep):
    theirs, ours = both(name, "bytes", text)
    again = reencode(tokenizer_named(name), TOKENIZERS["bytes"], ours.ids, keep)
    found = kept(again, theirs, ours)
    assert len(found) == len(again) == len(ours.ids)
    for token, span, own in zip(again, ours.spans, found, strict=True):
        over = [theirs.ids[index] for index, other in enumerate(theirs.spans) if overlap(span, other) > 0]
        assert own == (token in over)


@pytest.mark.models
@pytest.mark.parametrize("sharer", list(bundled.MODELS))
def test_real_tokenizers_reencode_some_of_a_text_and_spans_align_all_of_it(sharer):
    receiver = next(name for name in bundled.MODELS if name != sharer)
    theirs, ours = both(sharer, receiver, f"  {PROSE} 👩‍👩‍👧 e\u0301")
    again = reencode(tokenizer_named(sharer), tokenizer_named(receiver), ours.ids)
    assert 0.3 < kept(again, theirs, ours).mean() < 0.9
    assert (align(theirs, ours) != NONE).all()
