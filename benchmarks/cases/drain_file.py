"""How fast does a snapshot get to a local disk, proven before and durable after?"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Bytes, Case, Kind, Outcome, Proofs, Step, as_bytes, measure, memcpy
from benchmarks.snapshots import large

_PIECE_NBYTES = 32 << 20


def _run(bench: Bench) -> Outcome:
    snapshots = large(bench)
    proofs = Proofs()
    plain_file = bench.work_dir / "plain"
    with Drain(str(bench.work_dir / "run"), snapshots) as drain:
        drain.drain()
        with snapshots.volume.open(0, snapshots.identity) as slot:
            payload = as_bytes(bytes(slot.memory))
        proofs.same("the drained object is the slot", drain.read(), payload)
        drain.remove()
        write_durably(plain_file, payload)
        proofs.same("the plain file is the slot", plain_file.read_bytes(), payload)
        plain_file.unlink()
        source, target = bench.buffers(payload.nbytes)
        plain = "plain write and fsync"
        steps = [
            Step("memcpy, 1 thread", Kind.BASELINE, payload.nbytes, lambda: memcpy(target, source)),
            Step(
                plain,
                Kind.BASELINE,
                payload.nbytes,
                lambda: write_durably(plain_file, payload),
                "memcpy, 1 thread",
                after=plain_file.unlink,
            ),
            Step("drain to file://", Kind.KTRAIN, payload.nbytes, drain.drain, plain, after=drain.remove),
        ]
        return Outcome(proofs, measure(steps, bench.sizes.repeats))


def write_durably(path: Path, data: Bytes) -> None:
    """A new file, in pieces, on the disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for begin in range(0, data.nbytes, _PIECE_NBYTES):
            piece = memoryview(data[begin : begin + _PIECE_NBYTES])
            while piece.nbytes:
                piece = piece[os.write(fd, piece) :]
        os.fsync(fd)
    finally:
        os.close(fd)


CASE = Case(
    "drain_file",
    "How fast does a snapshot get to a local disk, proven before and durable after?",
    "bytes / rate of write and fsync, after one proof of the slot: bytes / digest",
    _run,
)
