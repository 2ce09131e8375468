"""Which of several ranks stores what all of them hold: their bytes in a row, cut into even shares.

Invariant: a pure function of what all holders see alike, in whole numbers, so that every one of them comes to the
same cuts without a word between them; the shares are disjoint and make up everything, and what the ranks of any one
of the nodes store as shares and copies makes up everything too (ADR 0015).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ktrain.format.shard import Box

# A cut may lie this part of a mean share from its even place, so that a share is at most 2 % from the mean.
_SLACK_DIVISOR = 100
# Below this, a further entry in the manifest costs more than an even share gains.
_MIN_SLACK_NBYTES = 2048


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors of equal lengths that are cut alike: a parameter and its optimizer state. `item_nbytes`: of all."""

    lengths: tuple[int, ...]
    item_nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank stores of the even shares of a row: one for the job, and others as copies for its own node.

    `begin` to `end` are both together; no other rank of the node stores any of them.
    """

    num_shares: int
    share: int
    begin: int
    end: int


def find_place(nodes: Sequence[Sequence[int]], rank: int) -> Place:
    """A rank's place among all who divide the same bytes: by node, equally many on each, in the order of the ranks.

    The ranks of a node divide the row between them; each part of it is divided once more between the nodes.
    """
    index = next(index for index, ranks in enumerate(nodes) if rank in ranks)
    begin = nodes[index].index(rank) * len(nodes)
    return Place(len(nodes[index]) * len(nodes), begin + index, begin, begin + len(nodes))


def share_out(blocks: Sequence[Block], num_shares: int, share: int, num: int = 1) -> list[list[Box]]:
    """What of each block one of the shares stores, or several in a row, as boxes of the block.

    The blocks' bytes lie in a row in the order given. A cut between two shares goes to the nearest border of a
    block, or, where that is too far for even shares, between two rows of a block (of the first dimension that has
    rows small enough). So at most one block for each cut is divided, nearly always into boxes of whole rows.
    """
    ends = list(accumulate(block.numel * block.item_nbytes for block in blocks))
    total = ends[-1] if ends else 0
    slack = max(total // (_SLACK_DIVISOR * num_shares), _MIN_SLACK_NBYTES)
    low = _cut(blocks, ends, total * share // num_shares, slack) if share else (0, 0)
    last = share + num == num_shares
    high = (len(blocks), 0) if last else _cut(blocks, ends, total * (share + num) // num_shares, slack)
    found = []
    for index, block in enumerate(blocks):
        begin = 0 if index > low[0] else low[1] if index == low[0] else block.numel
        end = block.numel if index < high[0] else high[1] if index == high[0] else 0
        if block.numel == 0:  # there is nothing to divide, and it is stored once all the same
            found.append([Box.whole(block.lengths)] if share == 0 and num else [])
        else:
            found.append(_boxes(block.lengths, begin, end) if begin < end else [])
    return found


def _cut(blocks: Sequence[Block], ends: Sequence[int], place: int, slack: int) -> tuple[int, int]:
    """Where a cut at byte `place` of all blocks goes: an index of a block and how many of its items lie before."""
    index = min(bisect.bisect_right(ends, place), len(blocks) - 1)
    if index < 0:
        return 0, 0
    block, end = blocks[index], ends[index]
    nbytes = block.numel * block.item_nbytes
    before, after = place - (end - nbytes), end - place
    if min(before, after) <= slack:
        return (index, 0) if before <= after else (index + 1, 0)
    row = _row_numel(block, 2 * slack)
    return index, (before + row * block.item_nbytes // 2) // (row * block.item_nbytes) * row


def _row_numel(block: Block, limit_nbytes: int) -> int:
    """Items of the largest row (what lies below some leading dimensions) of at most so many bytes; else one item."""
    for dim in range(1, len(block.lengths) + 1):
        numel = math.prod(block.lengths[dim:])
        if numel * block.item_nbytes <= limit_nbytes:
            return numel
    return 1


def _boxes(lengths: tuple[int, ...], begin: int, end: int) -> list[Box]:
    """The boxes that make up items `[begin, end)` of a tensor, counted with the last dimension fastest."""
    if end - begin == math.prod(lengths):
        return [Box.whole(lengths)]
    inner = lengths[1:]
    numel = math.prod(inner)
    first, last = -(-begin // numel), end // numel  # the whole rows
    if first > last:
        return _in_row(last, _boxes(inner, begin - last * numel, end - last * numel))
    found = _in_row(first - 1, _boxes(inner, begin - (first - 1) * numel, numel)) if begin < first * numel else []
    if first < last:
        found.append(Box((first, *(0 for _ in inner)), (last - first, *inner)))
    return found + (_in_row(last, _boxes(inner, 0, end - last * numel)) if last * numel < end else [])


def _in_row(row: int, boxes: Sequence[Box]) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.lengths)) for box in boxes]
