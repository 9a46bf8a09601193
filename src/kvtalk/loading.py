"""Read model and tokenizer from a folder, a hub id or a GGUF file, and refuse what was loaded wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvtalk.errors import ModelError

CHECK_TEXT = (
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
    "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness."
)
CHECK_NATS = 4.0


def default_dtype(device: str) -> torch.dtype:
    """bf16 where it is computed natively, float32 elsewhere."""
    if device.startswith("cuda"):
        return torch.bfloat16
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public, and not in every torch
    native = any(getattr(torch.cpu, name, bool)() for name in asked)
    return torch.bfloat16 if native else torch.float32


def from_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file with plain weights, and check on a fixed sentence that it was loaded right.

    Some versions of `transformers` load some GGUF architectures without an error but wrong.

    Raises:
        ModelError: no such file, unreadable, or a model that cannot read a well-known sentence.
    """
    if not file.is_file():
        raise ModelError(f"no such file: {file}")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # parsers of broken files raise anything
        raise ModelError(f"{file}: not a GGUF model that transformers can load ({_first_line(error)})") from error
    nats = sentence_nats(model, tokenizer)
    if not nats < CHECK_NATS:
        raise ModelError(
            f"{file}: loaded wrong: {nats:.1f} nats a token on a well-known sentence, expected under "
            f"{CHECK_NATS:g}; try another version of transformers"
        )
    return model, tokenizer


@torch.no_grad()
def sentence_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean negative log-likelihood of :data:`CHECK_TEXT`, in nats a token; infinite if it is NaN."""
    text_ids = list(tokenizer(CHECK_TEXT, add_special_tokens=False).input_ids)
    ids = torch.tensor([bos(tokenizer) + text_ids], device=model.device)
    nats = float(model(input_ids=ids, labels=ids).loss)
    return math.inf if math.isnan(nats) else nats


def from_folder(
    name: str | Path,
    dtype: torch.dtype,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from a folder or, if there is none of that name, by hub id.

    Args:
        name: folder or hub id.
        dtype: of the weights.
        revision: of a hub id.
        tokenizer: to use instead of the one that lies there.

    Raises:
        ModelError: neither exists, or model or tokenizer is missing in it.
    """
    looks_local = Path(name).is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise ModelError(
            f"no model {str(name)!r}: give a folder, a .gguf file, a hub id, or a name from `kvtalk models list`"
        )
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    tokenizer = tokenizer or load_tokenizer(name, options)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", **options)
    except Exception as error:  # as above: what is wrong with a folder decides what is raised
        raise ModelError(f"{name}: the model could not be loaded ({_first_line(error)})") from error
    return model, tokenizer


def with_lora(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A model with a LoRA merged into its weights.

    Raises:
        ModelError: peft is not installed, or there is no LoRA for this model in the folder.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError("a LoRA needs peft: pip install 'kvtalk[train]'") from error
    try:
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # as above
        raise ModelError(f"{folder}: no LoRA for this model ({_first_line(error)})") from error


def load_tokenizer(name: str | Path, options: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **(options or {}))
    except Exception as error:
        raise ModelError(f"{name}: no tokenizer could be loaded ({_first_line(error)})") from error
    # Without its files `transformers` makes an empty tokenizer for some architectures, and says nothing.
    if "kv" not in str(tokenizer.decode(tokenizer("kv", add_special_tokens=False).input_ids)):
        raise ModelError(f"{name}: no tokenizer could be loaded (its files are missing: save it beside the model)")
    return tokenizer


def bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer itself puts before a text, if it does."""
    first = list(tokenizer("a").input_ids)[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
