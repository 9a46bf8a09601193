"""A byte budget becomes a plan: what is kept, in which codec, at how many bytes.

The size of a packet is a sum over shapes, so it is predicted to the byte before anything is encoded. What a plan
costs in quality cannot be known so cheaply; its ``distortion`` is an estimate on the cache at hand, used only to
choose between plans that fit, and never reported as quality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch

from kvtalk.cache import PADDING, Extent, KVCache, LayerCache
from kvtalk.codecs import NOTHING, codec, short_name
from kvtalk.errors import BudgetError, CacheError, CodecError
from kvtalk.layout import LayerLayout, Layout
from kvtalk.selection.layers import select_layers
from kvtalk.selection.tokens import kept_columns, kept_count, token_policy
from kvtalk.spec import ModelSpec

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BUDGET_USAGE = "give bytes (200KB, 1MiB), bits per value (4bits) or a share of the bf16 cache (25%)"
_SAMPLE_TOKENS = 256

Rope = Literal["before", "after"]


@dataclass(frozen=True)
class Rung:
    """Codecs of keys and values, and whether keys are packed before or after RoPE."""

    keys: str
    values: str
    rope: Rope


LADDER = (
    Rung("bf16", "bf16", "after"),
    Rung("int8:channel", "int8:token", "before"),
    Rung("int8:channel", "int4:token", "before"),
    Rung("int4:channel", "int4:token", "before"),
    Rung("int4:channel", "int2:token", "before"),
    Rung("int2:32x1", "int2:token", "before"),
)
"""What a budget chooses from, best first."""

LAST_RESORT = (Rung("int4:token", "int4:token", "before"), Rung("int2:token", "int2:token", "before"))
"""Scales that do not span tokens are smallest when hardly any are kept, but they ruin keys with outlier channels, and
the estimate of distortion does not see it (Gemma: F1 14.9 at int4, the floor). So only when nothing else fits."""


@dataclass(frozen=True)
class Budget:
    """How many bytes a transfer may take.

    Attributes:
        amount: bytes, bits per value, or a share of the bf16 cache.
        unit: which of them.
    """

    amount: float
    unit: Literal["bytes", "bits", "share"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``200KB``, ``1MiB``, ``4096``, ``4bits``, ``25%`` or ``0.25x``.

        Raises:
            BudgetError: not a size, or not above zero.
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z%]*)\s*", text.lower())
        if not match:
            raise BudgetError(f"budget {text!r} is not a size: {_BUDGET_USAGE}")
        amount, unit = float(match[1]), match[2]
        if amount == 0 or amount > 1e15:
            raise BudgetError(f"budget {text!r} is out of range: {_BUDGET_USAGE}")
        if unit in ("bits", "bit", "bpv"):
            return cls(amount, "bits")
        if unit in ("%", "x"):
            return cls(amount / 100 if unit == "%" else amount, "share")
        if unit and unit not in _UNITS:
            raise BudgetError(f"budget {text!r} has an unknown unit: {_BUDGET_USAGE}")
        return cls(amount * _UNITS[unit or "b"], "bytes")

    def bytes_for(self, tokens: int, spec: ModelSpec) -> int:
        """Bytes allowed for a context of that many tokens."""
        if self.unit == "bytes":
            return int(self.amount)
        if self.unit == "bits":
            return int(self.amount * tokens * spec.values_per_token / 8)
        return int(self.amount * tokens * spec.bytes_per_token)


@dataclass(frozen=True)
class Plan:
    """What to send of a cache and how to pack it.

    Attributes:
        keys: codec of the keys, see :func:`kvtalk.codecs.codec`.
        values: codec of the values.
        rope: pack keys ``before`` their rotary embedding (un-rotated) or ``after`` it (as the model holds them).
        tokens: token policy.
        keep: tokens to keep in each layer: a share (float) or a number (int).
        layers: layer policy.
        seed: of the token policy.
        width: of a latent, how many of its numbers; None for all of them, and for a cache.
    """

    keys: str = "bf16"
    values: str = "bf16"
    rope: Rope = "after"
    tokens: str = "value_norm"
    keep: float | int = 1.0
    layers: str = "all"
    seed: int = 0
    width: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether no token is dropped; ``keep=1`` is one token, ``keep=1.0`` all of them."""
        return isinstance(self.keep, float) and self.keep == 1.0

    @property
    def rung(self) -> Rung:
        """Its codecs."""
        return Rung(self.keys, self.values, self.rope)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Plan:
        """Read what ``str(plan)`` writes: ``KEYS[/VALUES] [before] [POLICY@KEEP] [layers=LAYERS] [width=WIDTH]``.

        Examples: ``bf16``; ``int4:channel/int4:token before``; ``fp16 value_norm@50% layers=first:15``.

        Raises:
            BudgetError: not a plan.
            CodecError, SelectionError: an unknown codec or policy.
        """
        codecs, *rest = text.split() or [""]
        keys, _, values = codecs.partition("/")
        if NOTHING in (keys, values):
            raise CodecError(f"plan {text!r}: keys and values must both be sent")
        plan = cls(keys=str(codec(keys)), values=str(codec(values or keys)), seed=seed)
        for word in rest:
            if word in ("before", "after"):
                plan = replace(plan, rope="before" if word == "before" else "after")
            elif word.startswith("layers="):
                plan = replace(plan, layers=word.removeprefix("layers="))
            elif word.startswith("width=") and word.removeprefix("width=").isdecimal():
                plan = replace(plan, width=int(word.removeprefix("width=")))
            elif "@" in word:
                name, _, keep = word.partition("@")
                plan = replace(plan, tokens=token_policy(name, seed).name, keep=_parse_keep(keep))
            else:
                raise BudgetError(
                    f"plan {text!r}: {word!r} is not understood; "
                    "use KEYS/VALUES, before, POLICY@KEEP, layers=LAYERS, width=NUMBERS"
                )
        return plan

    def __str__(self) -> str:
        keys, values = short_name(self.keys), short_name(self.values)
        parts = [keys if values in (keys, NOTHING) else f"{keys}/{values}"]
        if self.rope == "before":
            parts.append("before")
        if not self.keeps_all:
            keep = f"{100 * self.keep:g}%" if isinstance(self.keep, float) else str(self.keep)
            parts.append(f"{self.tokens}@{keep}")
        if self.layers != "all":
            parts.append(f"layers={self.layers}")
        if self.width is not None:
            parts.append(f"width={self.width}")
        return " ".join(parts)

    def layout(self, extents: Sequence[Extent], spec: ModelSpec) -> Layout:
        """Where each byte goes if one sequence with these extents is sent.

        Raises:
            SelectionError, CodecError: the plan names something unknown.
        """
        policy = token_policy(self.tokens, self.seed)
        chosen = set(select_layers(self.layers, len(spec.layers)))
        layers = []
        for index, (extent, shape) in enumerate(zip(extents, spec.layers, strict=True)):
            sent = extent if index in chosen else Extent(0, 0, 0)
            kept = kept_count(self.keep, sent.tokens) if sent.tokens else 0
            size = (shape.kv_heads, shape.head_dim)
            codecs = self.keys if shape.keys else NOTHING, self.values if shape.values else NOTHING
            layer = LayerLayout(*size, sent.first, sent.span, kept, *codecs)
            layer.check_codecs()
            layers.append(layer)
        whole = all(extent.tokens == extent.span for extent in extents)
        return Layout(0, tuple(layers), policy.positional and whole)

    def choose(self, layer: LayerCache, counts: Sequence[int]) -> LayerCache:
        """The tokens of a layer that the token policy keeps, so many in each row.

        Rows begin at column 0; one that keeps fewer than another is filled up with copies of its last kept token,
        which change no block's scale.
        """
        if min(counts) == layer.tokens:
            return layer
        real = layer.positions != PADDING
        if real.sum(dim=1).tolist() == list(counts):
            return layer.take(kept_columns(real, counts))
        return layer.take(token_policy(self.tokens, self.seed).select(layer, counts))


