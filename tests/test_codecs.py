"""Codecs: exact sizes, bounded error, honest about what they cannot pack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtalk.codecs import CODECS, codec
from kvtalk.codecs.nf4 import LEVELS
from kvtalk.codecs.packing import pack, unpack
from kvtalk.errors import CodecError

BLOCKS = ("token", "channel", "4x8", "*x1", "8x*", "3x2")
NAMES = ["fp32", "bf16", "fp16", *(f"{name}:{block}" for name in ("int8", "int4", "int2", "nf4") for block in BLOCKS)]


def roundtrip(name: str, values: torch.Tensor) -> torch.Tensor:
    packer = codec(name)
    codes, scales = packer.encode(values)
    assert codes.numel() == packer.code_size(*values.shape)
    assert scales.numel() == packer.scales_size(*values.shape)
    out = torch.full(values.shape, float("nan"))
    packer.decode(codes, scales, out)
    return out


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 150),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 9),
)
def test_error_is_at_most_the_step(name: str, heads: int, tokens: int, scale: float, seed: int) -> None:
    values = scale * torch.randn(heads, tokens, 16, generator=torch.Generator().manual_seed(seed))
    spread = float(values.max() - values.min())
    share = {
        "fp32": 0,
        "bf16": 2**-8,
        "fp16": 2**-10,
        "int8": 0.6 / 255,
        "int4": 0.6 / 15,
        "int2": 0.6 / 3,
        "nf4": 0.16,
    }
    allowed = share[name.split(":")[0]] * spread + 2e-3 * float(values.abs().max())
    assert (roundtrip(name, values) - values).abs().max() <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_any_range_of_a_block_packs_alike(name: str) -> None:
    """A long sequence is worked on in pieces; the pieces do not show."""
    values = torch.randn(2, 9000, 16)
    whole = roundtrip(name, values)
    if not name.endswith(("*x1", "3x2")):
        assert torch.equal(roundtrip(name, values[:, :4096])[:, :64], whole[:, :64])
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1000.0])
def test_a_constant_is_exact(name: str, value: float) -> None:
    assert torch.equal(roundtrip(name, torch.full((2, 70, 16), value)), torch.full((2, 70, 16), value))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    values = torch.randn(2, 70, 16)
    values[1, 69, 5] = bad
    with pytest.raises(CodecError, match="NaN, infinity"):
        codec(name).encode(values)


@pytest.mark.parametrize("name", ["fp16", "int8", "int4", "nf4"])
def test_values_beyond_fp16_are_refused_and_the_error_says_bf16(name: str) -> None:
    values = torch.randn(1, 8, 16)
    values[0, 0, 0] = -1e6
    with pytest.raises(CodecError, match="use bf16"):
        codec(name).encode(values)
    assert torch.isfinite(roundtrip("bf16", values)).all()


def test_channel_blocks_survive_an_outlier_channel_and_token_blocks_do_not() -> None:
    """Why keys take blocks of one channel (KIVI)."""
    values = torch.randn(1, 256, 64)
    values[..., 7] += 60
    rest = [channel for channel in range(64) if channel != 7]
    error = {
        block: float((roundtrip(f"int4:{block}", values) - values)[..., rest].square().mean())
        for block in ("token", "channel")
    }
    assert error["token"] > 20 * error["channel"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_lossless(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 16), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_nf4_levels_are_those_of_the_paper() -> None:
    """Quantiles of a normal distribution, symmetric ends, an exact zero (QLoRA, appendix E)."""
    assert len(LEVELS) == 16
    assert (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1.0, 0.0, 1.0)
    assert list(LEVELS) == sorted(LEVELS)
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    expected = torch.cat([positive, negative, torch.zeros(1)]).sort().values / float(positive.max())
    assert torch.allclose(torch.tensor(LEVELS), expected, atol=1e-4)


@pytest.mark.parametrize("text", ["zip", "int4:", "int4:0x1", "int4:axb", "int4:1x2x3", "int4:-1x1", "int3", ""])
def test_unknown_codecs_are_refused_with_the_known_ones(text: str) -> None:
    if text == "int4:":
        assert str(codec(text)) == "int4:1x*"
        return
    with pytest.raises(CodecError):
        codec(text)


def test_blocks_must_divide_the_head() -> None:
    with pytest.raises(CodecError, match="do not divide"):
        codec("int4:1x24").encode(torch.randn(1, 4, 64))


def test_every_codec_names_itself_so_that_it_can_be_made_again() -> None:
    for name in NAMES:
        assert str(codec(str(codec(name)))) == str(codec(name))
    assert set(CODECS) == {"fp32", "bf16", "fp16", "int8", "int4", "int2", "nf4"}
