"""What a model's cache looks like: geometry, rotary embedding, sliding windows, and a fingerprint of all of it.

The geometry is not read from the configuration alone: one token is run at two positions, and the keys must differ
by exactly the rotation that the configuration promises. A model whose cache is something else (latent attention,
interleaved or dynamic rotary embedding, recurrent state) is refused by name before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvtalk.errors import ModelError
from kvtalk.rope import Rope, rotate

STATIC_ROPE_TYPES = ("default", "linear", "llama3")
_PROBE_POSITION = 5
_PROBE_TOLERANCE = 0.05
_AT_ONCE = 1 << 22  # numbers of a weight in one step of its digest


@dataclass(frozen=True)
class LayerSpec:
    """The cache of one layer.

    Attributes:
        kv_heads: heads of the keys and values.
        head_dim: channels of one head.
        window: how many of the last tokens a token can attend, itself included; None for all.
        rope: rotary frequencies of the keys; None where the layer has no positions.
        keys: whether they are read at the receiver, and so cross.
        values: the same of these.
    """

    kv_heads: int
    head_dim: int
    window: int | None
    rope: Rope | None
    keys: bool = True
    values: bool = True


@dataclass(frozen=True)
class Fingerprint:
    """What sharer and receiver must have in common; 64-bit xxh3 digests in hex.

    Attributes:
        arch: the model's type in `transformers`, for people to read.
        geometry: layers, KV heads, head_dim and windows.
        rope: rotary frequencies of every layer.
        tokenizer: the tokenizer's vocabulary, merges and normalisation.
        weights: all parameters as bf16, so that it does not depend on the type a model is loaded in.
    """

    arch: str
    geometry: str
    rope: str
    tokenizer: str
    weights: str

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of the parts that differ, the arch's name left out."""
        parts = ("geometry", "rope", "tokenizer", "weights")
        return [part for part in parts if getattr(self, part) != getattr(other, part)]


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model's cache geometry and identity.

    Attributes:
        layers: from the input side.
        dtype: the type the model computes in.
        max_positions: the longest sequence it reads.
        fingerprint: what packets carry.
        config: the `transformers` text configuration.
        adapter: identity of the adapter in whose latent space the cache lies; None for the model's own cache.
    """

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    max_positions: int
    fingerprint: Fingerprint
    config: Any
    adapter: str | None = None

    @cached_property
    def values_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's cache in bf16."""
        return 2 * self.values_per_token


def read_spec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelSpec:
    """Describe a loaded model, and check that its cache is one that kvtalk can carry.

    Raises:
        ModelError: the architecture's cache or rotary embedding is not supported.
    """
    config = model.config.get_text_config(decoder=True)
    _refuse_unsupported(config)
    first, second, native = _probe(model, config)
    ropes = _ropes(model, config, len(first))
    windows = [getattr(layer, "sliding_window", None) for layer in native.layers]
    layers = tuple(
        _layer_spec(config, index, *states)
        for index, states in enumerate(zip(first, second, ropes, windows, strict=True))
    )
    return ModelSpec(
        layers=layers,
        dtype=model.dtype,
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 2**31),
        fingerprint=Fingerprint(
            arch=str(config.model_type),
            geometry=_digest([f"{x.kv_heads},{x.head_dim},{x.window}".encode() for x in layers]),
            rope=_digest([repr(x.rope and x.rope.frequencies).encode() for x in layers]),
            tokenizer=tokenizer_digest(tokenizer),
            weights=_digest(_weight_bytes(model)),
        ),
        config=config,
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's part of a model's fingerprint."""
    return _digest([_tokenizer_bytes(tokenizer)])


def _refuse_unsupported(config: Any) -> None:
    arch = config.model_type
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(f"{arch}: latent attention (MLA) is not supported yet; use a model with plain KV heads")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ModelError(f"{arch}: no rotary position embedding; kvtalk carries rotary caches only")
    by_type = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if p]
    for one in by_type:
        kind = one.get("rope_type", "default")
        if kind not in STATIC_ROPE_TYPES:
            raise ModelError(
                f"{arch}: rotary type {kind!r} depends on the length and is not supported yet "
                f"(supported: {', '.join(STATIC_ROPE_TYPES)})"
            )


@torch.no_grad()
def _probe(model: PreTrainedModel, config: Any) -> tuple[list[Any], list[Any], DynamicCache]:
    """One token at position 0 and at another position: its keys and values, and the native cache's layers."""
    token = min(100, config.vocab_size - 1)
    states = []
    for position in (0, _PROBE_POSITION):
        cache = DynamicCache(config=config)
        ids = torch.tensor([[token]], device=model.device)
        try:
            model.get_decoder()(  # without the unembedding, which takes long to read
                input_ids=ids, position_ids=torch.full_like(ids, position), past_key_values=cache, use_cache=True
            )
            states.append([(layer.keys, layer.values) for layer in cache.layers])
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{config.model_type}: its cache is not a plain KV cache ({error})") from error
    return states[0], states[1], cache


