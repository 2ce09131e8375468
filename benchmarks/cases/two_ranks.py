"""How fast are snapshot and restore of two ranks at once, beside a plain copy and other libraries on the same state?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import dcp
from benchmarks.bench import Bench
from benchmarks.harness import Case, Measured, Outcome, Proofs, from_json
from benchmarks.ranks import NUM_RANKS

_PATIENCE_S = 400.0


def _run(bench: Bench) -> Outcome:
    shared = bench.volume_root / "ranks"
    shared.mkdir()
    port = dcp.free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(NUM_RANKS):
            arguments = [sys.executable, "-m", "benchmarks.ranks", str(rank), str(port), bench.sizes.name, str(shared)]
            with open(shared / f"rank-{rank}.log", "wb") as log:
                ranks.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
        for rank, process in enumerate(ranks):
            if process.wait(_PATIENCE_S):
                lines = (shared / f"rank-{rank}.log").read_text().strip().splitlines()
                raise RuntimeError(f"rank {rank}: exit code {process.returncode}: {lines[-1] if lines else ''}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return _joined([shared / f"rank-{rank}.json" for rank in range(NUM_RANKS)])


def _joined(paths: Sequence[Path]) -> Outcome:
    """The bytes of all ranks, and of each round the time of the slower one."""
    outcomes = [from_json(json.loads(path.read_text())).outcome for path in paths]
    assert all(outcomes), "a rank that ended well wrote an outcome"
    found = [outcome for outcome in outcomes if outcome is not None]
    rows = []
    for same in zip(*(outcome.rows for outcome in found), strict=True):
        seconds = tuple(max(of_rank) for of_rank in zip(*(row.seconds for row in same), strict=True))
        first = same[0]
        rows.append(Measured(first.name, first.kind, sum(row.nbytes for row in same), seconds, first.beside))
    return Outcome(Proofs(list(dict.fromkeys(said for outcome in found for said in outcome.proofs.said))), rows)


CASE = Case(
    "two_ranks",
    "How fast are snapshot and restore of two ranks at once, one copy thread each, beside other libraries?",
    "every byte is read once and written once: bytes / memcpy with one thread per rank",
    _run,
)
