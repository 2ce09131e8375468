"""What this rank stores of a TrainState, and where each tensor lies in its payload."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from ktrain.base.collector import without_collections
from ktrain.errors import ConfigError
from ktrain.format.digest import digest_text
from ktrain.format.document import FORMAT
from ktrain.format.payload import Layout, lay_out
from ktrain.format.shard import Box, Shard
from ktrain.state.look import picker
from ktrain.state.optimizer import OptimizerPart
from ktrain.state.parts import Context, Known
from ktrain.state.shares import Block, share_out
from ktrain.state.tensors import (
    PLAIN_TYPES,
    Leaf,
    box_of,
    dtype_name,
    is_dtensor,
    local_of,
    require_box,
    require_storable,
)
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

_Cut: TypeAlias = tuple[slice, ...]
"""The part of a rank's local tensor that it stores, where other ranks of its node store the rest."""


@dataclass(frozen=True, slots=True)
class Item:
    """A shard and its bytes: the local tensor, detached, on the live storage, perhaps not contiguous.

    Training writes to it; whoever reads it does so before the next step, or while the step waits.
    """

    shard: Shard
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """What a plan knows of its tensors beyond their shapes; the same object as long as it holds.

    `moving` are the rows whose tensors may lie elsewhere in each plan; all others are where they were. `guards` has
    for each row the optimizer parts in whose steps, and nowhere else, its tensor is expected to change; none where
    that is not known.
    """

    moving: tuple[int, ...]
    guards: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """A rank's share of a snapshot.

    `tensors` are the local parts in the order of `layout.entries`, on the live storage, perhaps part of autograd and
    not contiguous. `digest` is of all shards.
    """

    tensors: tuple[torch.Tensor, ...]
    layout: Layout
    objects: dict[str, Any]
    digest: str
    places: Places

    @property
    def items(self) -> tuple[Item, ...]:
        """The shards, each with its tensor detached; made anew each time."""
        pairs = zip(self.layout.entries, self.tensors, strict=True)
        return tuple(Item(entry.shard, tensor.detach()) for entry, tensor in pairs)


@dataclass(frozen=True, slots=True)
class _Memo:
    """What a plan computes from shapes and placements alone; kept while these stay the same."""

    topology: Topology
    signatures: tuple[tuple[Any, ...], ...]  # of all leaves
    stored: tuple[int, ...]  # indices of leaves, in the order of the layout
    layout: Layout
    digest: str
    cuts: tuple[tuple[int, _Cut], ...]  # rows of the layout that are a part of their leaf's local tensor
    version: int  # of the run's format
    known: tuple[Known | None, ...] = ()  # of all parts, in their order
    num_leaves: tuple[int, ...] = ()  # of all parts
    places: Places = Places((), ())
    stored_of: Callable[[Sequence[Any]], Sequence[Any]] = tuple  # takes the stored ones out of all

    def fits(self, leaves: Sequence[Leaf], topology: Topology) -> bool:
        # One after the other: signatures of all leaves at once would keep the garbage collector busy.
        return (self.topology, len(self.signatures)) == (topology, len(leaves)) and all(
            map(operator.eq, self.signatures, map(_signature, leaves))
        )


def plan_save(state: TrainState, topology: Topology, *, version: int = FORMAT) -> SavePlan:
    """What this rank stores of the state as it is now. No communication; changes nothing.

    `version`: the format version in which the run is written.

    Every node stores a whole copy of what its ranks hold, so that it restores from itself: what several ranks of
    the node hold is divided between them, evenly, large tensors by rows.

    Raises:
        ConfigError: a part holds something that cannot be stored; names it.
    """
    with without_collections():  # training waits
        return _plan(state, topology, version)


