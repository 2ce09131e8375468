"""A checkpoint as a restoring rank sees it: which saved bytes make which tensor.

Two rules about names: a SHARDED or REPLICATED name is one tensor of all ranks, joined from every rank's
boxes; a RANK name is a tensor of its manifest's rank alone (the name itself does not carry the rank).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy
import torch

from ktrain.abc.source import SnapshotSource, copies_beside
from ktrain.errors import CorruptionError, InternalError
from ktrain.format import objects
from ktrain.format.dtype import item_nbytes
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import Entry
from ktrain.format.shard import Box, Role
from ktrain.state.tensors import PLAIN_TYPES, Spreads, dtype_name, dtype_of
from ktrain.state.topology import Topology


class Piece(NamedTuple):
    """A box of a tensor and the saved entry it is read from, at these bytes of the saved rank's payload.

    `rank` may stand for copies beside a rank's share (`copies_beside`).
    """

    rank: int
    entry: Entry
    box: Box
    begin: int
    end: int


class Target(NamedTuple):
    """A box of a saved tensor that this rank wants, and the pieces that fill it.

    `into` is the live local tensor that gets the value; without one a tensor will be created, on the host or not.
    """

    dtype: str
    global_shape: tuple[int, ...]
    box: Box
    pieces: tuple[Piece, ...]
    into: torch.Tensor | None
    is_host: bool


LiveRow: TypeAlias = tuple[str, str, torch.Tensor]
"""A target's name, the name that its value was stored by, and the live tensor that gets it."""

_HOST = torch.device("cpu")


class Saved:
    """The manifests of a checkpoint, indexed for one restoring rank.

    `copies` are manifests of copies at hand, by the saved rank that they lie beside. What they have is read from them
    rather than from another node; what they lack, or where they are left out, from shares.
    """

    def __init__(
        self, manifests: Mapping[int, Manifest], topology: Topology, copies: Mapping[int, Manifest] | None = None
    ) -> None:
        self._manifests = manifests
        self._topology = topology
        self.world_size = len(manifests)
        self.is_same_world = self.world_size == topology.world_size
        # On another world size what belongs to no rank in particular is rank 0's, as DDP does with buffers.
        self.rank = topology.rank if self.is_same_world else 0
        self._index: dict[str, list[tuple[int, Entry]]] = {}
        self._readable: dict[str, list[tuple[int, Entry]]] = {}  # of it, what several ranks stored and was asked for
        beside = {copies_beside(rank): manifest for rank, manifest in (copies or {}).items()}
        every = {**manifests, **beside}
        for rank in sorted(every, key=self._distance):
            for entry in every[rank].entries:
                self._index.setdefault(entry.shard.name, []).append((rank, entry))

    @property
    def identity(self) -> Identity:
        return self._manifests[self.rank].identity

    def objects(self, part: str) -> dict[str, Any] | None:
        """The part's JSON as the rank that stands for this one saved it; None where there is no such part."""
        found = self._manifests[self.rank].objects.get(part)
        return found if isinstance(found, dict) else None

    def all_objects(self, part: str) -> list[dict[str, Any]]:
        """The part's JSON of every saved rank."""
        return [manifest.objects.get(part, {}) for _, manifest in sorted(self._manifests.items())]

    def part_names(self) -> set[str]:
        return set(self._manifests[self.rank].objects)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Of the whole saved tensor; None where it was not saved."""
        entries = self.entries(name)
        return (entries[0][1].shard.global_shape, entries[0][1].shard.dtype) if entries else None

    def pieces(self, name: str, box: Box) -> tuple[Piece, ...] | list[Box]:
        """The pieces that fill a box of a saved tensor, or the boxes that nothing fills."""
        entries = self.entries(name)
        if entries and entries[0][1].shard.box == box and box.numel:  # the layout is as it was, nearly always
            rank, entry = entries[0]
            return (Piece(rank, entry, box, entry.begin, entry.end),)
        missing = [box] if box.numel else []
        pieces: list[Piece] = []
        for rank, entry in entries:
            if not missing:
                break
            rest: list[Box] = []
            for want in missing:
                common = want.intersect(entry.shard.box)
                if common is None:
                    rest.append(want)
                else:
                    pieces.append(_piece(rank, entry, common))
                    rest.extend(want.around(common))
            missing = rest
        return tuple(pieces) if entries and not missing else missing or [box]

    def entries(self, name: str) -> list[tuple[int, Entry]]:
        """What makes a tensor for this rank, by saved rank, the nearest first; nothing where it was not stored."""
        found = self._index.get(name, [])
        if len(found) < 2:
            return found
        known = self._readable.get(name)
        if known is None:
            known = self._readable[name] = self._choose(found)
        return known

    def _choose(self, found: list[tuple[int, Entry]]) -> list[tuple[int, Entry]]:
        """Of the entries of one name, those that make this rank's tensor."""
        own = [row for row in found if row[1].shard.role is Role.RANK and row[0] == self.rank]
        joined = [row for row in found if row[1].shard.role is not Role.RANK]
        return own[:1] or joined or found[:1]

    def _distance(self, rank: int) -> tuple[bool, bool, int]:
        """Order in which payloads are read: this rank's own, its node's, then spread over the others."""
        me = self._topology.rank
        if rank < 0:
            return copies_beside(rank) != me, False, (copies_beside(rank) - me) % self.world_size
        size = self._manifests[rank].origin.get("local_world_size", 1)
        same_node = isinstance(size, int) and size > 0 and rank // size == me // size
        return rank != me, not same_node, (rank - me) % self.world_size


