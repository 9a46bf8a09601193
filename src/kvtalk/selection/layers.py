"""Layer policies: which layers to send. The receiver's own head stands in every layer, sent or not."""

from __future__ import annotations

from kvtalk.errors import SelectionError

USAGE = "all, first:N, last:N (a number or a share like 50%), every:K, or a list such as 0,3,8-11"


def select_layers(policy: str, layers: int) -> list[int]:
    """Layer indices that a policy keeps, ascending.

    Args:
        policy: ``all``, ``first:N``, ``last:N``, ``every:K`` (every K-th from layer 0) or a list of indices and
            ranges, both ends included.
        layers: how many the model has.

    Raises:
        SelectionError: not a policy, or layers that the model does not have.
    """
    name, _, argument = policy.strip().partition(":")
    if name == "all" and not argument:
        return list(range(layers))
    if name in ("first", "last", "every"):
        count = _count(policy, argument, layers)
        chosen = {"first": range(min(count, layers)), "last": range(max(0, layers - count), layers)}
        return list(chosen.get(name, range(0, layers, count)))
    return _listed(policy, layers)


def _count(policy: str, argument: str, layers: int) -> int:
    share = argument.removesuffix("%")
    if share != argument and share.isdecimal() and 0 < int(share) <= 100:
        return -(-layers * int(share) // 100)
    if not argument.isdecimal() or int(argument) == 0:
        raise SelectionError(f"layers {policy!r}: needs a positive number; use {USAGE}")
    return int(argument)


def _listed(policy: str, layers: int) -> list[int]:
    chosen: set[int] = set()
    for item in policy.split(","):
        first, _, last = item.strip().partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
            raise SelectionError(f"layers {policy!r}: {item!r} is not a layer; use {USAGE}")
        if int(last) >= layers:
            raise SelectionError(f"layers {policy!r}: the model has layers 0 to {layers - 1}")
        chosen.update(range(int(first), int(last) + 1))
    return sorted(chosen)
