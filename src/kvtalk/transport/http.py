"""Packets over HTTP, read with a bound on their size."""

from __future__ import annotations

import http.client
import tempfile
import urllib.request

from kvtalk.errors import InputError
from kvtalk.transport.file import MAX_BYTES, mapped

_CHUNK = 1 << 20


def fetch(url: str, max_bytes: int = MAX_BYTES, timeout: float = 30.0) -> memoryview:
    """GET a packet into a memory-mapped temporary file.

    Args:
        url: ``http://`` or ``https://``.
        max_bytes: more than this is refused, whatever the server declares.
        timeout: seconds without any byte.

    Raises:
        InputError: no answer, an error status, or too many bytes.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: only http:// and https:// addresses are fetched")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            declared = response.headers.get("Content-Length", "")
            if not declared.isdecimal() or int(declared) > max_bytes:
                raise InputError(f"{url}: declares {declared or 'no'} bytes, at most {max_bytes:,} are fetched")
            with tempfile.TemporaryFile() as spool:
                while spool.tell() <= int(declared) and (chunk := response.read(_CHUNK)):
                    spool.write(chunk)
                spool.flush()
                return mapped(spool, url, max_bytes)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"cannot fetch {url}: {getattr(error, 'reason', error)}") from error
