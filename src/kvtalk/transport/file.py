"""Packets as files: written whole or not at all, read with a bound on their size."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvtalk.errors import InputError

MAX_BYTES = 64 << 30


@contextmanager
def saving(path: Path | str) -> Iterator[BinaryIO]:
    """An open file that takes its name only when the block ends well; otherwise nothing is left behind.

    Args:
        path: of the file; an existing one is replaced at the end.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; nothing was left behind") from error
    finally:
        Path(name).unlink(missing_ok=True)


def load(path: Path | str, max_bytes: int = MAX_BYTES) -> memoryview:
    """A file's bytes, memory-mapped: a packet is decoded without ever lying in memory as a whole.

    Raises:
        InputError: no such file, or larger than ``max_bytes``.
    """
    try:
        with open(path, "rb") as file:
            return mapped(file, str(path), max_bytes)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def mapped(file: BinaryIO, name: str, max_bytes: int = MAX_BYTES) -> memoryview:
    """An open file's bytes, memory-mapped; the mapping outlives the file object.

    Raises:
        InputError: larger than ``max_bytes``.
    """
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise InputError(f"{name} has {size:,} bytes, at most {max_bytes:,} are read")
    if size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
