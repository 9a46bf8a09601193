"""Score against bytes: which plans to try, and which of them nobody beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from kvtalk.adapters.cards import Card
from kvtalk.adapters.translator import Geometry
from kvtalk.codecs import codec
from kvtalk.errors import InputError
from kvtalk.evaluation.arms import PLACED
from kvtalk.planning import Plan

CODECS = (
    "bf16",
    "int8:channel/int8:token before",
    "int4:channel/int4:token before",
    "int4:channel/int2:token before",
    "int2:32x1/int2:token before",
)
KEEPS = ("100%", "50%", "25%", "10%")
POLICY = "value_norm"
NARROWEST = 16
"""Numbers of a latent, in a curve of many widths."""

DEFAULT_PLANS = (
    *(f"{codecs} {POLICY}@{keep}" for codecs, keep in product(CODECS, KEEPS)),
    "int4:token/int4:token",
    "nf4:channel/nf4:token before",
    *(f"int8:channel/int8:token before {policy}@50%" for policy in ("front", "back", "random", "key_norm")),
    "int4:channel/int4:token before layers=last:50%",
    "int4:channel/int4:token before layers=every:2",
)
"""What a curve tries of a model's cache: five pairs of codecs by four shares of tokens, and then per-token scales, NF4,
other token policies at half of the tokens, and half of the layers."""
FUSED_PLANS = (
    *(f"{codecs} {POLICY}@{keep}" for codecs, keep in product(("bf16", "int8:channel/int8:token"), KEEPS)),
    *(f"int4:channel/int4:token {POLICY}@{keep}" for keep in KEEPS),
    "int4:token/int4:token",
    "nf4:token/nf4:token",
    *(f"bf16 {policy}@50%" for policy in ("front", "back", "random")),
)
"""And of a cache that is fused: layers and the place of the keys are the fuser's own."""


def default_plans(card: Card | None) -> tuple[str, ...]:
    """What a curve tries unless it is told otherwise: of a cache, of a fused one, or of latents, whole and cut.

    Args:
        card: of the adapter between the models; None where there is none.
    """
    if card is None:
        return DEFAULT_PLANS
    if not isinstance(card.geometry, Geometry):
        return FUSED_PLANS
    widths = [card.geometry.latent >> halvings for halvings in range(6)]
    widths = [width for width in widths if width >= NARROWEST and width % 4 == 0]  # whole bytes in 2 bits
    cut = [f"{name} width={width}" for width in widths for name in ("int8", "int4")]
    return ("bf16", *cut, *(f"int2 width={width}" for width in widths[2::2]))


def grid(codecs: Sequence[str], policies: Sequence[str], keeps: Sequence[str], layers: Sequence[str]) -> list[str]:
    """Every combination as a plan, each once; what is not given stays as in a plan by default.

    Raises:
        KVTalkError: a part that is not one.
    """
    parts = product(codecs or CODECS, policies or (POLICY,), keeps or ("100%",), layers or ("all",))
    plans = (Plan.parse(f"{names} {policy}@{keep} layers={which}") for names, policy, keep, which in parts)
    return list(dict.fromkeys(map(str, plans)))


def normalized(plans: Sequence[str]) -> list[str]:
    """Plans as they are named in results, each once; ``budget=SIZE`` and what ends in ``contiguous`` stay."""
    return list(
        dict.fromkeys(
            plan if plan.startswith("budget=") or plan.endswith(" contiguous") else str(Plan.parse(plan))
            for plan in plans
        )
    )


def controlled(ways: Sequence[str], asked: Sequence[str] | None = None) -> list[str]:
    """The ways whose controls are run too: those asked for, else the largest plan, the middle one and the smallest.

    Of budgets alone, whose plans are not known beforehand: all.

    Raises:
        InputError: asked for one that is not among the ways.
    """
    if asked:
        wanted = normalized(asked)
        for way in wanted:
            if way not in ways:
                raise InputError(f"no plan {way!r} in this curve; there are {', '.join(ways)}")
        return wanted
    plans = [way for way in ways if not way.startswith("budget=")]
    whole = max((Plan.parse(way.removesuffix(" contiguous")).width or 1 for way in plans), default=1)
    plans.sort(key=lambda way: _nominal_bits(way, whole))
    if not plans:
        return list(ways)
    return list(dict.fromkeys((plans[-1], plans[len(plans) // 2], plans[0])))


def pareto(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The arms with a sharer's cache that no other arm of as few bytes matches, by ascending bytes."""
    front: list[Mapping[str, Any]] = []
    for row in sorted((row for row in rows if row["kind"] in PLACED), key=lambda row: (row["bytes"], -row[metric][0])):
        if not front or row[metric][0] > front[-1][metric][0]:
            front.append(row)
    return front


def _nominal_bits(way: str, whole: int) -> tuple[float, bool]:
    """Bits per value, or of a latent of so many numbers; scales and header left out. Of two alike the uncut is more."""
    plan = Plan.parse(way.removesuffix(" contiguous"))
    share = plan.keep if isinstance(plan.keep, float) else 0.5
    bits = share * (codec(plan.keys).bits + codec(plan.values).bits) / 2
    return bits * (plan.width or whole), plan.width is None
