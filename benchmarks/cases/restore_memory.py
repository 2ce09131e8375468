"""How long does a restore from the own volume take, proven, into live tensors?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.bench import Bench
from benchmarks.harness import Bytes, Case, Kind, Measured, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import Restored, Snapshotter, large
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy

_TENSORS = "plain copy into the same live tensors"


def _run(bench: Bench) -> Outcome:
    return run_with(bench, large(bench))


def run_with(bench: Bench, snapshots: Snapshotter) -> Outcome:
    """Restores the newest snapshot, beside plain copies: of warm memory, of the slot as it is opened, and of tensors.

    A process that restores has just begun, so it maps the slot anew; what that costs, no copy can spare. The tensors
    are the very ones that the restore fills, and lie where torch put them: each by itself, in small pages, while the
    target of the first two is one buffer in huge ones.
    """
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
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        plain, opened, tensors = f"memcpy, {label}", f"open and memcpy, {label}", f"{_TENSORS}, {label}"
        name = f"restore from memory, {label}"
        steps += [
            Step(plain, Kind.BASELINE, nbytes, partial(memcpy, target, source, threads)),
            Step(opened, Kind.BASELINE, nbytes, partial(_open_and_copy, snapshots, target, threads), plain),
            Step(tensors, Kind.BASELINE, nbytes, partial(restored.copy_plainly, threads), plain),
            Step(name, Kind.KTRAIN, nbytes, partial(restored.load, copy), plain),
        ]
        parts[name] = restored
    return Outcome(proofs, _with_parts(measure(steps, bench.sizes.repeats), parts, bench.sizes.repeats))


def _open_and_copy(snapshots: Snapshotter, target: Bytes, num_threads: int) -> None:
    with snapshots.volume.open(0, snapshots.identity) as slot:
        source = np.frombuffer(slot.memory, dtype=np.uint8)
        memcpy(target, source, num_threads)
        del source  # a slot that is looked at cannot be closed


def _with_parts(rows: Sequence[Measured], parts: dict[str, Restored], repeats: int) -> list[Measured]:
    """Behind each restore its share of the other plain copies, and what its phases took."""
    found: list[Measured] = []
    for row in rows:
        found.append(row)
        if row.name in parts:
            label = row.name.rpartition(", ")[2]
            for beside in ("open and memcpy", _TENSORS):
                baseline = f"{beside}, {label}"
                found.append(Measured(f"the same, beside {baseline}", row.kind, row.nbytes, row.seconds, baseline))
            for phase, seconds in parts[row.name].phases.items():
                found.append(Measured(f"- {phase}, {label}", Kind.KTRAIN, 0, tuple(seconds[-repeats:])))
    return found


CASE = Case(
    "restore_memory",
    "How long does a restore from the own volume take, proven, into live tensors?",
    "every byte is read once and written once: bytes / memcpy with as many threads",
    _run,
)
