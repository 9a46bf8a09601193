"""Scores of free answers, one entry each in :data:`METRICS`."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvtalk.errors import InputError
from kvtalk.evaluation.data import Passage

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Metric:
    """A score of an answer in words.

    Attributes:
        label: in tables.
        about: what it is and where it comes from.
        score: of many answers to their items, each 0 to 1.
    """

    label: str
    about: str
    score: Callable[[Sequence[str], Sequence[Passage], str], list[float]]


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


def kvcomm(prediction: str, answers: Sequence[str]) -> float:
    """KVComm's score (arXiv 2510.03346): 1 if the F1 of the *sets* of words is above 0.5 for any accepted answer.

    Their code also lemmatises with WordNet, whose data does not come with any package; this does not.
    """
    words = set(_without_punctuation(prediction).split())
    return float(any(_set_f1(words, set(_without_punctuation(answer).split())) > 0.5 for answer in answers))


def coherence(prediction: str) -> float:
    """Q-KVComm's "coherence" as published (arXiv 2512.17914): length, a capital, a full stop, few repeated words.

    It looks at nothing but the answer's form; a fluent wrong answer scores 1.
    """
    text = prediction.strip()
    if len(text) < 3:
        return 0.0
    words = text.lower().split()
    length = next((score for most, score in ((2, 0.0), (100, 0.3), (150, 0.2)) if len(words) <= most), 0.1)
    capital = 0.2 if prediction[0].isupper() else 0.0
    stop = 0.2 if any(mark in text for mark in ".!?") else 0.0
    return min(1.0, length + capital + stop + 0.3 * len(set(words)) / len(words))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L F-measure, the best over accepted answers (Google's `rouge_score`, no stemming; words of a-z and 0-9).

    Raises:
        InputError: the package is not installed.
    """
    return float(_rouge().score_multi(list(answers), prediction)["rougeL"].fmeasure)


def _per_answer(score: Callable[[str, Sequence[str]], float]) -> Callable[..., list[float]]:
    def scores(predictions: Sequence[str], items: Sequence[Passage], embedder: str) -> list[float]:
        return [score(text, item.answers) for text, item in zip(predictions, items, strict=True)]

    return scores


def _relevance_to_question(predictions: Sequence[str], items: Sequence[Passage], embedder: str) -> list[float]:
    return _cosines(predictions, [[item.question] for item in items], embedder)


def _relevance_to_answer(predictions: Sequence[str], items: Sequence[Passage], embedder: str) -> list[float]:
    return _cosines(predictions, [item.answers for item in items], embedder)


def _coherences(predictions: Sequence[str], items: Sequence[Passage], embedder: str) -> list[float]:
    return [coherence(text) for text in predictions]


METRICS: dict[str, Metric] = {
    "f1": Metric("F1", "word overlap with the best accepted answer, official SQuAD v1.1", _per_answer(f1)),
    "em": Metric("EM", "equals an accepted answer, official SQuAD v1.1", _per_answer(exact_match)),
    "contains": Metric("contains", "an accepted answer stands in it as whole words", _per_answer(contains_answer)),
    "rouge_l": Metric("ROUGE-L", "longest common subsequence, best over accepted answers", _per_answer(rouge_l)),
    "kvcomm": Metric("KVComm", "F1 of word sets above 0.5, as KVComm counts, without lemmas", _per_answer(kvcomm)),
    "relevance": Metric(
        "relevance", "embedding cosine of answer and reference answer (the sound form)", _relevance_to_answer
    ),
    "relevance_published": Metric(
        "relevance (published)",
        "embedding cosine of answer and question, as Q-KVComm publishes",
        _relevance_to_question,
    ),
    "coherence_published": Metric("coherence (published)", "Q-KVComm's heuristic on the answer's form", _coherences),
}


def check_metrics(names: Sequence[str]) -> None:
    """Make sure that every metric is known and can be computed.

    Raises:
        InputError: unknown, or its packages are not installed.
    """
    for name in names:
        if name not in METRICS and name != "nll":
            raise InputError(f"no metric {name!r}; there are {', '.join([*METRICS, 'nll'])}")
    if names and names[0] == "nll":
        raise InputError("nll cannot lead, it is better when lower: put another metric first, such as f1,nll")
    if "rouge_l" in names:
        _rouge()
    if "relevance" in names or "relevance_published" in names:
        _sentence_transformers()


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not prediction or not answer or common == 0:
        return float(prediction == answer)
    return 2 * common / (len(prediction) + len(answer))


def _set_f1(prediction: set[str], answer: set[str]) -> float:
    common = len(prediction & answer)
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def _without_punctuation(text: str) -> str:
    kept = "".join(" " if unicodedata.category(mark).startswith("P") else mark for mark in text.lower())
    return normalize(kept)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError("the metric rouge_l needs rouge_score: pip install 'kvtalk[eval]'") from error
    return RougeScorer(["rougeL"])


def _sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise InputError("the metric relevance needs sentence-transformers: pip install 'kvtalk[eval]'") from error
    return sentence_transformers


@cache
def _embedder(name: str) -> Any:
    try:
        return _sentence_transformers().SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"embedding model {name!r} could not be loaded: give a sentence-transformers id or folder by --embedder"
        ) from error


def _cosines(predictions: Sequence[str], references: Sequence[Sequence[str]], embedder: str) -> list[float]:
    """The best cosine with any reference, clipped to 0 to 1."""
    unique = list(dict.fromkeys([*predictions, *(text for group in references for text in group)]))
    vectors = _embedder(embedder).encode(unique, normalize_embeddings=True, show_progress_bar=False)
    place = {text: row for row, text in enumerate(unique)}
    scores = []
    for prediction, group in zip(predictions, references, strict=True):
        best = float((vectors[[place[text] for text in group]] @ vectors[place[prediction]]).max())
        scores.append(max(0.0, min(1.0, best)))
    return scores
