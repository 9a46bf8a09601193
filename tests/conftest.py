"""Tiny random models of every supported architecture, random caches, and the two real bundled models."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvtalk.cache import KVCache, LayerCache
from kvtalk.models import LM
from kvtalk.prompts import BARE
from kvtalk.rope import Rope
from kvtalk.spec import Fingerprint, LayerSpec, ModelSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.utils.logging.set_verbosity_error()

WINDOW = 16
_SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "llama3-rope": lambda: transformers.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE),
    "mistral-window": lambda: transformers.MistralConfig(**_SIZES, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen2-half-window": lambda: transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=32),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "phi3-partial-rotary": lambda: transformers.Phi3Config(**_SIZES, partial_rotary_factor=0.5),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES, head_dim=32, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "smollm3-nope": lambda: transformers.SmolLM3Config(**_SIZES),
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models gain nothing from a second thread, and wait for it where cores are shared; real ones gain."""
    threads = 2 if item.get_closest_marker("models") else 1
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that a test starts


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, **{letter: index for index, letter in enumerate(alphabet, 2)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")


def tiny_config(name: str) -> transformers.PretrainedConfig:
    return ARCHITECTURES[name]()


@cache
def tiny_lm(name: str = "llama", seed: int = 0) -> LM:
    """A random model with weights large enough that attention is far from uniform, float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return LM(model, byte_tokenizer(), name, BARE)


def bare_spec(layers: int = 2, kv_heads: int = 2, head_dim: int = 16, window: int | None = None) -> ModelSpec:
    """A geometry without a model, for tests of formats."""
    rope = Rope(tuple(10000.0 ** (-index / (head_dim // 2)) for index in range(head_dim // 2)))
    shapes = tuple(LayerSpec(kv_heads, head_dim, window if index % 2 == 0 else None, rope) for index in range(layers))
    digests = (f"{value:016x}" for value in (layers, kv_heads, head_dim, 7))
    return ModelSpec(shapes, torch.float32, 1 << 20, Fingerprint("bare", *digests), None)


def random_cache(spec: ModelSpec, tokens: int, start: int = 0, seed: int = 0) -> KVCache:
    """One sequence of random keys and values from position ``start`` on."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for shape in spec.layers:
        size = (1, shape.kv_heads, tokens, shape.head_dim)
        keys, values = (torch.randn(size, generator=generator) for _ in range(2))
        layers.append(LayerCache(keys, values, torch.arange(start, start + tokens)[None]))
    return KVCache(tuple(layers), (start + tokens,)).attendable(spec)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data beside the checkout; a user does not have it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data folder ../shared/data")
    return folder


@cache
def bundled_lm(name: str) -> LM:
    """A real model in float32."""
    return LM.load(name, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer saved as users save theirs."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = tiny_lm("gemma3")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder
