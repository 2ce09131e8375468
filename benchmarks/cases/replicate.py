"""How fast does a snapshot get into another node's volume, proven and sealed there?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import RUN, large
from benchmarks.wire import wire
from ktrain.snapshot.arena import NodeVolume


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
    nbytes = snapshots.nbytes
    source, target = bench.buffers(nbytes)
    raw = "raw Ray get, same chunks"
    steps = [
        Step("memcpy, 1 thread", Kind.BASELINE, nbytes, lambda: memcpy(target, source)),
        Step(raw, Kind.BASELINE, nbytes, lambda: ray.raw.get(nbytes), "memcpy, 1 thread"),
        Step(
            "replicate: get, land, prove, seal",
            Kind.KTRAIN,
            nbytes,
            lambda: ray.pull(snapshots).seconds,
            raw,
            before=snapshots.capture,
        ),
    ]
    return Outcome(proofs, measure(steps, bench.sizes.repeats))


CASE = Case(
    "replicate",
    "How fast does a snapshot get into another node's volume over Ray, proven and sealed there?",
    "bytes / rate of Ray's own get between the two nodes; one copy with digest may hide behind it",
    _run,
)
