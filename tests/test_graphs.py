"""What is replayed as a CUDA graph: filled up to a bucket, cut again, and never mixed with another call's."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import bare_spec
from kvtalk.adapters import graphs
from kvtalk.adapters.fuser import Fuser, FuserGeometry, Shape
from kvtalk.adapters.graphs import Graphed, bucket_of
from kvtalk.adapters.halves import _vectors, beside
from kvtalk.adapters.pairs import Pairs
from kvtalk.adapters.slots import Network
from kvtalk.adapters.translator import Decoder, Geometry
from kvtalk.cache import KVCache, LayerCache

SHARER, RECEIVER = Shape(3, 2, 32), Shape(4, 1, 64)
SIZES = (70, 96, 65, 130, 1, 2, 64, 70, 96)


class Rerun(Graphed):
    """Fills, runs and cuts as on a GPU; the replay is another call that writes to the same memory."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__(function, [])
        self.recorded: list[int] = []

    def _recorded(self, inputs: list[Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded.append(inputs[0].shape[1])
        output = self._function(*inputs)
        return output, lambda: output.copy_(self._function(*inputs))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_is_replayed", lambda given: True)


def ready(part: Fuser | Decoder, dtype: torch.dtype, device: str) -> Any:
    """With random weights, beside a model of a type on a device."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return beside(part, SimpleNamespace(spec=SimpleNamespace(dtype=dtype), device=torch.device(device)))


def decoder_of(dtype: torch.dtype, device: str) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    decoder = ready(Decoder(Geometry(96, 4, 512, width=128, latent=64, bottleneck=16)), dtype, device)
    return lambda latents: _vectors(decoder, dtype, latents)


def network_of(dtype: torch.dtype, device: str) -> Network:
    torch.manual_seed(0)
    fuser = Fuser(FuserGeometry(SHARER, RECEIVER, (0, 1, 1, 2), hidden=64, middle=64, weighing=32))
    spec = replace(bare_spec(RECEIVER.layers, RECEIVER.kv_heads, RECEIVER.head_dim), dtype=dtype)
    return Network(ready(fuser, dtype, device).opened().fold(), spec, torch.device(device))


def cache_of(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> KVCache:
    size = (1, shape.kv_heads, tokens, shape.head_dim)
    positions = torch.arange(tokens)[None]
    made = (torch.randn(2, *size, device=device, dtype=dtype).unbind() for _ in range(shape.layers))
    return KVCache(tuple(LayerCache(*both, positions) for both in made), (tokens,))


def fused(network: Network, tokens: int, dtype: torch.dtype, device: str, whole: bool = False) -> Tensor:
    """All but the last token; every third was not sent, if not the whole."""
    torch.manual_seed(tokens)
    lent, own = (cache_of(shape, tokens + 1, dtype, device) for shape in (SHARER, RECEIVER))
    every = torch.arange(tokens)
    columns = torch.where((every % 3 == 1) & (not whole), -1, every).expand(SHARER.layers, -1)
    rows = torch.zeros_like(every)
    received = torch.stack([*(layer.keys for layer in lent.layers), *(layer.values for layer in lent.layers)])
    return network.added(received, rows, columns, every, own.stacked(), Pairs(rows, every, every)).added


def latents_of(tokens: int, device: str) -> Tensor:
    torch.manual_seed(tokens)
    return torch.randn(1, tokens, 48, device=device)


def test_buckets_hold_the_tokens_and_at_most_half_as_many_more():
    found = [bucket_of(tokens) for tokens in range(1, 2049)]
    assert sorted(set(found)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(bucket >= tokens for tokens, bucket in enumerate(found, 1))
    assert all(bucket <= 1.5 * tokens for tokens, bucket in enumerate(found, 1) if tokens > 64)
    assert found == sorted(found)


@torch.inference_mode()
def test_a_decoder_that_is_filled_up_gives_what_it_gives_alone(replayed: None):
    decode = decoder_of(torch.float32, "cpu")
    run = Rerun(decode)
    kept = [(run(latents_of(tokens, "cpu")), decode(latents_of(tokens, "cpu"))) for tokens in SIZES]
    assert run.recorded == [96, 64]  # each at the second call; of 192 there is but one
    for (got, plain), tokens in zip(kept, SIZES, strict=True):
        assert got.shape == plain.shape == (1, tokens, 512)
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_fuser_that_is_filled_up_adds_what_it_adds_alone(replayed: None):
    plain, filled = (network_of(torch.float32, "cpu") for _ in range(2))
    plain._added = plain._added._function
    filled._added = run = Rerun(plain._added)
    kept = [tuple(fused(network, tokens, torch.float32, "cpu") for network in (filled, plain)) for tokens in SIZES]
    assert run.recorded == [96, 64]
    kept += [
        tuple(fused(network, tokens, torch.float32, "cpu", True) for network in (filled, plain)) for tokens in (70, 96)
    ]
    assert run.recorded == [96, 64, 96]  # where everything was sent less is computed
    for got, expected in kept:
        assert got.shape == expected.shape
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_what_an_earlier_call_left_does_not_reach_the_next(replayed: None):
    """NaN times an attention weight of zero is still NaN."""
    decode = decoder_of(torch.float32, "cpu")
    with torch.inference_mode():
        run = Rerun(decode)
        for _ in range(2):
            assert run(torch.full((1, 90, 48), torch.nan)).isnan().all()
        first = run(latents_of(70, "cpu"))
    with torch.no_grad():  # what was made in inference mode is used outside it
        assert first.isfinite().all()
        assert torch.equal(run(latents_of(70, "cpu")), first)
    assert run.recorded == [96]


def test_the_graph_not_used_for_longest_goes_and_moved_weights_are_recorded_anew(replayed: None):
    weight = torch.ones(3)
    run = Rerun(lambda given: given * 2)
    run._weights = (weight,)

    def recorded_by(width: int, dtype: torch.dtype = torch.float32) -> int:
        before = len(run.recorded)
        for _ in range(2):
            assert torch.equal(run(torch.ones(1, 5, width, dtype=dtype)), torch.full((1, 5, width), 2, dtype=dtype))
        return len(run.recorded) - before

    assert [recorded_by(width) for width in range(1, 17)] == [1] * 16
    assert recorded_by(1) == 0  # now 2 is the one not used for longest
    assert recorded_by(1, torch.float64) == 1
    assert len(run._graphs) == 16
    assert [recorded_by(width) for width in (1, 3, 2)] == [0, 0, 1]
    weight.data = torch.ones(3)
    assert recorded_by(1) == 1
    assert len(run._graphs) == 1


def test_on_the_cpu_the_function_is_called_as_it_is():
    run = Rerun(lambda given: given)
    given = torch.ones(1, 5, 2)
    assert run(given) is given
    assert not run.recorded


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu_give_what_plain_calls_give(dtype: torch.dtype):
    tolerance = {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    decode, network = decoder_of(dtype, "cuda"), network_of(dtype, "cuda")
    plain = network_of(dtype, "cuda")
    plain._added = plain._added._function
    run = Graphed(decode, [])
    with torch.inference_mode():
        kept = [(run(latents_of(tokens, "cuda")), decode(latents_of(tokens, "cuda"))) for tokens in SIZES]
    with torch.no_grad():
        kept += [tuple(fused(one, tokens, dtype, "cuda") for one in (network, plain)) for tokens in SIZES]
        again = fused(network, 70, dtype, "cuda")
    assert len(run._graphs) == len(network._added._graphs) == 3
    for got, expected in kept:  # compared only now: a later replay has changed none of them
        assert got.shape == expected.shape
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, **tolerance)
    assert torch.equal(again, kept[len(SIZES)][0])


@CUDA
def test_with_gradients_autocast_or_another_stream_nothing_is_replayed():
    run = Graphed(lambda given: given * 2, [])
    given = torch.ones(1, 5, 2, device="cuda")
    run(given)
    with torch.no_grad(), torch.autocast("cuda"):
        run(given)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        run(given)
    with torch.no_grad():
        run(given.expand(1, 5, 2).repeat(1, 500, 1))
    assert not run._graphs
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(run(given), 2 * given)
    assert len(run._graphs) == 1
