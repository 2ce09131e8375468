"""How the ranks' output is kept in a run that is no local directory: names, sizes, and what is read back (ADR 0041).

    logs/attempt-2/rank-0.log          the first MiB of what rank 0 wrote in attempt 2
    logs/attempt-2/rank-0.00001.log    the second, and so on

The invariant: part k holds the bytes [k MiB, (k + 1) MiB) of the file that the rank wrote, secrets masked byte for
byte; only the last part is shorter, and is written again as it grows. Parts that are missing in between were too old.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ktrain.abc.tier import Stored, Tier
from ktrain.base import contract
from ktrain.base.clock import Deadline

PART_BYTES = 1 << 20
MOST_PARTS = 64  # of one rank in one attempt: the first, and the newest others
MOST_ATTEMPTS = 20  # whose output stays

_NAME = re.compile(r"attempt-(\d+)/rank-(\d+)(?:\.(\d{5}))?\.log$")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One object of a rank's log."""

    attempt: int
    rank: int
    index: int

    @property
    def name(self) -> str:
        number = f".{self.index:05d}" if self.index else ""
        return f"{folder_of(self.attempt)}/rank-{self.rank}{number}.log"


def folder_of(attempt: int) -> str:
    """The folder of an attempt's output in the run."""
    return f"{contract.LOGS_DIR}/attempt-{attempt}"


def parts_of(stored: Iterable[Stored]) -> dict[Part, int]:
    """The parts of a listing, with their bytes; other names are left out."""
    found = {}
    for item in stored:
        match = _NAME.search(item.name)
        if match is not None:
            found[Part(int(match[1]), int(match[2]), int(match[3] or 0))] = item.nbytes
    return found


def read_from(
    tier: Tier, sizes: Mapping[Part, int], attempt: int, rank: int, begin: int, *, deadline: Deadline
) -> Iterator[tuple[int, bytes]]:
    """The output of a rank from a byte on, in pieces with their offsets; a gap is what was not kept.

    Raises:
        NotFoundError: a part went meanwhile; list again.
    """
    mine = sorted(part for part in sizes if (part.attempt, part.rank) == (attempt, rank))
    for part in mine:
        first = part.index * PART_BYTES
        offset = max(begin, first)
        if offset < first + sizes[part]:
            yield offset, tier.read(part.name, deadline=deadline)[offset - first :]
