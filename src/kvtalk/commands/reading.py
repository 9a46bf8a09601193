"""What commands are given to read: texts and packets."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from kvtalk.errors import InputError


def read_text(path: str) -> str:
    """A text file, or standard input for ``-``.

    Raises:
        InputError: missing, unreadable, or not UTF-8.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from error


def text_or_file(given: str) -> str:
    """The text of a file if there is one of that name, else the argument itself.

    Raises:
        InputError: nothing to read, or one word that looks like the name of a file that is not there.
    """
    if given == "-" or os.path.isfile(given):
        text = read_text(given)
    elif os.path.isdir(given) or re.fullmatch(r"\S*(/\S*|\w\.[a-z][a-z0-9]{1,4})", given):
        raise InputError(f"no file {given}; if that is the text itself, give it on standard input, with - in its place")
    else:
        text = given
    if not text:
        raise InputError("the text is empty: give a file, -, or the text in quotes")
    return text


def fetch(address: str) -> memoryview:
    """A packet from a file or an http(s) address."""
    if address.startswith(("http://", "https://")):
        from kvtalk.transport import http

        return http.fetch(address)
    from kvtalk.transport import file

    return file.load(address)
