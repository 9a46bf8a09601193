"""Caches: positions, padding, rotation, and the way to and from transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from conftest import ARCHITECTURES, WINDOW, bare_spec, random_cache, tiny_lm
from kvtalk.cache import PADDING, KVCache
from kvtalk.errors import CacheError
from kvtalk.rope import AngleTable, Rope, rotate

SPEC = bare_spec()


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 100_000), second=st.integers(0, 100_000), rotary=st.sampled_from([4, 8, 16]))
def test_rotating_twice_is_rotating_by_the_sum(first: int, second: int, rotary: int) -> None:
    rope = Rope(tuple(10_000.0 ** (-index / rotary) for index in range(rotary // 2)))
    keys = torch.randn(1, 2, 1, 16)
    one = rotate(rotate(keys, rope.angles(torch.tensor([first]))), rope.angles(torch.tensor([second])))
    both = rotate(keys, rope.angles(torch.tensor([first + second])))
    # float32 holds an angle of 1e5 radians to about 0.01.
    assert (one - both).abs().max() < 0.05
    assert torch.equal(one[..., rotary:], keys[..., rotary:])


def test_unrotating_undoes_rotating() -> None:
    cache = random_cache(SPEC, 50, start=1000)
    again = cache.unrotated(SPEC).rotated_as(SPEC)
    for one, other in zip(again.layers, cache.layers, strict=True):
        assert (one.keys - other.keys).abs().max() < 1e-5
    assert cache.rotated_as(SPEC) is cache


def test_angles_are_computed_once_for_layers_that_share_them() -> None:
    table = AngleTable()
    rope = SPEC.layers[0].rope
    assert rope is not None
    positions = torch.arange(5)[None]
    assert table.angles(rope, positions) is table.angles(rope, positions.clone())
    assert table.angles(rope, positions) is not table.angles(rope, positions + 1)


def test_moving_before_position_zero_is_refused() -> None:
    with pytest.raises(CacheError, match="before position 0"):
        random_cache(SPEC, 4, start=3).moved(-4, SPEC)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_stacked_rows_come_back_as_they_were(lengths: list[int]) -> None:
    caches = [random_cache(SPEC, length, seed=length) for length in lengths]
    stacked = KVCache.stack(caches)
    assert stacked.batch == len(lengths)
    for row, cache in zip(stacked.rows(), caches, strict=True):
        assert row.length == cache.length
        for one, other in zip(row.layers, cache.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.positions, other.positions)


def test_right_padding_is_as_good_as_left_padding() -> None:
    cache = random_cache(SPEC, 6)
    layer = cache.layers[0]
    positions = torch.tensor([[0, 1, 2, 3, PADDING, PADDING]])
    padded = KVCache((type(layer)(layer.keys, layer.values, positions),), (4,))
    row = padded.row(0)
    assert torch.equal(row.layers[0].positions, torch.arange(4)[None])
    assert torch.equal(row.layers[0].keys, layer.keys[:, :, :4])


def test_rows_and_spans_are_views() -> None:
    cache = random_cache(SPEC, 6)
    assert cache.row(0).layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert cache.since(2).layers[0].values._base is not None


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_to_and_from_transformers_without_copying(arch: str) -> None:
    lm = tiny_lm(arch)
    ids = torch.tensor([lm.encode("The same tensors go in and come out, whatever the window.")])
    native = DynamicCache(config=lm.spec.config)
    with torch.no_grad():
        lm.model(ids, past_key_values=native)
        adopted = KVCache.from_transformers(native, torch.arange(ids.shape[1])[None])
        back = adopted.to_transformers(lm.spec)
        for before, after in zip(native.layers, back.layers, strict=True):
            assert before.keys.data_ptr() == after.keys.data_ptr()
            assert before.get_seq_length() == after.get_seq_length()
        following = torch.tensor([[70, 71, 72]])
        one = lm.model(following, past_key_values=native).logits
        other = lm.model(following, past_key_values=back).logits
    assert torch.equal(one, other)


def test_only_a_whole_cache_is_given_to_transformers() -> None:
    lm = tiny_lm("gemma3")
    cache = lm.prefill([lm.encode("A text that is longer than the window of sixteen.")])
    for broken in (cache.take([torch.tensor([0, 2])] * 4), cache.unrotated(lm.spec)):
        with pytest.raises(CacheError):
            broken.to_transformers(lm.spec)
    with pytest.raises(CacheError, match="place the cache"):
        lm.prefill([lm.encode("one"), lm.encode("three")]).to_transformers(lm.spec)


def test_what_no_later_token_can_attend_is_left_out() -> None:
    spec = bare_spec(window=8)
    cache = random_cache(spec, 30)
    assert [layer.tokens for layer in cache.layers] == [7, 30]
    lm = tiny_lm("gemma3")
    read = lm.prefill([lm.encode("x" * 60)]).attendable(lm.spec)
    assert [layer.tokens for layer in read.layers] == [WINDOW - 1, 60] * 2


def test_an_empty_native_cache_is_refused() -> None:
    with pytest.raises(CacheError, match="empty"):
        KVCache.from_transformers(DynamicCache(config=tiny_lm("llama").spec.config), torch.arange(3)[None])


def test_caches_of_different_kinds_do_not_stack() -> None:
    cache = random_cache(SPEC, 3)
    with pytest.raises(CacheError):
        KVCache.stack([cache, cache.unrotated(SPEC)])
    with pytest.raises(CacheError):
        KVCache.stack([])
