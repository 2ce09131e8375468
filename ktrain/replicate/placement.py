"""Which node keeps whose snapshots. Pure.

Invariant: an owner's keepers are distinct and never the owner, and every node keeps for as many owners as it
has keepers. The order of the names decides, so a node that is replaced under its name changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ktrain.errors import ConfigError


def ring(nodes: Sequence[str], copies: int = 1) -> dict[str, tuple[str, ...]]:
    """The keepers of each node's snapshots: the next `copies` nodes in the ring of names.

    Fewer nodes than `copies + 1` give fewer keepers; one node has none.

    Raises:
        ConfigError: a name occurs twice, or `copies` is negative.
    """
    if copies < 0:
        raise ConfigError(f"placement: copies is {copies}, expected 0 or more")
    order = sorted(nodes, key=_natural)
    if len(set(order)) != len(order):
        raise ConfigError(f"placement: node names must differ, found {', '.join(order)}")
    count = min(copies, len(order) - 1)
    return {
        owner: tuple(order[(index + hop) % len(order)] for hop in range(1, count + 1))
        for index, owner in enumerate(order)
    }


def kept_for(placement: dict[str, tuple[str, ...]], keeper: str) -> tuple[str, ...]:
    """The owners whose snapshots `keeper` keeps."""
    return tuple(owner for owner, keepers in placement.items() if keeper in keepers)


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    # node-2 before node-10, so that a growing job keeps most of its neighbours.
    parts = (part for part in re.split(r"(\d+)", name) if part)
    key: list[tuple[int, int | str]] = [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
    return (*key, (2, name))  # names that differ only in leading zeros keep an order of their own
