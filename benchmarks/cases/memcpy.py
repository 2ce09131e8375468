"""What does this machine's memory give? Every other share is measured beside a copy of its own round."""

from __future__ import annotations

import numpy as np

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure, memcpy


def _run(bench: Bench) -> Outcome:
    source, target = bench.buffers(bench.sizes.nbytes)
    proofs = Proofs()
    target[:] = 0
    memcpy(target, source, 2)
    proofs.same("the plain copy is one", target, source)
    steps = [
        Step("memcpy, 1 thread", Kind.BASELINE, source.nbytes, lambda: memcpy(target, source, 1)),
        Step("memcpy, 2 threads", Kind.BASELINE, source.nbytes, lambda: memcpy(target, source, 2), "memcpy, 1 thread"),
        Step("memcpy into fresh pages", Kind.BASELINE, source.nbytes, lambda: _fresh(source), "memcpy, 1 thread"),
    ]
    return Outcome(proofs, measure(steps, bench.sizes.repeats))


def _fresh(source: np.ndarray) -> None:
    np.copyto(np.empty_like(source), source)


CASE = Case("memcpy", "What does this machine's memory give?", "this is the floor of all others", _run)
