"""The wire format: sizes known beforehand, every damage noticed, nothing allocated on a lie."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO

import pytest
import safetensors
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load

from conftest import bare_spec, random_cache
from kvtalk.cache import KVCache
from kvtalk.codecs import CODECS
from kvtalk.errors import CacheError, CodecError, KVTalkError, PacketError
from kvtalk.packet import Packet, prefix, read_stream, to_cache
from kvtalk.packet_writing import encode, encode_rows, predict, write
from kvtalk.placement import place
from kvtalk.planning import Plan
from kvtalk.selection.tokens import FORETOLD, TOKEN_POLICIES
from kvtalk.spec import ModelSpec

SPEC = bare_spec()
PLAIN = [name for name in TOKEN_POLICIES if name not in FORETOLD]
"""Those that need nothing but the cache."""
BLOCKS = ("token", "channel", "4x8", "*x1", "8x*", "3x2")


def small_packet(plan: Plan = Plan("int4:channel", "int4:token", "before", "value_norm", 3)) -> bytes:
    return bytes(encode(random_cache(SPEC, 5), plan, SPEC))


def remade(blob: bytes, **changes: object) -> bytes:
    """A packet whose manifest was changed by someone who also mends the checksums."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    manifest = {**json.loads(header["__metadata__"]["kvtalk"]), **changes}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    header["__metadata__"] = {"kvtalk": text, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body + blob[8 + length :]


def read_all(blob: bytes, spec: ModelSpec = SPEC) -> KVCache:
    return to_cache(read_stream(blob), spec)


plans = st.builds(
    Plan,
    keys=st.sampled_from(
        [*CODECS, *(f"{name}:{block}" for name in ("int8", "int4", "int2", "nf4") for block in BLOCKS)]
    ),
    values=st.sampled_from(
        [*CODECS, *(f"{name}:{block}" for name in ("int8", "int4", "int2", "nf4") for block in BLOCKS)]
    ),
    rope=st.sampled_from(["before", "after"]),
    tokens=st.sampled_from(PLAIN),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 80)),
    layers=st.sampled_from(["all", "first:1", "last:1", "every:2", "0"]),
    seed=st.integers(0, 3),
)


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    plan=plans,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 16]),
    window=st.sampled_from([None, 6]),
    tokens=st.integers(1, 70),
    start=st.integers(0, 2000),
    parts=st.integers(1, 2),
)
def test_predicted_size_is_the_size(
    plan: Plan,
    layers: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    tokens: int,
    start: int,
    parts: int,
) -> None:
    if plan.layers in ("first:1", "last:1", "every:2", "0") and layers == 1:
        plan = replace(plan, layers="all")
    spec = bare_spec(layers, kv_heads, head_dim, window)
    cache = random_cache(spec, tokens, start)
    predicted = predict(cache, plan, spec, start, min(parts, layers))
    target = BytesIO()
    assert write(target, cache, plan, spec, start, min(parts, layers)) == predicted
    assert len(target.getbuffer()) == predicted


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    plan=plans,
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    start=st.integers(0, 5),
)
def test_rows_packed_together_are_those_packed_alone_to_the_byte(plan: Plan, lengths: list[int], start: int) -> None:
    alone = [random_cache(SPEC, tokens, start, seed) for seed, tokens in enumerate(lengths)]
    together = encode_rows(KVCache.stack(alone), [plan] * len(alone), SPEC, start)
    for cache, blob in zip(alone, together, strict=True):
        assert blob == encode(cache, plan, SPEC, start)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans, lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4), gaps=st.booleans())
