"""How fast are the digest, the copy that digests, and the gather, beside a plain memcpy with as many threads?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.bench import Bench
from benchmarks.harness import Bytes, Case, Figure, Kind, Outcome, Proofs, Step, Unit, measure, memcpy
from ktrain import native

CHUNK_NBYTES = 16 << 20
_HOT_NBYTES = 1 << 20
_HOT_TURNS = 50


def _run(bench: Bench) -> Outcome:
    source, target = bench.buffers(bench.sizes.nbytes)
    proofs = Proofs()
    _prove(source, target, proofs)
    hot = source[:_HOT_NBYTES]
    steps = []
    for variant in native.variants():
        work = partial(_hot, variant, hot)
        steps.append(Step(f"digest of hot bytes, {variant}", Kind.KTRAIN, hot.nbytes * _HOT_TURNS, work))
    large, small = _columns(source, 32 << 20), _columns(source, 10_000)
    for num_threads in sorted({1, bench.threads}):
        threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
        plain = f"memcpy, {threads}"
        how = {"chunk_nbytes": CHUNK_NBYTES, "num_threads": num_threads}
        steps.append(Step(plain, Kind.BASELINE, source.nbytes, partial(memcpy, target, source, num_threads)))
        ways: dict[str, Callable[[], object]] = {
            "digest": partial(native.digest_chunks, source, **how),
            "copy with digest": partial(native.copy_digest, target, source, **how),
            "gather with digest, pieces of 32 MiB": partial(native.gather_digest, target, large, **how),
            "gather with digest, pieces of 10 kB": partial(native.gather_digest, target, small, **how),
        }
        for name, way in ways.items():
            steps.append(Step(f"{name}, {threads}", Kind.KTRAIN, source.nbytes, way, plain))
    rows = measure(steps, bench.sizes.repeats)
    by_name = {row.name: row for row in rows}
    plain, digested = by_name["memcpy, 1 thread"], by_name["copy with digest, 1 thread"]
    added = 1 / digested.share_of(plain) - 1
    return Outcome(proofs, rows, [Figure("added to a copy by its digest, 1 thread", added, Unit.SHARE)])


def _prove(source: Bytes, target: Bytes, proofs: Proofs) -> None:
    expected = [
        native.crc64_with("portable", source[i : i + CHUNK_NBYTES]) for i in range(0, source.nbytes, CHUNK_NBYTES)
    ]
    how = {"chunk_nbytes": CHUNK_NBYTES, "num_threads": 2}
    proofs.true("digest agrees with the portable one", native.digest_chunks(source, **how) == expected)
    target[:] = 0
    proofs.true("copy's digest agrees", native.copy_digest(target, source, **how) == expected)
    proofs.same("the copy with digest is one", target, source)
    target[:] = 0
    proofs.true("gather's digest agrees", native.gather_digest(target, _columns(source, 10_000), **how) == expected)
    proofs.same("the gather is a copy", target, source)


def _columns(source: Bytes, piece_nbytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.arange(0, source.nbytes, piece_nbytes, dtype=np.int64)
    return offsets + source.ctypes.data, np.minimum(piece_nbytes, source.nbytes - offsets), offsets


def _hot(variant: str, hot: Bytes) -> None:
    for _ in range(_HOT_TURNS):
        native.crc64_with(variant, hot)


CASE = Case(
    "native",
    "How fast are digest, copy with digest and gather, beside memcpy with as many threads?",
    "a copy reads and writes every byte once: bytes / memcpy; a digest only reads",
    _run,
)
