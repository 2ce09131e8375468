"""How fast are the digest, the copy that digests, and the gather, beside a plain memcpy with as many threads?

Every function is verified before it is timed; a fast wrong answer is no result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ktrain import native

DEFAULT_NBYTES = 1 << 30
CHUNK_NBYTES = 16 << 20
HOT_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: the best and the median of the repetitions, in bytes per second of source read."""

    case: str
    num_threads: int
    nbytes: int
    best_bytes_per_s: float
    median_bytes_per_s: float


def measure_native(
    *, nbytes: int = DEFAULT_NBYTES, threads: tuple[int, ...] = (1, 2), repeats: int = 7
) -> list[Row]:
    """Returns rows for the digest of hot and cold bytes, and for copies of cold bytes, per number of threads.

    Uses two buffers of `nbytes`. Cold means far larger than the caches, which is what snapshots are.
    """
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    target = np.zeros_like(source)
    _verify(source, target)
    rows = []
    hot = source[:HOT_NBYTES]
    for variant in native.variants():
        work = partial(native.crc64_with, variant, hot)
        times = [_seconds(work) for _ in range(50 * repeats)]
        rows.append(_row(f"digest-hot-{variant}", 1, hot.nbytes, times))
    large, small = _columns(source, 32 << 20), _columns(source, 10_000)
    for num_threads in threads:
        how = {"chunk_nbytes": CHUNK_NBYTES, "num_threads": num_threads}
        cases: dict[str, Callable[[], object]] = {
            "digest": partial(native.digest_chunks, source, **how),
            "memcpy": partial(_memcpy, target, source, num_threads),
            "copy-digest": partial(native.copy_digest, target, source, **how),
            "gather-digest-32MiB": partial(native.gather_digest, target, large, **how),
            "gather-digest-10kB": partial(native.gather_digest, target, small, **how),
        }
        # Interleaved, so that a neighbour's load falls on all cases alike.
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, case in cases.items():
                taken[name].append(_seconds(case))
        rows += [_row(name, num_threads, nbytes, times) for name, times in taken.items()]
    return rows


def _verify(source: np.ndarray, target: np.ndarray) -> None:
    expected = [
        native.crc64_with("portable", source[i : i + CHUNK_NBYTES])
        for i in range(0, source.nbytes, CHUNK_NBYTES)
    ]
    columns = _columns(source, 10_000)
    for digests in (
        native.copy_digest(target, source, chunk_nbytes=CHUNK_NBYTES, num_threads=2),
        native.digest_chunks(source, chunk_nbytes=CHUNK_NBYTES, num_threads=2),
    ):
        if digests != expected or not np.array_equal(target, source):
            raise AssertionError("copy or digest is wrong; nothing was measured")
    target[:] = 0
    if native.gather_digest(target, columns, chunk_nbytes=CHUNK_NBYTES, num_threads=2) != expected:
        raise AssertionError("gather is wrong; nothing was measured")
    if not np.array_equal(target, source):
        raise AssertionError("gather is wrong; nothing was measured")


def _columns(source: np.ndarray, piece_nbytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.arange(0, source.nbytes, piece_nbytes, dtype=np.int64)
    return offsets + source.ctypes.data, np.minimum(piece_nbytes, source.nbytes - offsets), offsets


def _memcpy(target: np.ndarray, source: np.ndarray, num_threads: int) -> None:
    """numpy's copy of contiguous bytes is one memcpy without the GIL."""
    bounds = np.linspace(0, source.nbytes, num_threads + 1).astype(int)
    parts = [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]
    others = [threading.Thread(target=np.copyto, args=(target[part], source[part])) for part in parts[1:]]
    for thread in others:
        thread.start()
    np.copyto(target[parts[0]], source[parts[0]])
    for thread in others:
        thread.join()


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _row(case: str, num_threads: int, nbytes: int, times: list[float]) -> Row:
    return Row(case, num_threads, nbytes, nbytes / min(times), nbytes / sorted(times)[len(times) // 2])


def main() -> None:
    for row in measure_native():
        best, median = row.best_bytes_per_s / 1e9, row.median_bytes_per_s / 1e9
        print(f"{row.case:22} threads {row.num_threads}  best {best:6.1f} GB/s  median {median:6.1f} GB/s")


if __name__ == "__main__":
    main()