def test_rows_placed_together_are_those_placed_alone(plan: Plan, lengths: list[int], gaps: bool) -> None:
    blobs = [encode(random_cache(SPEC, tokens, 3, seed), plan, SPEC, 3) for seed, tokens in enumerate(lengths)]
    head = random_cache(SPEC, 2, seed=9)

    def placed(rows: list[memoryview]) -> KVCache:
        prefixes = [[prefix(read_stream(blob), SPEC)] for blob in rows]
        return place(SPEC, head, prefixes, gaps=gaps).to_cache()

    together = placed(blobs)
    for row, blob in enumerate(blobs):
        for one, other in zip(together.row(row).layers, placed([blob]).layers, strict=True):
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans, tokens=st.integers(1, 70), start=st.integers(0, 500))
def test_what_is_read_is_what_was_chosen(plan: Plan, tokens: int, start: int) -> None:
    cache = random_cache(SPEC, tokens, start)
    if plan.rope == "before":
        cache = cache.unrotated(SPEC)
    sent = plan.layout(cache.extents[0], SPEC).layers
    chosen = [plan.choose(layer, [one.kept]) for layer, one in zip(cache.layers, sent, strict=True)]
    cache = cache.rotated_as(SPEC)
    got = to_cache([Packet.parse(encode(cache, plan, SPEC, start))], SPEC)
    assert got.length == cache.length
    assert got.rotated == (plan.rope == "after")
    for one, other in zip(got.layers, chosen, strict=True):
        assert one.keys.shape == other.keys.shape
        if plan.tokens != "key_norm":  # whose choice may turn on the last bit of a norm
            assert torch.equal(one.positions, other.positions)


def test_bf16_packet_is_exact_for_bf16_values() -> None:
    cache = random_cache(SPEC, 9)
    layers = tuple(replace(x, keys=x.keys.bfloat16(), values=x.values.bfloat16()) for x in cache.layers)
    got = read_all(bytes(encode(KVCache(layers, cache.length), Plan(), SPEC)))
    for one, other in zip(got.layers, layers, strict=True):
        assert torch.equal(one.keys, other.keys.float())
        assert torch.equal(one.values, other.values.float())


@pytest.mark.parametrize(
    "plan", [Plan(), Plan("int4:channel", "nf4", "before", "key_norm", 0.5), Plan(layers="every:2")]
)
def test_overhead_is_under_one_kilobyte(plan: Plan) -> None:
    for spec, tokens in ((bare_spec(30, 3, 64), 4096), (bare_spec(18, 1, 256, window=512), 4096)):
        layout = plan.layout(random_cache(spec, tokens, 99).extents[0], spec)
        total = predict(random_cache(spec, tokens, 99), plan, spec, 99)
        assert total - sum(layout.section_sizes().values()) < 1000


def test_other_tools_open_a_packet() -> None:
    blob = small_packet()
    tensors = safetensors_load(blob)
    sizes = Packet.parse(blob).layout.section_sizes()
    assert {name: tensor.numel() for name, tensor in tensors.items()} == sizes


def test_manifest_is_readable_through_safetensors(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "a.kvt"
    file.write_bytes(small_packet())
    with safetensors.safe_open(file, "pt") as opened:
        manifest = json.loads(opened.metadata()["kvtalk"])
    assert manifest["v"] == 1
    assert manifest["end"] == 5


def test_truncated_at_every_length() -> None:
    blob = small_packet()
    for length in range(len(blob)):
        with pytest.raises(PacketError):
            read_all(blob[:length])


def test_bytes_after_the_end() -> None:
    with pytest.raises(PacketError, match="too many"):
        Packet.parse(small_packet() + b"\0")


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    blob = small_packet()
    for index in range(len(blob)):
        damaged = bytearray(blob)
        damaged[index] ^= 1 << bit
        with pytest.raises(PacketError):
            read_all(bytes(damaged))


@pytest.mark.parametrize("blob", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(64), b"{}" * 40])
def test_wrong_magic(blob: bytes) -> None:
    with pytest.raises(PacketError):
        Packet.parse(blob)


def test_a_safetensors_file_that_is_no_packet() -> None:
    from safetensors.torch import save

    with pytest.raises(PacketError, match="not a kvtalk packet"):
        Packet.parse(save({"weight": torch.zeros(3)}))


