"""The fault matrix as a page: one row for each fault, tier and phase, made from the cells that the tests play."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.faults.elsewhere import ELSEWHERE
from tests.faults.job import NEWEST, OLDER, Alarm, Resumed, Stopped
from tests.faults.matrix import CASES
from tests.faults.model import PHASES, Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations" / "fault-matrix.md"
_TIERS = ("memory", "peer", "disk", "bucket", "all")
_HEAD = """\
# The fault matrix

What can go wrong with a checkpoint, at every point where it can, and what comes of it. This page is made from the tests
by `make fault-matrix`; a test fails when it is stale. Each cell is played in a job of two nodes with one rank each
(`tests/faults/`): it is trained to step {newest} with a checkpoint of step {older} before it, the fault strikes, and
the job is started again. The ranks compare every byte they load, nothing that was good may be gone, and once the fault
is over the next save must reach every tier.

{num_cases} cells, {num_faults} faults. Not noticed: {num_gaps}, [at the end](#not-noticed).

- *Where* is the tier that is struck and the phase: stage (bytes into a slot), seal (the manifest), replicate (to a
  peer), drain (to disk or bucket), commit (the record), collect (retention), restore.
- *Noticed by* names the events, with tier, rank and step, or how it is settled without one. *Ends* names the step and
  where rank 0 and rank 1 read it.
- The test of a cell is `tests/faults/test_matrix.py::test_fault_at_a_point_is_noticed_and_ends_well[...]` with fault,
  tier, phase and point in the brackets; `pytest tests/faults -k` and words of a row run it.
"""
_ELSEWHERE = """
## Shown by real processes

What an in-process job cannot show: locks that die with their process, stopped processes, signals, sockets, real stores.

| Fault | What is done | Test |
|---|---|---|
"""
_GAPS = """
## Not noticed

| Fault | Where | Points | Ends | Why |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    gaps = [case for case in CASES if case.gap]
    faults = dict.fromkeys(case.fault for case in CASES)
    parts = [
        _HEAD.format(newest=NEWEST, older=OLDER, num_cases=len(CASES), num_faults=len(faults), num_gaps=len(gaps)),
        "\n| Fault | Where | Points | Noticed by | Ends |\n|---|---|---|---|---|\n",
        *_rows(case for case in CASES if not case.gap),
        _ELSEWHERE,
        *(f"| {fault} | {where} | `{test}` |\n" for fault, where, test in ELSEWHERE),
        _GAPS,
        *(f"| {c.fault} | {c.tier}, {c.phase} | {c.point} | {_end(c.end)} | {c.gap} |\n" for c in gaps),
    ]
    return "".join(parts)


def _rows(cases: Iterable[Case]) -> Iterator[str]:
    """One row for all points of a fault, tier and phase that are noticed and end alike."""
    groups: dict[tuple[str, str, str, str, str], list[str]] = {}
    for case in sorted(cases, key=lambda case: (case.fault, _TIERS.index(case.tier), PHASES.index(case.phase))):
        key = (case.fault, case.tier, case.phase, _noticed(case), _end(case.end))
        groups.setdefault(key, []).append(case.point)
    for (fault, tier, phase, noticed, end), points in groups.items():
        yield f"| {fault} | {tier}, {phase} | {'; '.join(points)} | {noticed} | {end} |\n"


def _noticed(case: Case) -> str:
    if isinstance(case.end, Stopped) and not case.seen:
        return f"the error of the start: `{case.end.kind}`"
    return "; ".join(map(_alarm, sorted(case.seen, key=str))) or case.how


def _alarm(alarm: Alarm) -> str:
    kind, tier, rank, step = alarm
    where = [tier, None if rank is None else f"rank {rank}", None if step is None else f"step {step}"]
    words = ", ".join(word for word in where if word is not None)
    return f"`{kind}` ({words})" if words else f"`{kind}`"


def _end(end: Resumed | Stopped) -> str:
    if isinstance(end, Stopped):
        return f"stops: `{end.kind}`, nothing deleted"
    return "starts fresh: nothing was saved" if end.step == 0 else f"resumes {end.step} ({', '.join(end.tiers)})"
