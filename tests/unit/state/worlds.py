"""Builders for tests of state: snapshots in memory of one rank or of a pretended world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ktrain.abc.source import copies_beside
from ktrain.base.clock import Deadline
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.snapshot.staging import stage
from ktrain.state.apply import RestoreNeeds, apply, plan_restore
from ktrain.state.landing import land
from ktrain.state.plan import SavePlan, plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.memory_source import MemorySource

ALONE = Topology(0, 1)


Taken = tuple[Manifest, bytes]


def snapshot(state: TrainState, topology: Topology = ALONE, step: int = 7) -> Taken:
    """One rank's snapshot, without the copies beside it; the manifest went through its bytes."""
    return snapshot_and_copies(state, topology, step)[0]


def snapshot_and_copies(state: TrainState, topology: Topology, step: int = 7) -> tuple[Taken, Taken | None]:
    """One rank's share and copies."""
    plan = plan_save(state, topology)
    return _taken(plan, topology, step), None if plan.copies is None else _taken(plan.copies, topology, step)


def _taken(plan: SavePlan, topology: Topology, step: int) -> Taken:
    payload = bytearray(plan.layout.nbytes)
    chunks = stage(plan, memoryview(payload), num_threads=1)
    manifest = Manifest(
        identity=Identity(run="0123", step=step, epoch=1, world_size=topology.world_size),
        rank=topology.rank,
        plan_digest=plan.digest,
        nbytes=plan.layout.nbytes,
        chunk_nbytes=CHUNK_NBYTES,
        chunks=chunks,
        entries=plan.layout.entries,
        objects=plan.objects,
        origin={"local_world_size": topology.local_world_size},
    )
    return Manifest.from_bytes(manifest.to_bytes()), bytes(payload)


def restore(
    state: TrainState,
    snapshots: Mapping[int, Taken],
    topology: Topology = ALONE,
    copies: Mapping[int, Taken] | None = None,
) -> RestoreNeeds:
    """Plans, fetches and applies. `copies` are those at hand, by the rank that they lie beside."""
    beside = copies or {}
    source = MemorySource({**snapshots, **{copies_beside(rank): taken for rank, taken in beside.items()}})
    manifests = {rank: manifest for rank, (manifest, _) in snapshots.items()}
    needs = plan_restore(state, manifests, topology, {rank: manifest for rank, (manifest, _) in beside.items()})
    landing = land(needs.targets)
    source.fetch(landing.views, into=landing.runs, deadline=Deadline.after(30))
    apply(state, needs, source, landing)
    source.close()
    return needs


def save_and_restore(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> RestoreNeeds:
    """From one set of parts into another, in a world of one."""
    return restore(TrainState(fresh), {0: snapshot(TrainState(saved))})


class Holder:
    """A part that is a value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def world(make: Callable[[int], TrainState], size: int, per_node: int) -> dict[int, tuple[Manifest, bytes]]:
    """The snapshots of a world without process group, by rank."""
    return {rank: snapshot(make(rank), Topology(rank, size, rank % per_node, per_node)) for rank in range(size)}
