"""How long does a restore from the own volume take, proven, into live tensors?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import Restored, large
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy


def _run(bench: Bench) -> Outcome:
    snapshots = large(bench)
    proofs = Proofs()
    snapshots.prove(proofs)
    restored = Restored(snapshots, run_url=str(bench.work_dir / "unused"))
    copy = Copy(contract.TIER_MEMORY, "node-0", 0, snapshots.identity)
    restored.prove(copy, proofs)
    nbytes = snapshots.nbytes
    source, target = bench.buffers(nbytes)
    plain = "memcpy, 1 thread"
    steps = [
        Step(plain, Kind.BASELINE, nbytes, lambda: memcpy(target, source)),
        Step("restore from memory", Kind.KTRAIN, nbytes, lambda: restored.load(copy), plain),
    ]
    return Outcome(proofs, measure(steps, bench.sizes.repeats))


CASE = Case(
    "restore_memory",
    "How long does a restore from the own volume take, proven, into live tensors?",
    "one proof and one copy, in two passes: bytes / digest + bytes / memcpy",
    _run,
)
