"""How long does a restore from a directory take, proven, into live tensors?"""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Bytes, Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.snapshots import Restored, large


def _run(bench: Bench) -> Outcome:
    snapshots = large(bench)
    proofs = Proofs()
    run = bench.work_dir / "run"
    with Drain(str(run), snapshots) as drain:
        drain.drain()
        copy = drain.copy
        restored = Restored(snapshots, run_url=str(run))
        restored.prove(copy, proofs)
        nbytes = snapshots.nbytes
        _, target = bench.buffers(nbytes)
        read_into(run / drain.payload, target)
        proofs.same("the plain read gives the object", target, drain.read())
        plain = "plain read into warm memory"
        steps = [
            Step(plain, Kind.BASELINE, nbytes, lambda: read_into(run / drain.payload, target)),
            Step("restore from file://", Kind.KTRAIN, nbytes, lambda: restored.load(copy), plain),
        ]
        rows = measure(steps, bench.sizes.repeats)
        drain.remove()
        return Outcome(proofs, rows)


def read_into(path: Path, target: Bytes) -> None:
    """The file's bytes; from the page cache, where they are after a drain."""
    with open(path, "rb", buffering=0) as file:
        view = memoryview(target)
        while view.nbytes and (count := file.readinto(view)):
            view = view[count:]


CASE = Case(
    "restore_file",
    "How long does a restore from a directory take, proven, into live tensors (page cache warm)?",
    "bytes / rate of read; proof and copy are of bytes in the cache",
    _run,
)
