"""How long does a restore take whose node lost its memory: pull from the peer, prove, load?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.snapshots import RUN, Restored, large
from benchmarks.wire import wire
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy
from ktrain.snapshot.arena import NodeVolume


def _run(bench: Bench) -> Outcome:
    snapshots, ray = large(bench), wire(bench)
    proofs = Proofs()
    proofs.true("the raw Ray program gets the right bytes", ray.raw.proven)
    with NodeVolume(bench.volume_root, node="node-1", run=RUN) as volume:
        restored = Restored(snapshots, run_url=str(bench.work_dir / "unused"), volume=volume)

        def copy() -> Copy:
            return Copy(contract.TIER_PEER, "node-0", 0, snapshots.identity)

        def restore() -> None:
            ray.pull(snapshots)
            restored.load(copy())

        def capture() -> None:
            snapshots.capture()
            snapshots.manifest_bytes()

        capture()
        ray.pull(snapshots)
        restored.prove(copy(), proofs)
        nbytes = snapshots.nbytes
        raw = "raw Ray get, same chunks"
        steps = [
            Step(raw, Kind.BASELINE, nbytes, lambda: ray.raw.get(nbytes)),
            Step("restore from peer", Kind.KTRAIN, nbytes, restore, raw, before=capture),
        ]
        return Outcome(proofs, measure(steps, bench.sizes.repeats))


CASE = Case(
    "restore_peer",
    "How long does a restore take whose node lost its memory: pull, prove, load into live tensors?",
    "bytes / rate of Ray's own get, then one proof and one copy: two passes over memory",
    _run,
)