class Wishes:
    """What a restore needs and everything that stands against it, gathered before anything is changed.

    `problems` say where state and checkpoint do not fit, `gaps` where the checkpoint lacks a part of what it has, and
    `notices` what will not come out of it.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.spreads = Spreads()
        self.targets: dict[str, Target] = {}
        self.objects: dict[str, Mapping[str, Any]] = {}  # by part, as it will be loaded; absent: as its rank stored it
        self.problems: list[str] = []
        self.gaps: list[str] = []
        self.notices: list[str] = []

    def add(
        self,
        name: str,
        box: Box,
        *,
        as_name: str | None = None,
        into: torch.Tensor | None = None,
        device: torch.device = _HOST,
    ) -> None:
        """Asks for a box of a saved tensor, read under `as_name`; what no rank stored becomes a problem or gap.

        Args:
            into: the live local tensor of the box that will be filled.
            device: where a tensor will be created instead.
        """
        pieces = self.saved.pieces(name, box)
        if isinstance(pieces, tuple):
            shape, dtype = self.saved.shape_and_dtype(name) or ((), "")
            self.targets[as_name or name] = Target(dtype, shape, box, pieces, into, device.type == "cpu")
        else:
            lacking = ", ".join(f"offsets {list(b.offsets)} lengths {list(b.lengths)}" for b in pieces[:3])
            where = self.problems if self.saved.shape_and_dtype(name) is None else self.gaps
            where.append(f"{name}: no rank stored {lacking}")

    def add_live(self, rows: Iterable[LiveRow]) -> list[LiveRow]:
        """Asks for tensors that were stored whole in the form they have, as nearly all are; returns the others."""
        entries_of, targets = self.saved.entries, self.targets
        others: list[LiveRow] = []
        for row in rows:
            name, source, tensor = row
            entries = entries_of(source)
            if entries and type(tensor) in PLAIN_TYPES:
                rank, (_, shard, begin, end) = entries[0]
                box, shape = shard.box, shard.global_shape
                if box.lengths == shape == tensor.shape and shard.dtype == dtype_name(tensor.dtype) and begin < end:
                    piece = Piece(rank, entries[0][1], box, begin, end)
                    into = tensor.detach() if tensor.requires_grad else tensor
                    targets[name] = Target(shard.dtype, shape, box, (piece,), into, True)
                    continue
            others.append(row)
        return others

    def add_whole(self, name: str, device: torch.device = _HOST) -> None:
        """Asks for a saved tensor, whole, to be created on the device."""
        found = self.saved.shape_and_dtype(name)
        if found is None:
            self.problems.append(f"{name}: named by its part, but not stored")
        else:
            self.add(name, Box.whole(found[0]), device=device)

    def add_all(self, encoded: Any, device: torch.device = _HOST) -> None:
        """Asks for every tensor that an encoded value names, whole."""
        for name in tensor_names(encoded):
            self.add_whole(name, device)


def tensor_names(encoded: Any) -> list[str]:
    """The tensors that an encoded value names."""
    names: list[str] = []
    objects.decode(encoded, tensor=names.append)
    return names


class Reader:
    """Fills tensors from memory that a source has filled, or else from the ranges that it has fetched."""

    def __init__(
        self, targets: Mapping[str, Target], source: SnapshotSource, memory: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._targets = targets
        self._source = source
        self._memory = dict(memory or {})  # by target; what was given away is gone
        self._written: list[torch.Tensor] = []  # in place, behind torch's back

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Of the whole saved tensor."""
        target = self._target(name)
        return target.global_shape, target.dtype

    def fill(self, name: str, local: torch.Tensor) -> None:
        """Writes a planned target into a rank's local tensor of the same shape and dtype."""
        target = self._target(name)
        if local.shape != target.box.lengths:
            raise InternalError(f"tensor {name!r}: planned {target.box.lengths}, now {tuple(local.shape)}")
        filled = self._memory.get(name)
        if filled is not None and filled.data_ptr() == local.data_ptr():
            self._written.append(local)
            return
        with torch.no_grad():
            if filled is not None:  # the part has another tensor now than when it planned
                local.copy_(filled)
                return
            for piece in target.pieces:
                where = _slices(piece.box, target.box)
                local[where].copy_(self._view(piece))

    def create(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A new tensor with a planned target's value."""
        target = self._target(name)
        if target.into is None and (filled := self._memory.pop(name, None)) is not None:
            return filled.to(device)
        local = torch.empty(target.box.lengths, dtype=dtype_of(target.dtype), device=device)
        self.fill(name, local)
        return local

    def close(self) -> None:
        """Tells autograd which tensors have changed, as their own `copy_` would have done."""
        written = [tensor for tensor in self._written if not tensor.is_inference()]
        if written:
            torch.autograd.graph.increment_version(written)
        self._written = []

    def _target(self, name: str) -> Target:
        try:
            return self._targets[name]
        except KeyError:
            # The JSON names a tensor that the plan did not find.
            raise CorruptionError(f"tensor {name!r}: named by its part but not stored; take another copy") from None

    def _view(self, piece: Piece) -> torch.Tensor:
        """The piece's items where the source keeps them: read-only, valid while the source is open."""
        shard = piece.entry.shard
        memory = self._source.view(piece.rank, piece.begin, piece.end)
        dtype = dtype_of(shard.dtype)
        # Through the address: torch warns of read-only memory on every call, and nobody writes here.
        address = numpy.frombuffer(memory, dtype=numpy.uint8).ctypes.data
        lent = (ctypes.c_char * memory.nbytes).from_address(address)
        flat = torch.frombuffer(lent, dtype=dtype, count=memory.nbytes // item_nbytes(shard.dtype))
        return flat.as_strided(piece.box.lengths, row_strides(shard.box.lengths))


def _piece(rank: int, entry: Entry, box: Box) -> Piece:
    """The shortest range of the entry that has all items of the box; the entry is stored row by row."""
    outer, size = entry.shard.box, item_nbytes(entry.shard.dtype)
    if box == outer:
        return Piece(rank, entry, box, entry.begin, entry.end)
    strides = row_strides(outer.lengths)
    at = zip(box.offsets, outer.offsets, strides, strict=True)
    first = sum((inner - begin) * stride for inner, begin, stride in at)
    last = first + sum((length - 1) * stride for length, stride in zip(box.lengths, strides, strict=True))
    return Piece(rank, entry, box, entry.begin + first * size, entry.begin + (last + 1) * size)


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(offset - begin, offset - begin + length)
        for offset, begin, length in zip(inner.offsets, outer.offsets, inner.lengths, strict=True)
    )


def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Items from one index to the next in each dimension, of a tensor that is stored row by row."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def ranges_of(targets: Iterable[Target]) -> dict[int, list[tuple[int, int]]]:
    """The byte ranges of the payloads that fill targets, by saved rank, sorted and merged."""
    found: dict[int, list[tuple[int, int]]] = {}
    for target in targets:
        for piece in target.pieces:
            found.setdefault(piece.rank, []).append((piece.begin, piece.end))
    return {rank: _merge(ranges) for rank, ranges in sorted(found.items())}


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