def test_future_version() -> None:
    with pytest.raises(PacketError, match="version 2 is unknown.*upgrade"):
        Packet.parse(remade(small_packet(), v=2))


def test_unknown_codec() -> None:
    with pytest.raises(PacketError, match="zip9") as caught:
        Packet.parse(remade(small_packet(), codecs=["zip9", "int4:token"]))
    assert caught.value.field == "codecs"


@pytest.mark.parametrize("lacking", [["int4:token", "none"], ["none", "int4:token"]])
def test_keys_or_values_may_be_left_out_only_beside_a_text(lacking: list[str]) -> None:
    with pytest.raises(PacketError, match="a cache has keys and values") as caught:
        Packet.parse(remade(small_packet(), codecs=lacking))
    assert caught.value.field == "codecs"
    with pytest.raises(PacketError, match="one of both at least"):
        Packet.parse(remade(small_packet(), codecs=["none", "none"], text="0" * 16))


def test_another_models_fingerprint() -> None:
    other = replace(SPEC, fingerprint=replace(SPEC.fingerprint, weights="f" * 16))
    with pytest.raises(PacketError, match="weights differ.*load the model that made it"):
        read_all(small_packet(), other)


@pytest.mark.parametrize(
    "changes",
    [
        {"end": 2**60},
        {"start": -1},
        {"start": 5},
        {"start": 50},
        {"longest": 0},
        {"longest": 6},
        {"end": 4},
        {"shapes": [[0, 16, 0, 5, 3, 0, 1]]},
        {"shapes": [[2, 1, 0, 5, 3, 0, 1]]},
        {"shapes": [[2, 16, 0, 2**24, 0, 0, 1]]},
        {"shapes": [[4, 16, 0, 5, 0, 0, 1]], "sums": []},
        {"model": "bare" + ":\ud800" * 4},
        {"longest": 10**9},
        {"shapes": [[4096, 4096, 0, 2**24, 2**24, 0, 1]], "end": 2**24, "longest": 2**24},
        {"shapes": [[2, 16, 0, 5, 6, 0, 1]]},
        {"shapes": [[2, 0, 0, 5, 3, 0, 1]]},
        {"shapes": []},
        {"layers": [4096, 0, 4096, 0]},
        {"layers": [1, 7]},
        {"layers": [0, 0]},
        {"layers": [2, 0, 2]},
        {"covers": [0, 0, 2]},
        {"covers": [0, 2, 1]},
        {"part": [2, 1]},
        {"part": [0, 0]},
        {"sums": []},
        {"sums": ["zz"] * 5},
        {"rotated": "yes"},
        {"payload": "pickle"},
        {"extra": 1},
    ],
    ids=str,
)
def test_absurd_manifest_is_refused_without_allocating(changes: dict[str, object]) -> None:
    """Checksums are mended, so only the declared figures are wrong."""
    with pytest.raises(PacketError):
        read_all(remade(small_packet(), **changes))


def test_absurd_header_length() -> None:
    with pytest.raises(PacketError, match="header"):
        Packet.parse((2**62).to_bytes(8, "little") + bytes(64))


def test_mask_that_contradicts_the_manifest() -> None:
    blob = bytearray(small_packet())
    packet = Packet.parse(bytes(blob))
    begin, end = packet.layout.section_ranges()["positions"]
    origin = len(blob) - sum(packet.layout.section_sizes().values())
    blob[origin + begin] ^= 0b11111
    sums = list(packet.manifest.sums)
    sums[-1] = xxhash.xxh3_64_hexdigest(bytes(blob[origin + begin : origin + end]))
    with pytest.raises(PacketError, match="positions"):
        read_all(remade(bytes(blob), sums=sums))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", list(CODECS))
def test_nan_and_infinity_are_named_by_layer(name: str, value: float) -> None:
    cache = random_cache(SPEC, 6)
    cache.layers[1].values[0, 1, 2, 3] = value
    with pytest.raises(CacheError, match="values of layer 1"):
        encode(cache, Plan(name, name), SPEC)


