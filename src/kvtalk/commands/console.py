"""Where commands print, and what is seen while they load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

out = Console()
err = Console(stderr=True)


@contextmanager
def loading() -> Iterator[None]:
    """Loading takes a moment: a spinner shows that it goes on."""
    quiet_transformers()
    with err.status("loading ..."):
        yield


def quiet_transformers() -> None:
    """Its bars and warnings would stand between a question and its answer."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
