"""Intervals and paired tests over items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtalk.errors import InputError

DRAWS = 4000
_BLOCK = 250


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def rounded(self) -> list[float]:
        """Mean, low, high to two places."""
        return [round(self.mean, 2), round(self.low, 2), round(self.high, 2)]


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """95% percentile bootstrap of a mean over items; for paired differences give the differences."""
    array = np.asarray(values, dtype=np.float32)
    counts = _counts(len(array), seed)
    blocks = [counts[start : start + _BLOCK].astype(np.float32) @ array for start in range(0, DRAWS, _BLOCK)]
    means = np.concatenate(blocks) / len(array)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.asarray(values, dtype=float).mean()), float(low), float(high))


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The exact two-sided McNemar test: how likely so uneven a split of the items that only one of two gets right.

    Args:
        ours: 1 for each item that is right, else 0.
        theirs: likewise, the same items.

    Raises:
        InputError: scipy is not installed.
    """
    test = binomial_test()
    only_ours = sum(a > b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return float(test(only_ours, only_ours + only_theirs).pvalue) if only_ours + only_theirs else 1.0


def binomial_test() -> Any:
    """scipy's exact test, asked for before a run that will need it.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise InputError("McNemar's test needs scipy: pip install 'kvtalk[eval]'") from error
    return binomtest


@lru_cache(maxsize=2)
def _counts(items: int, seed: int) -> NDArray[np.uint8]:
    """How often each draw takes each item, ``[DRAWS, items]``; the same draws for every arm."""
    rng = np.random.default_rng(seed)
    counts = np.empty((DRAWS, items), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(rng.integers(0, items, items), minlength=items)
    return counts
