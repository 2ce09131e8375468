"""Builders for tests of state: snapshots in memory of one rank or of a pretended world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ktrain.base.clock import Deadline
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.snapshot.staging import stage
from ktrain.state.apply import RestoreNeeds, apply, plan_restore
from ktrain.state.landing import land
from ktrain.state.plan import plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.memory_source import MemorySource

ALONE = Topology(0, 1)


def snapshot(state: TrainState, topology: Topology = ALONE, step: int = 7) -> tuple[Manifest, bytes]:
    """One rank's snapshot; the manifest went through its bytes."""
    plan = plan_save(state, topology)
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
    state: TrainState, snapshots: Mapping[int, tuple[Manifest, bytes]], topology: Topology = ALONE
) -> RestoreNeeds:
    """Plans, fetches and applies."""
    source = MemorySource(snapshots)
    needs = plan_restore(state, source.manifests, topology)
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
