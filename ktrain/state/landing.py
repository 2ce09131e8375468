"""Where a restore's bytes go in host memory, so that a source can put them there while it proves them.

Most tensors of a state are whole, contiguous and on the host, so their bytes need no help of torch: a table of runs
says where in memory each byte range of a saved payload belongs. Live tensors get their values in place, tensors that
a part will create (the state of a fresh optimizer) get memory of their own. What is on a device, strided in memory or
shares memory with another target is read through the source's views, by torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy
import numpy.typing as npt
import torch

from ktrain.base.collector import without_collections
from ktrain.format.dtype import item_nbytes
from ktrain.native import Runs
from ktrain.state.saved import Piece, Target, ranges_of, row_strides
from ktrain.state.tensors import dtype_of

Row = tuple[int, int, int, int, int, int]  # the columns of `Runs`, in their order

_MAX_ROWS = 4096  # of one piece; a box of more rows than that in its outer dimensions is left to torch


@dataclass(frozen=True, slots=True)
class Landing:
    """Host memory for the targets of one restore, until they are applied.

    `memory` is by target, `runs` by saved rank; `views` are the byte ranges by saved rank that `apply` reads through
    the source. `nbytes` is what the rank wants in all.
    """

    memory: Mapping[str, torch.Tensor]
    runs: Mapping[int, Runs]
    views: Mapping[int, list[tuple[int, int]]]
    nbytes: int


def land(targets: Mapping[str, Target]) -> Landing:
    """Finds or makes the memory for every target that plain copies can fill. Writes to none of it."""
    with without_collections():
        memory = {name: local for name, target in targets.items() if (local := _host_memory(target)) is not None}
        places = {name: (local.data_ptr(), local.nbytes) for name, local in memory.items()}
        for name in _sharing(places, targets):
            del memory[name]
        tables: dict[int, _Table] = {}
        views: list[Target] = []
        nbytes = 0
        for name, target in targets.items():
            if name in memory and _add_rows(target, *places[name], tables):
                nbytes += places[name][1]
            else:
                memory.pop(name, None)
                views.append(target)
                nbytes += target.box.numel * item_nbytes(target.dtype)
        return Landing(memory, {rank: table.runs() for rank, table in tables.items()}, ranges_of(views), nbytes)


def _host_memory(target: Target) -> torch.Tensor | None:
    """A contiguous tensor on the host that the target's bytes may be written into as they are stored."""
    local = target.into
    if local is None:
        return torch.empty(target.box.lengths, dtype=dtype_of(target.dtype)) if target.is_host else None
    plain = local.is_cpu and local.layout is torch.strided and local.is_contiguous()
    return local if plain and not local.is_conj() and not local.is_neg() else None


_Places: TypeAlias = Mapping[str, tuple[int, int]]
"""Address and size of the memory of targets."""


def _sharing(places: _Places, targets: Mapping[str, Target]) -> list[str]:
    """Targets whose memory others of them share: several threads must not write there, and their order matters.

    Of targets that are one tensor with one value (tied weights) none is in the way of another.
    """
    names = [name for name, (_, nbytes) in places.items() if nbytes and targets[name].into is not None]
    begin, nbytes = numpy.array([places[name] for name in names], dtype=numpy.int64).reshape(-1, 2).T
    end = begin + nbytes
    order = numpy.argsort(begin, kind="stable")
    begin, reach = begin[order], numpy.maximum.accumulate(end[order])
    group = numpy.concatenate(([0], numpy.cumsum(begin[1:] >= reach[:-1])))[: len(names)]
    crowded: dict[int, list[str]] = {}
    for at in numpy.flatnonzero(numpy.bincount(group)[group] > 1):
        crowded.setdefault(int(group[at]), []).append(names[order[at]])
    return [name for sharers in crowded.values() if not _are_one(sharers, places, targets) for name in sharers]


def _are_one(names: list[str], places: _Places, targets: Mapping[str, Target]) -> bool:
    place, pieces = places[names[0]], targets[names[0]].pieces
    return all((places[name], targets[name].pieces) == (place, pieces) for name in names[1:])


@dataclass(slots=True)
class _Table:
    """Rows of runs of one saved rank; nearly all are one run, so those are kept apart."""

    address: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    boxes: list[Row] = field(default_factory=list)

    def runs(self) -> Runs:
        plain = numpy.zeros((6, len(self.offset)), dtype=numpy.int64)
        plain[:3] = self.address, self.nbytes, self.offset
        plain[3] = 1
        boxes = numpy.array(self.boxes, dtype=numpy.int64).reshape(-1, 6).T
        table: npt.NDArray[Any] = numpy.concatenate((plain, boxes), axis=1)
        table = table[:, numpy.argsort(table[2], kind="stable")]
        return Runs(*(numpy.ascontiguousarray(column).data for column in table))


def _add_rows(target: Target, address: int, nbytes: int, tables: dict[int, _Table]) -> bool:
    """Adds the rows that fill a target at an address; false where they would be too many."""
    if len(target.pieces) == 1:
        piece = target.pieces[0]
        if piece.end - piece.begin == nbytes and piece.box == target.box:  # one run, as nearly always
            table = tables.get(piece.rank) or tables.setdefault(piece.rank, _Table())
            table.address.append(address)
            table.nbytes.append(nbytes)
            table.offset.append(piece.begin)
            return True
    found = [(piece.rank, rows) for piece in target.pieces if (rows := _rows(piece, target, address)) is not None]
    if len(found) < len(target.pieces):
        return False
    for rank, rows in found:
        tables.setdefault(rank, _Table()).boxes += rows
    return True


def _rows(piece: Piece, target: Target, address: int) -> list[Row] | None:
    """The rows that copy a piece into a contiguous tensor of the target's box at `address`; None for too many."""
    item = item_nbytes(target.dtype)
    source = [stride * item for stride in row_strides(piece.entry.shard.box.lengths)]
    into = [stride * item for stride in row_strides(target.box.lengths)]
    places = zip(piece.box.offsets, target.box.offsets, into, strict=True)
    address += sum((offset - begin) * stride for offset, begin, stride in places)
    dims = [dim for dim in zip(piece.box.lengths, source, into, strict=True) if dim[0] > 1]
    run = item
    while dims and dims[-1][1:] == (run, run):  # contiguous on both sides: longer runs
        run *= dims.pop()[0]
    count, source_step, target_step = dims.pop() if dims else (1, 0, 0)
    if math.prod(length for length, _, _ in dims) > _MAX_ROWS:
        return None
    rows = []
    for index in itertools.product(*(range(length) for length, _, _ in dims)):
        offset = piece.begin + sum(at * step for at, (_, step, _) in zip(index, dims, strict=True))
        to = address + sum(at * step for at, (_, _, step) in zip(index, dims, strict=True))
        rows.append((to, run, offset, count, source_step, target_step))
    return rows