def test_parts_of_different_caches_do_not_mix() -> None:
    def stream(tokens: int) -> list[Packet]:
        target = BytesIO()
        write(target, random_cache(SPEC, tokens), Plan(), SPEC, 0, parts=2)
        return list(read_stream(target.getbuffer()))

    one, other = stream(5), stream(6)
    for wrong in ([one[0]], [one[1]], [one[0], other[1]], [one[1], one[0]], [*one, one[0]], []):
        with pytest.raises(PacketError):
            to_cache(wrong, SPEC)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_never_raise_anything_else(blob: bytes) -> None:
    with pytest.raises(KVTalkError):
        read_all(blob)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["v", "start", "end", "codecs", "shapes", "layers", "covers", "part", "model", "sums", "masks"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=4),
            max_leaves=8,
        ),
        min_size=1,
    )
)
def test_random_manifests_never_raise_anything_else(changes: dict[str, object]) -> None:
    blob = small_packet()
    if remade(blob, **changes) == remade(blob):
        return
    with pytest.raises(PacketError):
        read_all(remade(blob, **changes))


def test_an_unrotated_cache_is_not_written_as_rotated() -> None:
    cache = random_cache(SPEC, 5)
    with pytest.raises(CacheError, match="not rotated"):
        encode(cache.unrotated(SPEC), Plan(), SPEC)
    with pytest.raises(CacheError, match="begins before position 2"):
        encode(cache, Plan(), SPEC, start=2)
    before = to_cache([Packet.parse(encode(cache, Plan("fp32", "fp32", "before"), SPEC))], SPEC)
    again = read_all(bytes(encode(before.rotated_as(SPEC), Plan("fp32", "fp32"), SPEC)))
    assert (again.layers[0].keys - cache.layers[0].keys).abs().max() < 1e-5


@pytest.mark.parametrize("policy", ["front", "value_norm"])
def test_layers_that_already_have_holes_keep_their_own(policy: str) -> None:
    cache = random_cache(SPEC, 6).take([torch.tensor([0, 2, 5]), torch.tensor([0, 3, 5])])
    got = read_all(bytes(encode(cache, Plan("fp32", "fp32", tokens=policy), SPEC)))
    assert [layer.positions.tolist() for layer in got.layers] == [[[0, 2, 5]], [[0, 3, 5]]]
    for one, other in zip(got.layers, cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


@pytest.mark.parametrize("name", ["bf16", "int8:token"])
def test_nan_in_a_received_packet_is_refused(name: str) -> None:
    """Made by someone who also mends the checksums."""
    blob = bytearray(encode(random_cache(SPEC, 5), Plan(name, name), SPEC))
    packet = Packet.parse(bytes(blob))
    section = "value_scales" if name.startswith("int8") else "values"
    begin, end = packet.layout.section_ranges()[section]
    origin = len(blob) - sum(packet.layout.section_sizes().values())
    blob[origin + begin : origin + begin + 2] = b"\xff\xff"
    sums = list(packet.manifest.sums)
    sums[list(packet.layout.section_sizes()).index(section)] = xxhash.xxh3_64_hexdigest(
        bytes(blob[origin + begin : origin + end])
    )
    with pytest.raises(PacketError, match="values: NaN or infinity"):
        read_all(remade(bytes(blob), sums=sums))


def test_sections_may_begin_at_an_odd_byte() -> None:
    spec = bare_spec(1, 1, 12)
    cache = random_cache(spec, 3)
    for plan in (Plan("int2", "int2"), Plan("int2", "fp32"), Plan("int2", "bf16")):
        assert len(read_all(bytes(encode(cache, plan, spec)), spec).layers) == 1
    with pytest.raises(CodecError, match="whole bytes"):
        predict(random_cache(bare_spec(1, 1, 6), 3), Plan("int2", "int2"), bare_spec(1, 1, 6))