def _ropes(model: PreTrainedModel, config: Any, layers: int) -> list[Rope]:
    module = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    if module is None:
        raise ModelError(f"{config.model_type}: no rotary_emb module found; kvtalk carries rotary caches only")
    types = getattr(config, "layer_types", None) or [""] * layers
    ropes = []
    for layer_type in types:
        prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
        if getattr(module, f"{prefix}attention_scaling", 1.0) != 1.0:
            raise ModelError(f"{config.model_type}: scaled rotary attention is not supported yet")
        ropes.append(Rope(tuple(getattr(module, f"{prefix}inv_freq").float().tolist())))
    return ropes


def _layer_spec(
    config: Any,
    index: int,
    at_zero: tuple[Tensor, Tensor],
    moved: tuple[Tensor, Tensor],
    rope: Rope,
    window: int | None,
) -> LayerSpec:
    (keys, values), (moved_keys, moved_values) = at_zero, moved
    if not isinstance(keys, Tensor) or keys.dim() != 4 or keys.shape != values.shape:
        raise ModelError(f"{config.model_type}: layer {index} holds no plain keys and values")
    turned = rotate(keys, rope.angles(torch.tensor([_PROBE_POSITION], device=keys.device)))
    if not _close(values, moved_values):
        raise ModelError(f"{config.model_type}: values of layer {index} depend on the position")
    used: Rope | None = rope
    if not _close(turned, moved_keys):
        if not _close(keys, moved_keys):
            raise ModelError(
                f"{config.model_type}: keys of layer {index} are not rotated as half-split RoPE; "
                "interleaved and custom rotary layouts are not supported yet"
            )
        used = None
    return LayerSpec(keys.shape[1], keys.shape[3], window, used)


def _close(expected: Tensor, got: Tensor) -> bool:
    scale = expected.float().norm()
    return bool((expected.float() - got.float()).norm() <= _PROBE_TOLERANCE * scale)


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(sorted(tokenizer.get_vocab().items())).encode()
    backend.no_padding()  # both are state of the last call, not of the tokenizer; they are set anew at each call
    backend.no_truncation()
    return str(backend.to_str()).encode()


def _weight_bytes(model: PreTrainedModel) -> Iterator[bytes | memoryview]:
    for name, parameter in sorted(model.named_parameters()):
        yield f"{name}{tuple(parameter.shape)}".encode()
        for part in parameter.detach().reshape(-1).split(_AT_ONCE):  # a whole embedding's copy is slow to allocate
            yield memoryview(part.to(torch.bfloat16).cpu().view(torch.uint8).numpy())


def _digest(chunks: Any) -> str:
    digest = xxhash.xxh3_64()
    for chunk in chunks:
        digest.update(chunk)
    return str(digest.hexdigest())
