"""How long does a snapshot of large tensors take into a warm slot, digests and seal included?"""

from __future__ import annotations

from functools import partial

from benchmarks.bench import Bench
from benchmarks.harness import Case, Figure, Kind, Measured, Outcome, Proofs, Step, Unit, measure, memcpy
from benchmarks.snapshots import Snapshotter, large


def _run(bench: Bench) -> Outcome:
    return run_with(bench, large(bench))


def run_with(bench: Bench, snapshots: Snapshotter) -> Outcome:
    """The same question for any state."""
    proofs = Proofs()
    snapshots.prove(proofs)
    nbytes = snapshots.nbytes
    source, target = bench.buffers(nbytes)
    rows: list[Measured] = []
    for num_threads in sorted({1, bench.threads}):
        threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
        snapshots.num_threads = num_threads
        plain = f"memcpy, {threads}"
        steps = [
            Step(plain, Kind.BASELINE, nbytes, partial(memcpy, target, source, num_threads)),
            Step(f"capture, {threads}", Kind.KTRAIN, nbytes, snapshots.capture, plain),
        ]
        snapshots.parts.clear()
        rows += measure(steps, bench.sizes.repeats)
        parts = snapshots.parts
        for name, part_nbytes, seconds in (
            ("plan_save", 0, parts.plan_s),
            ("acquire", 0, parts.acquire_s),
            ("stage", nbytes, parts.stage_s),
            ("seal", 0, parts.seal_s),
        ):
            beside = plain if part_nbytes else None
            rows.append(Measured(f"- {name}, {threads}", Kind.KTRAIN, part_nbytes, tuple(seconds[1:]), beside))
    snapshots.prove(proofs)
    return Outcome(proofs, rows, [Figure("metadata of each tensor, header included", _metadata(snapshots), Unit.BYTES)])


def _metadata(snapshots: Snapshotter) -> float:
    """Bytes per tensor of the manifest file and of the payload's header with its padding."""
    manifest = snapshots.manifest()
    header = min(entry.begin for entry in manifest.entries)
    return (len(manifest.to_bytes()) + header) / len(manifest.entries)


CASE = Case(
    "capture",
    "How long does a snapshot of large tensors take into a warm slot, with digests and seal?",
    "every byte is read once and written once: bytes / memcpy with as many threads",
    _run,
)