def fit(
    cache: KVCache,
    spec: ModelSpec,
    limit: int,
    size: Callable[[Plan], int],
    base: Plan | None = None,
    ladder: Sequence[Rung] = LADDER,
) -> Plan:
    """The plan of least estimated distortion that takes at most ``limit`` bytes.

    Each rung of the ladder keeps as many tokens as fit; policies, layers and seed are those of ``base``.

    Args:
        cache: one sequence, rotated, cut to what can be attended.
        spec: its model.
        limit: bytes.
        size: the exact bytes of a plan for this cache.
        base: token policy, layer policy and seed to use.
        ladder: codecs to choose from, best first.

    Raises:
        BudgetError: even one token a layer in the smallest codec is too large; says what would fit.
        CacheError: the cache holds NaN or infinity.
    """
    base = base or Plan()
    sample = KVCache(tuple(layer.span(0, _SAMPLE_TOKENS) for layer in cache.layers), cache.length, cache.rotated)
    samples = {"after": sample, "before": sample.unrotated(spec)}
    best: tuple[float, Plan] | None = None
    smallest: int | None = None
    refusal: CodecError | None = None
    for rung in (*ladder, *LAST_RESORT) if ladder is LADDER else ladder:
        if best is not None and rung in LAST_RESORT:
            break
        plan = replace(base, keys=rung.keys, values=rung.values, rope=rung.rope)
        least = size(replace(plan, keep=1))
        smallest = least if smallest is None else min(smallest, least)
        keep = _most_tokens(plan, size, limit, max(layer.tokens for layer in cache.layers))
        if keep is None:
            continue
        plan = replace(plan, keep=keep)
        try:
            distortion = estimate_distortion(cache, samples[rung.rope], spec, plan)
        except CodecError as error:
            refusal = error  # values beyond what this rung can hold
            continue
        if best is None or distortion < best[0]:
            best = distortion, plan
        if plan.keeps_all:
            break  # lower rungs only lose more
    if best is not None:
        return best[1]
    if refusal is not None:
        raise CacheError(f"no codec can pack this cache: {refusal}") from refusal
    codecs = f" with {ladder[0].keys}/{ladder[0].values}" if len(ladder) == 1 else ""
    raise BudgetError(
        f"a budget of {limit:,} bytes is too small: "
        f"the smallest possible packet of this context{codecs} takes {smallest:,} bytes"
    )


