"""How fast does a snapshot get to a local disk, proven before and durable after?"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Bytes, Case, Kind, Outcome, Proofs, Step, as_bytes, measure, memcpy
from benchmarks.snapshots import large

_PIECE_NBYTES = 32 << 20
_BLOCK_NBYTES = 8 << 20
_BORDER_NBYTES = 4096
_NUM_WRITERS = 4


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
        with snapshots.volume.open(0, snapshots.identity) as slot:
            write_directly(plain_file, as_bytes(slot.memory))
        proofs.same("the directly written file is the slot", plain_file.read_bytes(), payload)
        plain_file.unlink()
        slot = bench.stack.enter_context(snapshots.volume.open(0, snapshots.identity))
        pages = as_bytes(slot.memory)
        source, target = bench.buffers(payload.nbytes)
        plain, best = "plain write and fsync", f"plain O_DIRECT, {_NUM_WRITERS} threads, and fsync"
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
            Step(
                best,
                Kind.BASELINE,
                payload.nbytes,
                lambda: write_directly(plain_file, pages),
                "memcpy, 1 thread",
                after=plain_file.unlink,
            ),
            Step("drain to file://", Kind.KTRAIN, payload.nbytes, drain.drain, best, after=drain.remove),
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


def write_directly(path: Path, pages: Bytes) -> None:
    """A new file from whole memory pages, past the page cache, by several threads; on the disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    direct_fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    whole = pages.nbytes // _BORDER_NBYTES * _BORDER_NBYTES
    begins = iter(range(0, whole, _BLOCK_NBYTES))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                begin = next(begins, None)
            if begin is None:
                return
            os.pwrite(direct_fd, memoryview(pages[begin : min(begin + _BLOCK_NBYTES, whole)]), begin)

    try:
        writers = [threading.Thread(target=work) for _ in range(_NUM_WRITERS)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        os.pwrite(fd, memoryview(pages[whole:]), whole)
        os.fsync(fd)
    finally:
        os.close(direct_fd)
        os.close(fd)


CASE = Case(
    "drain_file",
    "How fast does a snapshot get to a local disk, proven before and durable after?",
    "bytes / rate of the faster plain writer; the proof of the slot hides behind the disk",
    _run,
)
