"""CUDA graphs: what would launch many small kernels is recorded once and then launched as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor

_MOST_TOKENS = 2048
"""Of more tokens the kernels take longer than their launches."""
_MOST_GRAPHS = 16
_WARM_UPS = 2
_ONE_AT_A_TIME = RLock()


def bucket_of(tokens: int) -> int:
    """The tokens that a graph for so many is made for: 64, 96, 128, 192, 256, 384 and so on."""
    power = max(64, 1 << (tokens - 1).bit_length())
    return power * 3 // 4 if power > 64 and tokens <= power * 3 // 4 else power


@dataclass(frozen=True, eq=False)
class _Graph:
    """A recorded function with the memory that it reads and writes."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], None]

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        tokens = inputs[0].shape[1]
        for held, given in zip(self.inputs, inputs, strict=True):
            held[:, :tokens].copy_(given)
            if tokens < held.shape[1]:
                held[:, tokens:].zero_()
        self.replay()
        return self.output[:, :tokens].clone()  # the next replay writes over it


class Graphed:
    """A function of tensors, replayed as a CUDA graph where its kernels are short.

    What a token's output is may depend on tokens before it, not on those after it: a graph is recorded for a bucket,
    the next of some round numbers of tokens, and fewer are filled up with zeros at the end. So results are those of
    the plain call for as many tokens as the bucket has, cut; from those for fewer they differ only as far as kernels
    that are chosen by size round differently.

    The function is called as it is on the CPU, with gradients, under autocast, for more than 2,048 tokens, on other
    streams than the default one, where nothing would keep two replays apart, and for the first call of a bucket and of
    shapes: the second one records, which waits for the device and takes as long as some calls. Threads take turns here,
    but none may draw random numbers on the device while another records. Results are the caller's own. Of at most 16
    buckets and shapes it is known that they were met, the one not used for longest goes; all graphs share the memory
    of what they compute on the way.
    """

    def __init__(self, function: Callable[..., Tensor], weights: Iterable[Tensor]) -> None:
        """Nothing is recorded before the first call.

        Args:
            function: of one or more tensors ``[any, tokens, ...]`` to one of the same kind. It may write over them; it
                must not wait for the device, nor read anything else that changes or moves but ``weights``.
            weights: the tensors that it reads besides. Where they have been moved, it is recorded again; others put in
                their place are not noticed.
        """
        self._function, self._weights = function, tuple(weights)
        self._graphs: dict[Hashable, _Graph | None] = {}
        self._where: Hashable = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call the function, or replay it."""
        if not _is_replayed(inputs[0]):
            return self._function(*inputs)
        bucket = bucket_of(inputs[0].shape[1])
        shapes = tuple((one.shape[0], one.shape[2:], one.dtype) for one in inputs)
        where = inputs[0].device, tuple(weight.data_ptr() for weight in self._weights)
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad():
            if where != self._where:
                self._graphs, self._where = {}, where
            met = (bucket, shapes) in self._graphs
            graph = self._graphs.pop((bucket, shapes), None)
            if met and graph is None:
                graph = self._made(inputs, bucket)
            self._graphs[bucket, shapes] = graph
            if len(self._graphs) > _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            return self._function(*inputs) if graph is None else graph.run(inputs)

    def _made(self, inputs: Sequence[Tensor], bucket: int) -> _Graph:
        sizes = [(one.shape[0], bucket, *one.shape[2:]) for one in inputs]
        held = [one.new_zeros(size) for one, size in zip(inputs, sizes, strict=True)]
        return _Graph(held, *self._recorded(held))

    def _recorded(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """The output of the function, and what computes it anew of the same inputs."""
        with torch.cuda.device(inputs[0].device):
            if not any(self._graphs.values()):  # else all share a pool, which must be recorded on one stream
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            for _ in range(_WARM_UPS):  # on the current stream: what loads or chooses kernels must not be recorded
                self._function(*inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = self._function(*inputs)
        return output, graph.replay


def _is_replayed(given: Tensor) -> bool:
    device = given.device
    return (
        device.type == "cuda"
        and 0 < given.shape[1] <= _MOST_TOKENS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    )
