"""Which sharer token stands for which receiver token."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer
from kvtalk.alignment.tokens import NONE, STRATEGIES, Tokenized, align, ranges, tokenize
from kvtalk.errors import AlignmentError

WORDS = ["the", "naïve", "北京", "東京", "😀", "👩‍👩‍👧", "e\u0301", "  ", "\n\n", "don't", "x", "\t", "Ünïcödé", "!"]
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), min_size=1, max_size=12).map(" ".join)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words and single characters it knows, everything else unknown."""
    letters = {letter for word in WORDS for letter in word} | set("abcdefghijklmnopqrstuvwxyz ")
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", *WORDS, *sorted(letters - set(WORDS))])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer(), "words": word_tokenizer()}


def overlap(one: np.ndarray, other: np.ndarray) -> int:
    return min(one[1], other[1]) - max(one[0], other[0])


@given(texts, st.sampled_from(["bytes", "words"]), st.sampled_from(["bytes", "words"]))
@settings(max_examples=150, deadline=None)
def test_every_strategy_picks_what_the_definition_says(text, sharer, receiver):
    theirs, ours = (tokenize(TOKENIZERS[name], [text])[0] for name in (sharer, receiver))
    found = {strategy: align(theirs, ours, strategy) for strategy in STRATEGIES}
    for index, span in enumerate(ours.spans):
        touching = [token for token, other in enumerate(theirs.spans) if overlap(span, other) > 0]
        if not touching or span[0] == span[1]:
            assert all(found[strategy][index] == NONE for strategy in STRATEGIES)
            continue
        assert found["first"][index] == touching[0]
        assert found["last"][index] == touching[-1]
        most = max(overlap(span, theirs.spans[token]) for token in touching)
        best = next(token for token in touching if overlap(span, theirs.spans[token]) == most)
        assert found["coverage"][index] == best


@given(texts)
@settings(max_examples=60, deadline=None)
def test_bytes_against_bytes_stay_within_the_character(text):
    one = tokenize(TOKENIZERS["bytes"], [text])[0]
    for strategy in STRATEGIES:
        assert (one.spans[align(one, one, strategy)] == one.spans).all()


def test_the_pieces_of_one_character_all_lead_to_the_token_that_covers_it():
    theirs, ours = (tokenize(TOKENIZERS[name], ["the 北京 😀"])[0] for name in ("words", "bytes"))
    covered = {theirs.ids[index] for index in align(theirs, ours, "coverage") if index != NONE}
    assert covered == set(theirs.ids)
    assert (align(theirs, ours)[4:10] == 1).all()  # the six bytes of 北京


def test_ranges_are_empty_where_nothing_overlaps():
    sharer = np.array([[0, 2], [4, 6]])
    first, stop = ranges(sharer, np.array([[2, 4], [1, 5], [3, 3], [6, 9]]))
    assert (first[[0, 2, 3]] == stop[[0, 2, 3]]).all()
    assert (first[1], stop[1]) == (0, 2)


def test_four_thousand_tokens_take_less_than_ten_milliseconds():
    rng = random.Random(0)

    def cut() -> Tokenized:
        borders = np.array(sorted(rng.sample(range(1, 16_000), 4095)))
        spans = np.stack([np.append(0, borders), np.append(borders, 16_000)], axis=1)
        return Tokenized([0] * 4096, spans)

    pair = cut(), cut()
    align(*pair)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        align(*pair)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.01


def test_what_cannot_be_aligned_is_refused():
    one = tokenize(TOKENIZERS["bytes"], ["text"])[0]
    with pytest.raises(AlignmentError, match="first, last, coverage"):
        align(one, one, "best")
    with pytest.raises(AlignmentError, match="fast tokenizer"):
        tokenize(object(), ["text"])
