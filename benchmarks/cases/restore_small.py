"""What do many small tensors add to a restore?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.cases.restore_memory import run_with
from benchmarks.harness import Case, Outcome
from benchmarks.snapshots import small_tensors


def _run(bench: Bench) -> Outcome:
    return run_with(bench, small_tensors(bench))


CASE = Case(
    "restore_small",
    "What do many small tensors add to a restore?",
    "bytes / memcpy; what lies above it is work per tensor (plan and apply: Python)",
    _run,
)
