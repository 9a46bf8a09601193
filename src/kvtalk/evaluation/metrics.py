"""Scores of free answers, and intervals on differences between arms on the same items."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (the official SQuAD v1.1 rule)."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals any accepted answer after :func:`normalize`, else 0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best word-overlap F1 with any accepted answer, 0 to 1 (official SQuAD v1.1)."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """1 if any accepted answer stands in the prediction as whole words, else 0."""
    words = f" {normalize(prediction)} "
    return float(any(f" {normalize(answer)} " in words for answer in answers))


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> Interval:
    """95% percentile bootstrap of a mean over items; for paired differences give the differences."""
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    means = array[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not prediction or not answer or common == 0:
        return float(prediction == answer)
    return 2 * common / (len(prediction) + len(answer))
