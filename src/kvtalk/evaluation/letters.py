"""Which option did the model name? A strict reading, and C2C's lenient one under its own name."""

from __future__ import annotations

import re

_STRICT = re.compile(
    r"\W*(?:(?:the )?(?:correct )?answer(?: is)?\W*)*([A-Z])(?=\**(?:[.):]+\**(?:\s|$)|\s*(?:\n|$)))", re.IGNORECASE
)
_ANNOUNCED = tuple(
    re.compile(rf"{words}\s*(.*)", re.IGNORECASE)
    for words in (
        "Answer:",
        "Your answer:",
        "The answer is",
        "Correct answer is",
        "Correct answer is:",
        "Correct answer:",
        "Response:",
        "Choice:",
        "Option:",
    )
)
_STANDALONE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b([A-D])(?:\s*[.,!?:)]?\s*$)",
        r"\b([A-D])(?:\s*[.,!?:)]\s)",
        r"(?:^|\s)([A-D])(?:\s*$)",
        r"\b([A-D])\b",
    )
)
_MATHS = ("+", "-", "*", "/", "=", "^", "mod", "sqrt", "sin", "cos", "tan")
_ANSWER_WORDS = ("answer", "choice", "option", "response", "correct")


def read_strictly(text: str, choices: int) -> str:
    """The letter that an answer begins with, maybe after "the correct answer is"; empty if it is no option's.

    After it must come the end, a new line, or a full stop, colon or bracket and a space.
    """
    match = _STRICT.match(text)
    letter = match[1] if match else ""
    return letter if letter.isupper() and ord(letter) - 65 < choices else ""


def read_as_published(text: str) -> str:
    """The letter that C2C's evaluation reads (thu-nics/C2C, `extract_answer_from_content`, less its Swahili words).

    A model that only repeats the format, "The correct answer is A/B/C/D", is taken to have answered A.
    """
    text = text.strip()
    for pattern in _ANNOUNCED:
        match = pattern.search(text)
        letter = next((mark for mark in match[1] if mark in "ABCD"), "") if match else ""
        if letter:
            return letter
    sum_or_formula = any(sign in text for sign in _MATHS) and not any(word in text.lower() for word in _ANSWER_WORDS)
    for pattern in _STANDALONE:
        found = pattern.findall(text)
        if found and not sum_or_formula:
            return str(found[-1]).upper()
        if found and pattern is _STANDALONE[-1]:
            return ""
    return next((mark for mark in reversed(text) if mark in "ABCD"), "")
