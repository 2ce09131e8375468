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
from ktrain.state.shares import Block, find_place, share_out
from ktrain.state.tensors import (
    PLAIN_TYPES,
    Leaf,
    Spreads,
    dtype_name,
    is_dtensor,
    part_of,
    require_box,
    require_storable,
)
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

_Cut: TypeAlias = tuple[slice, ...]
"""The part of a rank's local tensor that it stores, where other ranks store the rest."""

_Rows: TypeAlias = "dict[Shard, tuple[int, _Cut | None]]"
"""What goes into a payload: each shard with its leaf's index and its cut."""

_Nodes: TypeAlias = tuple[tuple[int, ...], ...]
"""Ranks by node."""


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
    """One payload of a rank: its share of a snapshot, or its copies of other ranks' shares.

    `tensors` are the local parts in the order of `layout.entries`, on the live storage, perhaps part of autograd and
    not contiguous. `digest` is of all shards. `copies` are what this rank stores for its own node alone (ADR 0015);
    None where there is nothing of the kind, and in the copies themselves.
    """

    tensors: tuple[torch.Tensor, ...]
    layout: Layout
    objects: dict[str, Any]
    digest: str
    places: Places
    copies: SavePlan | None = None
    is_copies: bool = False

    def without_tensors(self) -> SavePlan:
        """The plan as it describes what was stored, which holds nothing of the state."""
        return replace(self, tensors=(), copies=self.copies and self.copies.without_tensors())

    @property
    def items(self) -> tuple[Item, ...]:
        """The shards, each with its tensor detached; made anew each time."""
        pairs = zip(self.layout.entries, self.tensors, strict=True)
        return tuple(Item(entry.shard, tensor.detach()) for entry, tensor in pairs)


@dataclass(frozen=True, slots=True)
class _Payload:
    """One payload of a plan, but for its tensors."""

    stored: tuple[int, ...]  # indices of leaves, in the order of the layout
    layout: Layout
    digest: str
    cuts: tuple[tuple[int, _Cut], ...]  # rows of the layout that are a part of their leaf's local tensor
    places: Places = Places((), ())
    stored_of: Callable[[Sequence[Any]], Sequence[Any]] = tuple  # takes the stored ones out of all


@dataclass(frozen=True, slots=True)
class _Memo:
    """What a plan computes from shapes and placements alone; kept while these stay the same."""

    topology: Topology
    signatures: tuple[tuple[Any, ...], ...]  # of all leaves
    share: _Payload
    copies: _Payload | None
    version: int  # of the run's format
    known: tuple[Known | None, ...] = ()  # of all parts, in their order
    num_leaves: tuple[int, ...] = ()  # of all parts

    def fits(self, leaves: Sequence[Leaf], topology: Topology) -> bool:
        # One after the other: signatures of all leaves at once would keep the garbage collector busy.
        return (self.topology, len(self.signatures)) == (topology, len(leaves)) and all(
            map(operator.eq, self.signatures, map(_signature, leaves))
        )