LATENT_LADDER: tuple[tuple[str, int | Fraction], ...] = (
    ("bf16", 1),
    ("int8", 1),
    ("int8", 2),
    ("int4", 2),
    ("int4", 4),
    ("int4", 8),
    ("int4", Fraction(64, 7)),
    ("int4", Fraction(32, 3)),
    ("int4", 16),
    ("int2", 16),
)
"""Codecs of latents and by what their width is divided, best first; smaller budgets are met by ever narrower latents
in the last codec. As measured with the translator that ships, SmolLM2 → Gemma, on all of SQuAD's test
(docs/translator.md): at the same bytes eight bits of half the numbers are worth what four bits of all are, but of
narrower latents four bits are worth more, and they are better than two of twice as many; two bits are better only
where 64 numbers in four bits are too much, and between an eighth and a sixteenth of the numbers each one counts."""

_NARROWEST = 16
_MOST_TOKENS = 1 << 24


def fit_latent(plan: Plan, limit: int, size: Callable[[Plan], int], latent: int | None) -> Plan:
    """The plan for latents that takes at most ``limit`` bytes.

    Args:
        plan: token policy, and where nothing is to be chosen codec and width.
        limit: bytes.
        size: the exact bytes of a plan for these latents.
        latent: numbers of a whole latent, to choose codec and width; None to keep those of the plan.

    Raises:
        BudgetError: even one token is too large.
    """
    candidates = [plan]
    if latent is not None:
        last, widest = LATENT_LADDER[-1][0], int(LATENT_LADDER[-1][1])
        while latent // widest < _NARROWEST and widest > 1:
            widest //= 2
        ever = [(last, widest << shift) for shift in range(latent.bit_length())]
        widths = [(name, int(latent / part)) for name, part in dict.fromkeys((*LATENT_LADDER, *ever))]
        rungs = [(name, width) for name, width in widths if width >= _NARROWEST]
        candidates = [replace(plan, keys=str(codec(name)), width=width) for name, width in rungs]
    usable = [candidate for candidate in candidates if _packable(candidate, size)] or [plan]
    for candidate in usable:
        if size(candidate) <= limit:
            return candidate
    smallest = usable[-1]
    keep = _most_tokens(smallest, size, limit, _MOST_TOKENS)
    if keep is None:
        raise BudgetError(
            f"a budget of {limit:,} bytes is too small: "
            f"the smallest possible packet of this context takes {size(replace(smallest, keep=1)):,} bytes"
        )
    return replace(smallest, keep=keep)


