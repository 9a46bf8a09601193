"""What is chosen, what it will weigh, and what a budget buys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import bare_spec, random_cache
from kvtalk.cache import KVCache
from kvtalk.errors import BudgetError, CodecError, KVTalkError, SelectionError
from kvtalk.packet import Packet, to_cache
from kvtalk.packet_writing import encode, predict
from kvtalk.planning import LADDER, Budget, Plan, estimate_distortion, fit
from kvtalk.selection.layers import select_layers
from kvtalk.selection.tokens import FORETOLD, TOKEN_POLICIES, kept_count, token_policy

SPEC = bare_spec()
PLAIN = [name for name in TOKEN_POLICIES if name not in FORETOLD]
"""Those that need nothing but the cache."""


def kept(policy: str, cache: KVCache, count: int, seed: int = 0) -> list[list[int]]:
    return [token_policy(policy, seed).select(layer, [count])[0].tolist() for layer in cache.layers]


def test_positional_policies() -> None:
    cache = random_cache(SPEC, 10)
    assert kept("front", cache, 3)[0] == [0, 1, 2]
    assert kept("back", cache, 3)[0] == [7, 8, 9]
    assert kept("sinks_recent", cache, 6)[0] == [0, 1, 2, 3, 8, 9]
    assert kept("sinks_recent", cache, 2)[0] == [2, 3]
    assert kept("random", cache, 4, seed=1) == kept("random", cache, 4, seed=1)
    assert kept("random", cache, 4, seed=1) != kept("random", cache, 4, seed=2)


def test_norm_policies_keep_the_extreme_tokens_of_each_layer() -> None:
    cache = random_cache(SPEC, 10)
    cache.layers[0].values[:, :, 4] *= 50
    cache.layers[1].values[:, :, 7] *= 50
    cache.layers[0].keys[:, :, 2] *= 0.01
    assert [indices[0] for indices in kept("value_norm", cache, 1)] == [4, 7]
    assert kept("key_norm", cache, 1)[0] == [2]


@settings(max_examples=100, deadline=None)
@given(policy=st.sampled_from(PLAIN), tokens=st.integers(1, 40), keep=st.integers(1, 50))
def test_every_policy_returns_that_many_ascending_indices(policy: str, tokens: int, keep: int) -> None:
    cache = random_cache(SPEC, tokens)
    count = kept_count(keep, tokens)
    for layer in cache.layers:
        indices = token_policy(policy).select(layer, [count])[0].tolist()
        assert indices == sorted(set(indices))
        assert len(indices) == count
        assert 0 <= indices[0] <= indices[-1] < tokens


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("first:2", [0, 1]),
        ("first:50%", [0, 1, 2]),
        ("last:2", [4, 5]),
        ("last:99", [0, 1, 2, 3, 4, 5]),
        ("every:2", [0, 2, 4]),
        ("5,0,2-3", [0, 2, 3, 5]),
    ],
)
def test_layer_policies(policy: str, expected: list[int]) -> None:
    assert select_layers(policy, 6) == expected


@pytest.mark.parametrize(
    "policy", ["", "none", "first", "first:0", "first:x", "3-1", "6", "0,9", "-1", "all:2", "first:0%"]
)
def test_bad_layer_policies_say_how_to_write_them(policy: str) -> None:
    with pytest.raises(SelectionError):
        select_layers(policy, 6)


@pytest.mark.parametrize("keep", [0.0, 1.5, -0.1, 0, -3])
def test_bad_keeps_are_refused(keep: float | int) -> None:
    with pytest.raises(SelectionError):
        kept_count(keep, 10)


def test_unknown_token_policy_names_the_known_ones() -> None:
    with pytest.raises(SelectionError, match="value_norm"):
        token_policy("magic")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("200KB", 200_000),
        ("1MiB", 1 << 20),
        ("4096", 4096),
        ("1.5 kb", 1500),
        ("25%", 0.25 * 10 * SPEC.bytes_per_token),
        ("0.5x", 0.5 * 10 * SPEC.bytes_per_token),
        ("4bits", 0.5 * 10 * SPEC.values_per_token),
    ],
)
def test_budgets(text: str, amount: float) -> None:
    assert Budget.parse(text).bytes_for(10, SPEC) == int(amount)


@pytest.mark.parametrize("text", ["", "lots", "-5KB", "0", "0%", "12 parsecs", "KB", "1e9", "nan", "5,5KB"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BudgetError, match="200KB"):
        Budget.parse(text)


def planned(cache: KVCache, limit: int, base: Plan | None = None) -> Plan:
    return fit(cache, SPEC, limit, lambda plan: predict(cache, plan, SPEC), base)


@settings(max_examples=150, deadline=None)
@given(limit=st.integers(600, 60_000), tokens=st.integers(1, 200), policy=st.sampled_from(PLAIN))
def test_a_packet_never_exceeds_its_budget(limit: int, tokens: int, policy: str) -> None:
    cache = random_cache(SPEC, tokens)
    try:
        plan = planned(cache, limit, Plan(tokens=policy))
    except BudgetError as error:
        smallest = int(str(error).split(" takes ")[1].split(" ")[0].replace(",", ""))
        assert smallest > limit
        assert len(encode(cache, planned(cache, smallest, Plan(tokens=policy)), SPEC)) <= smallest
        return
    assert len(encode(cache, plan, SPEC)) <= limit


def test_a_larger_budget_is_used_and_never_loses_more() -> None:
    cache = random_cache(SPEC, 300)
    full = predict(cache, Plan(), SPEC)
    losses = []
    for limit in (full, full // 2, full // 3, full // 6, full // 12, full // 30):
        plan = planned(cache, limit)
        sample = cache.unrotated(SPEC) if plan.rope == "before" else cache
        losses.append(estimate_distortion(cache, sample, SPEC, plan))
        assert predict(cache, plan, SPEC) > 0.6 * limit
    assert losses == sorted(losses)
    assert planned(cache, full) == Plan()


def test_a_base_plan_keeps_its_policies_under_a_budget() -> None:
    plan = planned(random_cache(SPEC, 100), 3000, Plan(tokens="back", layers="first:1", seed=3))
    assert (plan.tokens, plan.layers, plan.seed) == ("back", "first:1", 3)


@pytest.mark.parametrize(
    "text",
    [
        "bf16",
        "int4:channel/int4:token before",
        "fp16 value_norm@50%",
        "nf4:1x32 back@12 layers=0,3-5",
        "int8:token/bf16 layers=every:2",
    ],
)
def test_plans_read_what_they_write(text: str) -> None:
    assert str(Plan.parse(text)) == text
    assert Plan.parse(str(Plan.parse(text))) == Plan.parse(text)


def test_aliases_in_plans() -> None:
    assert Plan.parse("int4:channel/int4:token before") == Plan("int4:64x1", "int4:1x*", "before")


@pytest.mark.parametrize(
    "text", ["", "zip", "bf16 sideways", "bf16 magic@50%", "bf16 back@0%", "bf16 back@x", "bf16 back@1.5"]
)
def test_bad_plans_are_refused(text: str) -> None:
    with pytest.raises(KVTalkError):
        Plan.parse(text)


def test_every_rung_of_the_ladder_is_a_codec() -> None:
    for rung in LADDER:
        plan = replace(Plan(), keys=rung.keys, values=rung.values, rope=rung.rope)
        encode(random_cache(SPEC, 40), plan, SPEC)
    with pytest.raises(CodecError):
        predict(random_cache(SPEC, 4), Plan(keys="zip"), SPEC)


def test_dropping_everything_of_a_layer_leaves_the_others() -> None:
    cache = random_cache(SPEC, 12)
    got = to_cache([Packet.parse(encode(cache, Plan(layers="last:1"), SPEC))], SPEC)
    assert [layer.tokens for layer in got.layers] == [0, 12]
    assert torch.equal(got.layers[1].positions, torch.arange(12)[None])


def test_one_token_is_not_all_tokens() -> None:
    assert Plan(keep=1) != Plan(keep=2)
    assert Plan(keep=1.0).keeps_all
    assert not Plan(keep=1).keeps_all
    assert str(Plan(keep=1)) != str(Plan())
    spec = bare_spec(30, 3, 64)
    cache = random_cache(spec, 300)
    plan = fit(cache, spec, 60_000, lambda candidate: predict(cache, candidate, spec))
    assert isinstance(plan.keep, int)
    assert plan.keep > 5


def test_the_smallest_possible_packet_is_the_smallest() -> None:
    spec = bare_spec(30, 3, 64)
    cache = random_cache(spec, 300)
    with pytest.raises(BudgetError) as caught:
        fit(cache, spec, 2000, lambda plan: predict(cache, plan, spec))
    smallest = int(str(caught.value).split(" takes ")[1].split(" ")[0].replace(",", ""))
    for name in ("bf16", "int8", "int4", "nf4", "int2", "int4:channel", "int2:32x1"):
        assert predict(cache, Plan(name, name, keep=1), spec) >= smallest


def test_values_beyond_the_quantized_codecs_leave_bf16() -> None:
    cache = random_cache(SPEC, 100)
    cache.layers[0].keys[0, 0, 3, 3] = 1e6
    full = predict(cache, Plan(), SPEC)
    assert planned(cache, full // 2).keys == "bf16"
