"""A box of a global tensor.

Invariant: offsets and lengths are counted in items of the global tensor and never leave its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor; of a tensor without dimensions, its one item."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether the box is the entire tensor of that shape."""
        return self.lengths == tuple(shape) and not any(self.offsets)

    def is_inside(self, shape: Sequence[int]) -> bool:
        """Whether the box is one of that shape: as many dimensions, nothing negative, nothing beyond."""
        return len(self.offsets) == len(self.lengths) == len(shape) and all(
            offset >= 0 and length >= 0 and offset + length <= size
            for offset, length, size in zip(self.offsets, self.lengths, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The part both have, in the global tensor's offsets; None where they share no item."""
        offsets, lengths = [], []
        for a, m, b, n in zip(self.offsets, self.lengths, other.offsets, other.lengths, strict=True):
            begin, end = max(a, b), min(a + m, b + n)
            if begin >= end:
                return None
            offsets.append(begin)
            lengths.append(end - begin)
        return Box(tuple(offsets), tuple(lengths))

    def subtract(self, other: Box) -> list[Box]:
        """This box without the other: disjoint boxes, at most two for each dimension."""
        common = self.intersect(other)
        if common is None:
            return [self] if self.numel else []
        return self.around(common)

    def around(self, common: Box) -> list[Box]:
        """As `subtract`, for a box that lies inside this one."""
        rest = []
        offsets, lengths = list(self.offsets), list(self.lengths)
        for dim, (begin, length) in enumerate(zip(common.offsets, common.lengths, strict=True)):
            before, after = begin - offsets[dim], offsets[dim] + lengths[dim] - begin - length
            for offset, size in ((offsets[dim], before), (begin + length, after)):
                if size:
                    rest.append(_replace(offsets, lengths, dim, (offset, size)))
            offsets[dim], lengths[dim] = begin, length
        return rest


def missing_boxes(shape: Sequence[int], boxes: Sequence[Box]) -> list[Box]:
    """What of a tensor of that shape no box covers; empty where all is covered. Boxes may overlap."""
    whole = Box.whole(shape)
    missing = [whole] if whole.numel and whole not in boxes else []
    for box in sorted(set(boxes), key=lambda box: (box.offsets, box.lengths)):
        if not missing:
            break
        missing = [rest for piece in missing for rest in piece.subtract(box)]
    return missing


class Role(StrEnum):
    """What joins the shards of one name."""

    SHARDED = "sharded"  # boxes of one tensor, spread over the ranks
    REPLICATED = "replicated"  # one tensor that every rank has; some ranks store boxes of it
    RANK = "rank"  # each rank's own value


# A tuple, as an entry of a payload is: one is made for each tensor, and a frozen dataclass takes four times as long.
class Shard(NamedTuple):
    """The part of a named tensor that one payload holds. `dtype` is torch's name without `torch.`."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    box: Box
    role: Role

    def is_whole(self) -> bool:
        return self.box.is_whole(self.global_shape)


def _replace(offsets: list[int], lengths: list[int], dim: int, part: tuple[int, int]) -> Box:
    return Box(
        (*offsets[:dim], part[0], *offsets[dim + 1 :]),
        (*lengths[:dim], part[1], *lengths[dim + 1 :]),
    )
