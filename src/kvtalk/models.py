"""Load a language model by hub id, folder, GGUF file or bundled name; prefill, and generate from a cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from kvtalk import bundled
from kvtalk.cache import PADDING, KVCache, Prefix
from kvtalk.device import sent
from kvtalk.errors import InputError, ModelError
from kvtalk.loading import bos, default_dtype, from_folder, from_gguf, with_lora
from kvtalk.placed import PlacedCache, attending
from kvtalk.placement import place
from kvtalk.prompts import PromptFormat, default_format
from kvtalk.spec import ModelSpec, read_spec

TESTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")


@dataclass(frozen=True)
class Generation:
    """What a model wrote for one prompt.

    Attributes:
        text: without special tokens and without the stop string.
        ids: the new tokens, the one that ended it included.
        first_token_seconds: from the start of the forward pass over the prompt to the first new token.
        rest_seconds: from there to the end of the batch.
        logprob: mean log-probability (nats) of the new tokens, where it was asked for.
    """

    text: str
    ids: tuple[int, ...]
    first_token_seconds: float
    rest_seconds: float
    logprob: float | None = None


class LM:
    """A causal language model with its tokenizer and the description of its cache.

    Making one turns cuDNN's attention off for the whole process.

    Attributes:
        name: as it was asked for.
        model: the `transformers` model, in evaluation mode.
        tokenizer: its tokenizer.
        spec: geometry and fingerprint of its cache.
        prompt: how it is asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        prompt: PromptFormat | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.spec: ModelSpec = read_spec(model, tokenizer)
        self.prompt = prompt or default_format(tokenizer)
        self._heads: dict[tuple[int, ...], KVCache] = {}
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention prepares itself anew for every length
        self._check_placement()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        revision: str | None = None,
        prompt: PromptFormat | None = None,
    ) -> LM:
        """Load a model.

        Args:
            name: a bundled name (``kvtalk models list``), a folder, a ``.gguf`` file, or a hub id; with ``+FOLDER``
                after it, a LoRA in that folder is merged into the model.
            dtype: by default bf16 on a GPU and on CPUs that multiply bf16 natively, float32 elsewhere.
            device: by default the first GPU if there is one.
            revision: of a hub id.
            prompt: how to ask it; by default the bundled model's own, else its chat template, else plain text.

        Raises:
            ModelError: not found, incomplete, loaded wrong, or an unsupported kind of cache.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or default_dtype(device)
        base, _, lora = name.partition("+")
        if base in bundled.MODELS:
            model, tokenizer = bundled.load(base, dtype)
            prompt = prompt or bundled.MODELS[base].prompt
        elif base.endswith(".gguf"):
            model, tokenizer = from_gguf(Path(base), dtype)
        else:
            model, tokenizer = from_folder(base, dtype, revision)
        if lora:
            model = with_lora(model, lora)
        return cls(model.to(device), tokenizer, name, prompt)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, no special ones added."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def head_ids(self) -> list[int]:
        """What this model reads before any context: its BOS where its tokenizer adds one, and its prompt's head."""
        return bos(self.tokenizer) + self.encode(self.prompt.head)

    def head(self) -> KVCache | None:
        """This model's own cache of its head (computed once), or None if the head is empty."""
        key = tuple(self.head_ids())
        if not key:
            return None
        if key not in self._heads:
            self._heads[key] = self.prefill([key])
        return self._heads[key]

    @torch.no_grad()
    def prefill(self, batch: Sequence[Sequence[int]]) -> KVCache:
        """Read sequences of tokens from position 0.

        Returns:
            their cache, left-padded; sliding layers hold what a next token can still attend.

        Raises:
            InputError: an empty sequence, or one longer than the model reads.
        """
        ids, positions = self._padded(batch)
        cache = DynamicCache(config=self.spec.config)
        self.model(
            input_ids=ids.to(self.device),
            attention_mask=(positions != PADDING).long().to(self.device),
            position_ids=positions.clamp(min=0).to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return KVCache.from_transformers(cache, positions)

    @torch.no_grad()
    def read_whole(self, batch: Sequence[Sequence[int]]) -> tuple[KVCache, Tensor]:
        """Read sequences of tokens from position 0 and keep every token in every layer, sliding ones too.

        Rows are padded on the right, where causal attention needs no mask, so this is the fast way to read many.

        Returns:
            their cache, and the hidden states after the last layer, ``[batch, tokens, hidden]``, for
            :attr:`unembedding`.

        Raises:
            InputError: an empty sequence, or one longer than the model reads.
        """
        ids, positions = self._padded(batch)
        counts = (positions != PADDING).sum(dim=1, keepdim=True)
        steps = torch.arange(positions.shape[1])
        ids = ids.gather(1, (steps - counts) % len(steps))
        cache = Cache(layer_class_to_replicate=_Read)
        output = self.model.get_decoder()(input_ids=sent(ids, self.device), past_key_values=cache, use_cache=True)
        positions = torch.where(steps < counts, steps, PADDING)
        return KVCache.from_transformers(cache, positions), torch.as_tensor(output.last_hidden_state)

    @cached_property
    def unembedding(self) -> nn.Linear:
        """Makes logits of hidden states as :meth:`read_whole` and :meth:`states` give them.

        Raises:
            ModelError: a model that does more to its hidden states than to multiply them with an output matrix.
        """
        matrix = self.model.get_output_embeddings()
        ids = torch.tensor([[11, 12, 13]], device=self.device)
        with torch.no_grad():
            own = self.model(ids).logits.float()
            plain = matrix(self.model.get_decoder()(ids).last_hidden_state).float()
        if not isinstance(matrix, nn.Linear) or not bool((own - plain).norm() <= 0.02 * own.norm()):
            raise ModelError(
                f"{self.spec.fingerprint.arch}: its logits are scaled or capped; no adapter can be trained"
            )
        return matrix

    def place(
        self, contexts: Sequence[Sequence[Prefix]], *, room: int = 256, gaps: bool = True, head: bool = True
    ) -> PlacedCache:
        """Put received caches before this model's prompt, after its own head; see :func:`kvtalk.placement.place`."""
        own = self.head() if head else None
        return place(self.spec, own, contexts, room=room, gaps=gaps, device=self.device)

    @torch.no_grad()
    def logits(self, prompts: Sequence[Sequence[int]], placed: PlacedCache, keep: int = 0) -> Tensor:
        """Read prompts after a placed cache.

        Args:
            prompts: tokens of each row; appended to ``placed``.
            placed: grows by the longest prompt.
            keep: how many of the last tokens to give logits for; 0 for all.

        Returns:
            logits after each token, ``[batch, tokens, vocabulary]``; shorter rows are padded on the left.
        """
        inputs = self._continuation(prompts, placed)
        with attending(self.model):
            output = self.model(**inputs, past_key_values=placed, use_cache=True, logits_to_keep=keep)
        return torch.as_tensor(output.logits)

    def states(self, prompts: Sequence[Sequence[int]], placed: PlacedCache) -> Tensor:
        """Like :meth:`logits`, but the hidden states after the last layer, ``[batch, tokens, hidden]``; gradients flow
        back into a cache that asks for them."""
        inputs = self._continuation(prompts, placed)
        with attending(self.model), torch.set_grad_enabled(placed.requires_grad and torch.is_grad_enabled()):
            output = self.model.get_decoder()(**inputs, past_key_values=placed, use_cache=True)
        return torch.as_tensor(output.last_hidden_state)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        placed: PlacedCache | None = None,
        *,
        max_new_tokens: int = 64,
        streamer: BaseStreamer | None = None,
        logprobs: bool = False,
        stop: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Continue each prompt after its placed cache, with `transformers`' own ``generate``.

        Args:
            prompts: tokens of each row's prompt; they follow the placed cache.
            placed: the cache of all rows, used up by the call; None to start from nothing.
            max_new_tokens: at most this many per row.
            streamer: receives the tokens of a single row as they come.
            logprobs: also how probable each answer was; not with beams.
            stop: strings that end an answer; by default those of this model's prompt.
            options: for ``generate``: ``do_sample``, ``temperature``, ``num_beams``, ``num_return_sequences`` and so
                on; not those that return something else than tokens or draft with another model.

        Returns:
            one for each prompt, or ``num_return_sequences`` for each.

        Raises:
            InputError: no prompt or an empty one, other rows than were placed, an option that a placed cache cannot
                serve, or no room left in the model's window.
        """
        for option in ("return_dict_in_generate", "assistant_model", "prompt_lookup_num_tokens"):
            if options.get(option):
                raise InputError(f"generate option {option!r} does not work from a placed cache")
        if not prompts:
            raise InputError("no prompt to continue")
        if placed is None:
            placed = self.place([[]] * len(prompts), head=False, room=max_new_tokens)
        if len(placed.next_positions) != len(prompts):
            raise InputError(f"{len(prompts)} prompts for {len(placed.next_positions)} placed rows")
        longest = max(len(prompt) for prompt in prompts) + int(placed.next_positions.max())
        self._check_length(longest + 1, "context and question together have")
        max_new_tokens = min(max_new_tokens, self.spec.max_positions - longest)
        inputs = self._continuation(prompts, placed)
        watch = _Watch(self.tokenizer, inputs["input_ids"].shape[1], self.prompt.stop if stop is None else stop)
        options.setdefault("do_sample", False)
        pad = self.tokenizer.pad_token_id
        times = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        if times > 1:
            placed = placed.rows([row for row in range(len(prompts)) for _ in range(times)])
        with attending(self.model):
            watch.start()
            sequences = self.model.generate(
                **inputs,
                past_key_values=placed,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([watch]),
                logits_processor=LogitsProcessorList([watch.note] if logprobs else []),
                streamer=streamer,
                pad_token_id=self._end_ids()[0] if pad is None else pad,
                **options,
            )
        end = time.perf_counter()
        made = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._generation(row, ids, watch, end) for row, ids in enumerate(made)]

    def _check_placement(self) -> None:
        """Refuse an architecture whose attention does not read a placed cache as it reads its own."""
        ids = [min(token, self.spec.config.vocab_size - 1) for token in (11, 12, 13, 14)]
        with torch.no_grad():
            native = self.model(torch.tensor([ids], device=self.device)).logits[0, -1].float()
        placed = self.place([[Prefix.of(self.prefill([ids[:2]]))]], head=False)
        difference = (self.logits([ids[2:]], placed)[0, -1].float() - native).norm()
        if not difference <= 0.02 * native.norm():
            raise ModelError(
                f"{self.spec.fingerprint.arch}: its attention does not accept a placed cache; "
                f"tested architectures: {', '.join(TESTED_ARCHITECTURES)}"
            )

    def _generation(self, row: int, ids: list[int], watch: _Watch, end: float) -> Generation:
        stops = set(self._end_ids())
        kept = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
        kept = min(kept, watch.stopped.get(row, kept))  # what follows a stop string is padding
        text = self.tokenizer.decode(ids[:kept], skip_special_tokens=True)
        for stop in watch.stop:
            text = text.split(stop)[0]
        first = watch.first_token or end
        logprobs = [float(column[row]) for column in watch.logprobs[:kept]]
        mean = sum(logprobs) / len(logprobs) if logprobs else None
        return Generation(text.strip(), tuple(ids[:kept]), first - watch.started, end - first, mean)

    def _continuation(self, prompts: Sequence[Sequence[int]], placed: PlacedCache) -> dict[str, Tensor]:
        ids, offsets = (sent(x, self.device) for x in self._padded(prompts))
        real = offsets != PADDING
        positions = torch.where(real, offsets + placed.next_positions[:, None], 0)
        before = real.new_ones((len(prompts), placed.columns))
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": torch.cat([before, real], dim=1).long(),
        }

    def _padded(self, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and positions (−1 for padding), both ``[batch, tokens]``."""
        counts = torch.tensor([len(ids) for ids in batch])
        longest = int(counts.max()) if batch else 0
        if not batch or int(counts.min()) == 0:
            raise InputError("nothing to read: the text is empty")
        self._check_length(longest, "the text has")
        positions = torch.arange(longest) - (longest - counts)[:, None]
        ids = torch.full_like(positions, self.tokenizer.pad_token_id or 0)
        ids[positions >= 0] = torch.tensor(list(chain.from_iterable(batch)))
        return ids, positions.clamp_(min=PADDING)

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.spec.max_positions:
            raise InputError(
                f"{what} {tokens} tokens, {self.name} reads at most {self.spec.max_positions}: shorten the context"
            )

    def _end_ids(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.tokenizer.eos_token_id
        if end is None:
            return [0]
        return list(end) if isinstance(end, (list, tuple)) else [int(end)]


class _Read(DynamicLayer):  # type: ignore[misc]
    """A layer that is read into once, which need not join what comes with what was there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep it, in memory of its own."""
        self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first token is there, how probable each one was, and where a row reached a stop string.

    `transformers`' own stop strings prepare a table over the whole vocabulary first, seconds for 262k tokens. Here
    only the last tokens are looked at, as many as a stop string has bytes: it cannot end later without being seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.prompt_tokens, self.stop = tokenizer, prompt_tokens, tuple(stop)
        self.window = max((len(text.encode()) for text in stop), default=0)
        self.stops: dict[tuple[int, ...], bool] = {}
        self.started = 0.0
        self.first_token: float | None = None
        self.stopped: dict[int, int] = {}
        self.logprobs: list[list[float]] = []
        self._logits: Tensor | None = None

    def start(self) -> None:
        self.started = time.perf_counter()

    def note(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that only looks."""
        self._logits = scores
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        begin = max(self.prompt_tokens, input_ids.shape[1] - self.window)
        last = input_ids[:, begin:].tolist()
        if self.first_token is None:
            self.first_token = time.perf_counter()
        if self._logits is not None:
            chosen = self._logits.gather(1, input_ids[:, -1:])[:, 0].float()
            self.logprobs.append((chosen - self._logits.float().logsumexp(dim=1)).tolist())
        done = [bool(self.stop) and (row in self.stopped or self._stops(tuple(ids))) for row, ids in enumerate(last)]
        for row, ended in enumerate(done):
            if ended:
                self.stopped.setdefault(row, input_ids.shape[1] - self.prompt_tokens)
        return torch.tensor(done, device=input_ids.device)

    def _stops(self, tokens: tuple[int, ...]) -> bool:
        if tokens not in self.stops:
            text = self.tokenizer.decode(tokens)
            self.stops[tokens] = any(stop in text for stop in self.stop)
        return self.stops[tokens]