def _packable(plan: Plan, size: Callable[[Plan], int]) -> bool:
    try:
        size(plan)
    except CodecError:  # latents of that width do not fill whole bytes
        return False
    return True


def estimate_distortion(cache: KVCache, sample: KVCache, spec: ModelSpec, plan: Plan) -> float:
    """Share of the keys' and values' energy that the plan loses, 0 to 1.

    Args:
        cache: what would be sent if nothing were dropped.
        sample: some of its tokens, keys as the plan packs them; the codecs' noise is measured on them.
        spec: the model.
        plan: the plan.
    """
    lost, all_values = 0.0, 0
    chosen = set(select_layers(plan.layers, len(spec.layers)))
    noise = _noise_of_layers(sample, spec, plan)
    for index, (layer, shape) in enumerate(zip(cache.layers, spec.layers, strict=True)):
        values = layer.tokens * shape.kv_heads * shape.head_dim * (shape.keys + shape.values)
        if values == 0:
            continue
        share = kept_count(plan.keep, layer.tokens) / layer.tokens if index in chosen else 0.0
        lost += (share * noise[index] + 1 - share) * values
        all_values += values
    return lost / max(all_values, 1)


def _parse_keep(text: str) -> float | int:
    share = text.endswith("%")
    try:
        number = float(text.rstrip("%"))
    except ValueError:
        number = 0.0
    if share and 0 < number <= 100:
        return number / 100
    if not share and number >= 1 and number == int(number):
        return int(number)
    raise BudgetError(f"keep {text!r}: give a share like 50% or a number of tokens like 128")


def _noise_of_layers(sample: KVCache, spec: ModelSpec, plan: Plan) -> list[float]:
    """Share of each layer's energy that its codecs lose, keys and values averaged where both cross; layers of one shape
    in one go."""
    found = [0.0] * len(sample.layers)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, layer in enumerate(sample.layers):
        if layer.tokens:
            groups.setdefault(tuple(layer.keys.shape), []).append(index)
    for which in groups.values():
        for side, name in (("keys", plan.keys), ("values", plan.values)):
            crossing = [index for index in which if getattr(spec.layers[index], side)]
            if not crossing:
                continue
            tensors = torch.stack([getattr(sample.layers[index], side)[0] for index in crossing])
            for index, lost in zip(crossing, _noise(tensors, name), strict=True):
                found[index] += lost / (spec.layers[index].keys + spec.layers[index].values)
    return found


def _noise(layers: torch.Tensor, name: str) -> list[float]:
    """For each layer of ``[layers, kv_heads, tokens, head_dim]``."""
    packer = codec(name)
    values = layers.flatten(0, 1)
    restored = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    codes, scales = packer.encode(values)
    packer.decode(codes, scales, restored)
    lost = (restored.view(layers.shape) - layers.float()).square().sum(dim=(1, 2, 3))
    return list((lost / layers.float().square().sum(dim=(1, 2, 3)).clamp(min=1e-12)).tolist())


def _most_tokens(plan: Plan, size: Callable[[Plan], int], limit: int, tokens: int) -> float | int | None:
    """The most tokens a layer that fit: 1.0 for all, a number, or None for none."""
    if size(replace(plan, keep=1.0)) <= limit:
        return 1.0
    low, high = 0, tokens
    while high - low > 1:
        middle = (low + high) // 2
        if size(replace(plan, keep=middle)) <= limit:
            low = middle
        else:
            high = middle
    return low or None
