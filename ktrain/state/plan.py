"""What this rank stores of a TrainState, and where each tensor lies in its payload."""

from __future__ import annotations

import contextlib
import gc
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ktrain.errors import ConfigError
from ktrain.format.digest import digest_text
from ktrain.format.payload import Layout, lay_out
from ktrain.format.shard import Shard
from ktrain.state.look import picker
from ktrain.state.optimizer import OptimizerPart
from ktrain.state.parts import Context, Known
from ktrain.state.tensors import PLAIN_TYPES, Leaf, box_of, dtype_name, is_dtensor, local_of, require_storable
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState


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
    known: tuple[Known | None, ...] = ()  # of all parts, in their order
    num_leaves: tuple[int, ...] = ()  # of all parts
    places: Places = Places((), ())
    stored_of: Callable[[Sequence[Any]], Sequence[Any]] = tuple  # takes the stored ones out of all

    def fits(self, leaves: Sequence[Leaf], topology: Topology) -> bool:
        # One after the other: signatures of all leaves at once would keep the garbage collector busy.
        return (self.topology, len(self.signatures)) == (topology, len(leaves)) and all(
            map(operator.eq, self.signatures, map(_signature, leaves))
        )


def plan_save(state: TrainState, topology: Topology) -> SavePlan:
    """What this rank stores of the state as it is now. No communication; changes nothing.

    Every node stores a whole copy of what its ranks hold, so that it restores from itself: a tensor that
    several ranks of the node hold is stored by one of them, chosen so that their bytes are even.

    Raises:
        ConfigError: a part holds something that cannot be stored; names it.
    """
    with _without_collections():
        return _plan(state, topology)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Holds the garbage collector off: what a plan makes is no garbage, and training waits.

    Making many thousand small objects would have it walk through the whole process's heap, 0.1 s and more.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _plan(state: TrainState, topology: Topology) -> SavePlan:
    memo = state.memo
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
        memo = _make_memo(leaves, topology)
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
    mine = tuple(memo.stored_of(tensors))
    if not PLAIN_TYPES.issuperset(map(type, mine)):
        mine = tuple(map(_part_of, mine))
    return SavePlan(mine, memo.layout, objects, memo.digest, memo.places)


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


def _make_memo(leaves: Sequence[Leaf], topology: Topology) -> _Memo:
    for leaf in leaves:
        require_storable(leaf.name, leaf.tensor)
    shards = [_shard(leaf) for leaf in leaves]
    _require_distinct(shards)
    owners = _choose_owners(leaves, topology)
    mine = {
        shard.name: index
        for index, (leaf, shard) in enumerate(zip(leaves, shards, strict=True))
        if owners.get((_here(leaf, topology), leaf.anchor), topology.rank) == topology.rank and _has_bytes_here(shard)
    }
    layout = lay_out([shards[index] for index in mine.values()])
    stored = tuple(mine[entry.shard.name] for entry in layout.entries)
    signatures = tuple(map(_signature, leaves))
    return _Memo(topology, signatures, stored, layout, _digest([entry.shard for entry in layout.entries]))


def _shard(leaf: Leaf) -> Shard:
    tensor = leaf.tensor
    return Shard(leaf.name, dtype_name(tensor.dtype), tuple(tensor.shape), box_of(tensor), leaf.role)


def _has_bytes_here(shard: Shard) -> bool:
    """False for a rank whose part of a sharded tensor is empty; a tensor without items is stored as such."""
    return shard.box.numel > 0 or 0 in shard.global_shape


def _here(leaf: Leaf, topology: Topology) -> tuple[int, ...]:
    """The ranks of this node that hold the leaf's bytes."""
    return tuple(rank for rank in leaf.holders if rank in topology.node_ranks)


def _choose_owners(leaves: Iterable[Leaf], topology: Topology) -> dict[tuple[tuple[int, ...], str], int]:
    """Which rank of this node stores what several of its ranks hold: the largest first, to the emptiest rank.

    By holders and anchor.

    All holders come to the same result, since they see the same leaves.
    """
    groups: dict[tuple[int, ...], dict[str, int]] = {}
    for leaf in leaves:
        here = _here(leaf, topology)
        if len(here) > 1:
            weights = groups.setdefault(here, {})
            weights[leaf.anchor] = weights.get(leaf.anchor, 0) + local_of(leaf.tensor).nbytes
    owners: dict[tuple[tuple[int, ...], str], int] = {}
    for holders, weights in groups.items():
        loads = dict.fromkeys(holders, 0)
        for anchor in sorted(weights, key=lambda name: (-weights[name], name)):
            owner = min(holders, key=lambda rank: (loads[rank], rank))
            loads[owner] += weights[anchor]
            owners[holders, anchor] = owner
    return owners


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
