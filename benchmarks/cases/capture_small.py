"""What do many small tensors add to a snapshot?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.cases.capture import run_with
from benchmarks.harness import Case, Outcome
from benchmarks.snapshots import small_tensors


def _run(bench: Bench) -> Outcome:
    return run_with(bench, small_tensors(bench))


CASE = Case(
    "capture_small",
    "What do many small tensors add to a snapshot?",
    "bytes / memcpy; what lies above it is work per tensor (plan_save: Python; seal: the manifest)",
    _run,
)
