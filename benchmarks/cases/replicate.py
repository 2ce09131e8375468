"""How fast does a snapshot get into another node's volume, proven and sealed there?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Measured, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import RUN, Snapshotter, large
from benchmarks.wire import Wire, wire
from ktrain.abc.transport import Receipt
from ktrain.base.clock import Deadline
from ktrain.format.manifest import Identity
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.format.shard import Role
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.transport_conformance import seal_copies

_OWNER, _KEEPER = 10, 11  # ranks of another job in the same volumes: one on each node, which hold the same tensors
_PULL_S = 300.0


def _run(bench: Bench) -> Outcome:
    snapshots, ray = large(bench), wire(bench)
    proofs = Proofs()
    proofs.true("the raw Ray program gets the right bytes", ray.raw.proven)
    snapshots.capture()
    receipt = ray.pull(snapshots)
    proofs.true("all bytes crossed the wire", receipt.wire_nbytes >= receipt.nbytes)
    with NodeVolume(bench.volume_root, node="node-1", run=RUN) as kept:
        with kept.open(0, snapshots.identity) as copy, snapshots.volume.open(0, snapshots.identity) as own:
            proofs.same("the peer's slot holds the source's bytes", copy.memory, own.memory)
        held_alike = _hold_alike(snapshots, ray, kept)
        built = held_alike.build()
        proofs.true("nearly all bytes are the peer's own", built.own_nbytes >= built.nbytes - 4 * CHUNK_NBYTES)
        with kept.open(_OWNER, held_alike.identity) as copy:
            with snapshots.volume.open(_OWNER, held_alike.identity) as own:
                proofs.same("a replica from own copies holds the source's bytes", copy.memory, own.memory)
        rows = _measure(bench, snapshots, ray, held_alike)
    return Outcome(proofs, rows)


def _measure(bench: Bench, snapshots: Snapshotter, ray: Wire, held_alike: _HeldAlike) -> list[Measured]:
    nbytes = snapshots.nbytes
    source, target = bench.buffers(nbytes)
    raw, plain = "raw Ray get, same chunks", "memcpy, 1 thread"
    steps = [
        Step(plain, Kind.BASELINE, nbytes, lambda: memcpy(target, source)),
        Step(raw, Kind.BASELINE, nbytes, lambda: ray.raw.get(nbytes), plain),
        Step(
            "replicate: get, land, prove, seal",
            Kind.KTRAIN,
            nbytes,
            lambda: ray.pull(snapshots).seconds,
            raw,
            before=snapshots.capture,
        ),
        Step(
            "replicate from own copies: copy, prove, seal",
            Kind.KTRAIN,
            nbytes,
            lambda: held_alike.build().seconds,
            plain,
            before=held_alike.forget,
        ),
    ]
    return measure(steps, bench.sizes.repeats)


@dataclass(frozen=True, slots=True)
class _HeldAlike:
    """A share on node-0 of which node-1 holds every tensor too, as copies beside a share of its own."""

    wire: Wire
    kept: NodeVolume
    identity: Identity

    def build(self) -> Receipt:
        """Node-1's replica of the share."""
        address = self.wire.source.address()
        assert address is not None, "node-0 has lost its wire"
        deadline = Deadline.after(_PULL_S)
        return self.wire.receiver.pull(address, _OWNER, self.identity, protect=(), deadline=deadline)

    def forget(self) -> None:
        """Takes the replica out of use; its slot and the pages of it stay."""
        self.kept.discard(_OWNER, self.identity, "to be built again")


def _hold_alike(snapshots: Snapshotter, ray: Wire, kept: NodeVolume) -> _HeldAlike:
    identity = Identity(RUN, 1, 1, world_size=_KEEPER + 1)
    with snapshots.volume.open(0, snapshots.identity) as slot:
        entries = tuple(e._replace(shard=e.shard._replace(role=Role.REPLICATED)) for e in slot.manifest.entries)
        share = replace(slot.manifest, identity=identity, rank=_OWNER, entries=entries, table=None)
        writer = snapshots.volume.acquire(_OWNER, share.nbytes, protect=(), limit=1)
        assert writer is not None, "the slot is in use"
        with writer:
            writer.memory[:] = slot.memory
            writer.seal(share)
        seal_copies(kept, _KEEPER, share, slot.memory)
    return _HeldAlike(ray, kept, identity)


CASE = Case(
    "replicate",
    "How fast does a snapshot get into another node's volume over Ray, proven and sealed there?",
    "bytes / rate of Ray's own get between the two nodes; one copy with digest may hide behind it. From own copies: "
    "bytes / rate of memcpy",
    _run,
)