def _plan(state: TrainState, topology: Topology, version: int) -> SavePlan:
    memo = state.memo
    if isinstance(memo, _Memo) and memo.version != version:
        memo = None
    if isinstance(memo, _Memo) and memo.topology == topology:
        plan = _try_plan_again(state, topology, memo)
        if plan is not None:
            return plan
    context = Context(topology)
    leaves: list[Leaf] = []
    objects: dict[str, Any] = {}
    known: list[Known | None] = []
    num_leaves: list[int] = []
    for part in state.parts:
        found, objects[part.name] = part.describe(context)
        leaves.extend(found)
        known.append(part.know(found, objects[part.name], context))
        num_leaves.append(len(found))
    if not isinstance(memo, _Memo) or not memo.fits(leaves, topology):
        memo = _make_memo(leaves, topology, version)
    places = _find_places(state, known, num_leaves, memo.stored)
    memo = state.memo = replace(
        memo, known=tuple(known), num_leaves=tuple(num_leaves), places=places, stored_of=picker(memo.stored)
    )
    return _join(memo, [leaf.tensor for leaf in leaves], objects)


def _try_plan_again(state: TrainState, topology: Topology, memo: _Memo) -> SavePlan | None:
    """The plan by one look at each tensor that was planned before; None where more than values has changed."""
    context = Context(topology)
    tensors: list[torch.Tensor] = []
    objects: dict[str, Any] = {}
    for part, known, num_leaves in zip(state.parts, memo.known, memo.num_leaves, strict=True):
        if known is not None:
            again = known.again(context)
            if again is None:
                return None
            found, objects[part.name] = again
        else:
            leaves, objects[part.name] = part.describe(context)
            signatures = memo.signatures[len(tensors) : len(tensors) + num_leaves]
            if len(leaves) != num_leaves or not all(map(operator.eq, signatures, map(_signature, leaves))):
                return None
            found = [leaf.tensor for leaf in leaves]
        tensors.extend(found)
    return _join(memo, tensors, objects)


def _join(memo: _Memo, tensors: Sequence[torch.Tensor], objects: dict[str, Any]) -> SavePlan:
    mine = list(memo.stored_of(tensors))
    if not PLAIN_TYPES.issuperset(map(type, mine)):
        mine = list(map(_part_of, mine))
    for row, cut in memo.cuts:
        mine[row] = mine[row].detach()[cut]
    return SavePlan(tuple(mine), memo.layout, objects, memo.digest, memo.places)


def _part_of(tensor: torch.Tensor) -> torch.Tensor:
    """As `local_of`, where it can be without making a view: that costs ten microseconds for a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    part = tensor._local_tensor
    return part if type(part) in PLAIN_TYPES else local_of(tensor)


def _find_places(
    state: TrainState, known: Sequence[Known | None], num_leaves: Sequence[int], stored: Sequence[int]
) -> Places:
    of_parameter: dict[int, tuple[str, ...]] = {}
    for part in state.parts:
        if isinstance(part, OptimizerPart):
            for group in part.optimizer.param_groups:
                for param in group["params"]:
                    of_parameter[id(param)] = (*of_parameter.get(id(param), ()), part.name)
    moves: list[bool] = []
    guards: list[tuple[str, ...]] = []
    for one, num in zip(known, num_leaves, strict=True):
        moves += [one is None] * num
        if one is None:
            guards += [()] * num
        else:
            guards += [of_parameter.get(number, ()) if number is not None else () for number in one.guarded]
    return Places(
        tuple(row for row, index in enumerate(stored) if moves[index]),
        tuple(guards[index] for index in stored),
    )


def _signature(leaf: Leaf) -> tuple[Any, ...]:
    tensor = leaf.tensor
    spread = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None
    form = type(tensor), tensor.dtype, tensor.layout, tensor.device, tensor.shape
    return leaf.name, leaf.role, leaf.holders, leaf.anchor, *form, spread


def _make_memo(leaves: Sequence[Leaf], topology: Topology, version: int) -> _Memo:
    for leaf in leaves:
        require_storable(leaf.name, leaf.tensor)
    shards = [_shard(leaf) for leaf in leaves]
    _require_distinct(shards)
    own = _own_shards(leaves, shards, topology)
    layout = lay_out(list(own), version=version)
    stored, cuts = zip(*(own[entry.shard] for entry in layout.entries), strict=True) if own else ((), ())
    return _Memo(
        topology,
        tuple(map(_signature, leaves)),
        stored,
        layout,
        _digest([entry.shard for entry in layout.entries]),
        tuple((row, cut) for row, cut in enumerate(cuts) if cut is not None),
        version,
    )


def _shard(leaf: Leaf) -> Shard:
    tensor = leaf.tensor
    box = box_of(tensor)
    require_box(leaf.name, tensor, box)
    return Shard(leaf.name, dtype_name(tensor.dtype), tuple(tensor.shape), box, leaf.role)


def _has_bytes_here(shard: Shard) -> bool:
    """False for a rank whose part of a sharded tensor is empty; a tensor without items is stored as such."""
    return shard.box.numel > 0 or 0 in shard.global_shape


def _here(leaf: Leaf, topology: Topology) -> tuple[int, ...]:
    """The ranks of this node that hold the leaf's bytes."""
    return tuple(rank for rank in leaf.holders if rank in topology.node_ranks)