def plan_save(state: TrainState, topology: Topology, *, version: int = FORMAT) -> SavePlan:
    """What this rank stores of the state as it is now. No communication; changes nothing.

    What several ranks hold is divided between all of them, evenly, large tensors by rows: that is each rank's share of
    the job. Beside it the ranks of a node keep copies of the rest of what they hold, divided between them as well, so
    that a node restores from itself. Where the topology does not know all nodes, a node's ranks divide all they hold.

    `version`: the format version in which the run is written.

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
        memo = _make_memo(leaves, topology, context.spreads, version)
    placed = [
        payload
        and replace(
            payload,
            places=_find_places(state, known, num_leaves, payload.stored),
            stored_of=picker(payload.stored),
        )
        for payload in (memo.share, memo.copies)
    ]
    assert placed[0] is not None
    memo = state.memo = replace(
        memo, known=tuple(known), num_leaves=tuple(num_leaves), share=placed[0], copies=placed[1]
    )
    return _join_all(memo, [leaf.tensor for leaf in leaves], objects)


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
    return _join_all(memo, tensors, objects)


def _join_all(memo: _Memo, tensors: Sequence[torch.Tensor], objects: dict[str, Any]) -> SavePlan:
    share = memo.share
    plan = SavePlan(_join(share, tensors), share.layout, objects, share.digest, share.places)
    if memo.copies is None:
        return plan
    beside = memo.copies
    copies = SavePlan(_join(beside, tensors), beside.layout, {}, beside.digest, beside.places, is_copies=True)
    return replace(plan, copies=copies)


def _join(payload: _Payload, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    mine = list(payload.stored_of(tensors))
    if not PLAIN_TYPES.issuperset(map(type, mine)):
        mine = list(map(part_of, mine))
    for row, cut in payload.cuts:
        mine[row] = mine[row].detach()[cut]
    return tuple(mine)


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


def _make_memo(leaves: Sequence[Leaf], topology: Topology, spreads: Spreads, version: int) -> _Memo:
    for leaf in leaves:
        require_storable(leaf.name, leaf.tensor)
    shards = [_shard(leaf, spreads) for leaf in leaves]
    _require_distinct(shards)
    share, copies = _divide(leaves, shards, topology)
    return _Memo(
        topology,
        tuple(map(_signature, leaves)),
        _make_payload(share, version),
        _make_payload(copies, version) if copies else None,
        version,
    )


def _make_payload(rows: _Rows, version: int) -> _Payload:
    """A payload of those rows, in the order of the leaves, in a version of the format."""
    rows = dict(sorted(rows.items(), key=lambda item: item[1][0]))
    layout = lay_out(list(rows), version=version)
    stored, cuts = zip(*(rows[entry.shard] for entry in layout.entries), strict=True) if rows else ((), ())
    return _Payload(
        stored,
        layout,
        _digest([entry.shard for entry in layout.entries]),
        tuple((row, cut) for row, cut in enumerate(cuts) if cut is not None),
    )


def _shard(leaf: Leaf, spreads: Spreads) -> Shard:
    tensor = leaf.tensor
    box = spreads.box_of(tensor)
    require_box(leaf.name, tensor, box)
    return Shard(leaf.name, dtype_name(tensor.dtype), tuple(tensor.shape), box, leaf.role)


def _has_bytes_here(shard: Shard) -> bool:
    """False for a rank whose part of a sharded tensor is empty; a tensor without items is stored as such."""
    return shard.box.numel > 0 or 0 in shard.global_shape


def _divide(leaves: Sequence[Leaf], shards: Sequence[Shard], topology: Topology) -> tuple[_Rows, _Rows]:
    """What this rank stores as its share of the job, and as copies for its node.

    What several ranks hold is divided evenly between them. All of these see the same leaves, and so come to the same
    cuts. A parameter and its optimizer state have one anchor and are cut alike.
    """
    share: _Rows = {}
    copies: _Rows = {}
    nodes_of: dict[tuple[int, ...], _Nodes] = {}
    shared: dict[_Nodes, dict[tuple[str, tuple[int, ...]], list[int]]] = {}
    for index, (leaf, shard) in enumerate(zip(leaves, shards, strict=True)):
        if not _has_bytes_here(shard):
            continue
        nodes = nodes_of.get(leaf.holders)
        if nodes is None:
            nodes = nodes_of[leaf.holders] = _dividing_nodes(leaf.holders, topology)
        if sum(map(len, nodes)) > 1:
            shared.setdefault(nodes, {}).setdefault((leaf.anchor, shard.box.lengths), []).append(index)
        else:
            share[shard] = index, None
    for nodes, groups in shared.items():
        rows = sorted(groups.items())
        blocks = [Block(key[1], sum(leaves[i].tensor.dtype.itemsize for i in indices)) for key, indices in rows]
        place = find_place(nodes, topology.rank)
        before, after = place.share - place.begin, place.end - place.share - 1
        for into, first, num in (
            (share, place.share, 1),
            (copies, place.begin, before),
            (copies, place.share + 1, after),
        ):
            for (_, indices), boxes in zip(rows, share_out(blocks, place.num_shares, first, num), strict=True):
                into.update((_part(shards[i], box), (i, _cut(shards[i], box))) for i in indices for box in boxes)
    return share, copies


def _dividing_nodes(holders: Sequence[int], topology: Topology) -> _Nodes:
    """The holders that divide their bytes, by node: all, or where nodes have not equally many, those of this node.

    Ranks that divide something must agree on it, and so on what lies beside it in one row.
    """
    nodes = topology.by_node(holders)
    if len(set(map(len, nodes))) > 1:
        nodes = tuple(ranks for ranks in nodes if topology.rank in ranks)
    return nodes


def _part(shard: Shard, inner: Box) -> Shard:
    """A box of a shard's box, as a shard."""
    offsets = tuple(a + b for a, b in zip(shard.box.offsets, inner.offsets, strict=True))
    return shard._replace(box=Box(offsets, inner.lengths))


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
