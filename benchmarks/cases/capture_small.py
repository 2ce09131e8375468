"""What do many small tensors add to a snapshot?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.cases.capture import run_with
from benchmarks.harness import Case, Outcome
from benchmarks.snapshots import small_tensors

_METADATA_NBYTES = 250  # for each tensor: its share of the manifest and of the payload's header


def _run(bench: Bench) -> Outcome:
    snapshots = small_tensors(bench)
    outcome = run_with(bench, snapshots)
    manifest, layout = snapshots.manifest(), snapshots.plan().layout
    each = [nbytes / len(layout.entries) for nbytes in (len(manifest.to_bytes()), len(layout.header))]
    said = f"metadata of {sum(each):.0f} B for each tensor (manifest {each[0]:.0f} B, header {each[1]:.0f} B)"
    outcome.proofs.true(f"{said} is below {_METADATA_NBYTES} B", sum(each) < _METADATA_NBYTES)
    return outcome


CASE = Case(
    "capture_small",
    "What do many small tensors add to a snapshot?",
    "bytes / memcpy; what lies above it is work per tensor (plan_save: Python; seal: the manifest)",
    _run,
)