def _own_shards(
    leaves: Sequence[Leaf], shards: Sequence[Shard], topology: Topology
) -> dict[Shard, tuple[int, _Cut | None]]:
    """What this rank stores, in the order of the leaves: each shard with its leaf's index and its cut.

    What several ranks of this node hold is divided evenly between them. All of these see the same leaves, and so
    come to the same cuts. A parameter and its optimizer state have one anchor and are cut alike.
    """
    own: dict[Shard, tuple[int, _Cut | None]] = {}
    shared: dict[tuple[int, ...], dict[tuple[str, tuple[int, ...]], list[int]]] = {}
    for index, (leaf, shard) in enumerate(zip(leaves, shards, strict=True)):
        here = _here(leaf, topology)
        if not _has_bytes_here(shard):
            continue
        if len(here) > 1:
            shared.setdefault(here, {}).setdefault((leaf.anchor, shard.box.lengths), []).append(index)
        else:
            own[shard] = index, None
    for holders, groups in shared.items():
        rows = sorted(groups.items())
        blocks = [Block(key[1], sum(leaves[i].tensor.dtype.itemsize for i in indices)) for key, indices in rows]
        share = share_out(blocks, len(holders), holders.index(topology.rank))
        for (_, indices), boxes in zip(rows, share, strict=True):
            own.update((_part(shards[i], box), (i, _cut(shards[i], box))) for i in indices for box in boxes)
    return dict(sorted(own.items(), key=lambda item: item[1][0]))


def _part(shard: Shard, inner: Box) -> Shard:
    """A box of a shard's box, as a shard."""
    offsets = tuple(a + b for a, b in zip(shard.box.offsets, inner.offsets, strict=True))
    return replace(shard, box=Box(offsets, inner.lengths))


def _cut(shard: Shard, inner: Box) -> _Cut | None:
    if inner.lengths == shard.box.lengths:
        return None
    return tuple(slice(at, at + length) for at, length in zip(inner.offsets, inner.lengths, strict=True))


def _digest(shards: Iterable[Shard]) -> str:
    rows = [
        [shard.name, shard.dtype, shard.global_shape, shard.box.offsets, shard.box.lengths, shard.role]
        for shard in shards
    ]
    return digest_text(json.dumps(rows, separators=(",", ":")).encode())


def _require_distinct(shards: Iterable[Shard]) -> None:
    seen: set[str] = set()
    for shard in shards:
        if shard.name in seen:
            raise ConfigError(f"tensor {shard.name!r}: two tensors of the state have this name; rename a part or a key")
        seen.add(shard.name)
