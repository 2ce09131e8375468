"""How long does a restore from the own volume take, proven, into live tensors?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Measured, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import Restored, large
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy


def _run(bench: Bench) -> Outcome:
    snapshots = large(bench)
    proofs = Proofs()
    snapshots.prove(proofs)
    copy = Copy(contract.TIER_MEMORY, "node-0", 0, snapshots.identity)
    nbytes = snapshots.nbytes
    source, target = bench.buffers(nbytes)
    steps: list[Step] = []
    parts: dict[str, Restored] = {}
    for threads in sorted({1, bench.threads}):
        restored = Restored(snapshots, run_url=str(bench.work_dir / "unused"), num_threads=threads)
        restored.prove(copy, proofs)
        label = f"{threads} thread" + ("s" if threads > 1 else "")
        plain, name = f"memcpy, {label}", f"restore from memory, {label}"
        steps.append(Step(plain, Kind.BASELINE, nbytes, partial(memcpy, target, source, threads)))
        steps.append(Step(name, Kind.KTRAIN, nbytes, partial(restored.load, copy), plain))
        parts[label] = restored
    rows = measure(steps, bench.sizes.repeats)
    return Outcome(proofs, _with_parts(rows, parts, bench.sizes.repeats))


def _with_parts(rows: Sequence[Measured], parts: dict[str, Restored], repeats: int) -> list[Measured]:
    """Behind each restore what its phases took."""
    found: list[Measured] = []
    for row in rows:
        found.append(row)
        if row.kind is Kind.KTRAIN:
            label = row.name.rpartition(", ")[2]
            for phase, seconds in parts[label].phases.items():
                found.append(Measured(f"- {phase}, {label}", Kind.KTRAIN, 0, tuple(seconds[-repeats:])))
    return found


CASE = Case(
    "restore_memory",
    "How long does a restore from the own volume take, proven, into live tensors?",
    "every byte is read once and written once: bytes / memcpy with as many threads",
    _run,
)
