"""What do memory snapshots every 10 steps take from a training loop, and by how much do they slow it down?

The loop is a user's, plain python. Two lengths of a step: ten times the plain copy of a snapshot, of which the targets
speak, and as short as it gets, where forward and backward cannot hide the copy. Blocks of 10 steps with a save, with a
plain copy in its place, and without either take turns.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.bench import Bench
from benchmarks.harness import Case, Figure, Kind, Measured, Outcome, Proofs, Unit
from benchmarks.ktrain_loop import NAME, ktrain_way
from benchmarks.loop import NO_SAVE, Block, Loop, Way, median_s, plain_copy, rows_of, take_turns

CADENCE = 10
_PLAIN = "plain copy"
_TIMES_THE_COPY = 10


def _run(bench: Bench) -> Outcome:
    return run_on(bench, torch.device("cpu"))


def run_on(bench: Bench, device: torch.device) -> Outcome:
    """The same loop on any device; the plain copy is one from that device into warm host memory."""
    proofs = Proofs()
    rows: list[Measured] = []
    figures: list[Figure] = []
    for label, times in (("long", _TIMES_THE_COPY), ("short", 0)):
        found, derived = run_loop(bench, device, label, times=times, cadence=CADENCE, proofs=proofs)
        suffix = "" if label == "long" else ", short steps"
        rows += [_renamed(row, suffix) for row in found]
        figures += [Figure(figure.name + suffix, figure.value, figure.unit) for figure in derived]
    return Outcome(proofs, rows, figures)


def run_loop(
    bench: Bench, device: torch.device, label: str, *, times: float, cadence: int, proofs: Proofs
) -> tuple[list[Measured], list[Figure]]:
    """One loop whose steps take at least `times` as long as the copy."""
    with Loop(bench.sizes.loop_nbytes, device) as loop:
        nbytes = loop.snapshot_nbytes
        copy = plain_copy(bench, nbytes, device)
        copy_s = median_s(copy, bench.sizes.repeats)
        step_s = loop.stretch(times * copy_s)
        with ktrain_way(bench, loop, label, every=cadence, proofs=proofs) as ktrain:
            plain = Way(_PLAIN, Kind.BASELINE, lambda step, due: copy() if due else None)
            ways = [NO_SAVE, plain, ktrain]
            blocks = take_turns(loop, ways, num_steps=cadence, repeats=bench.sizes.num_saves)
        rows = rows_of(ways, blocks, f"{_PLAIN}: taken from the loop", nbytes)
        return rows, [*_figures(blocks, cadence), Figure("step, of the plain copy", step_s / copy_s, Unit.TIMES)]


def _figures(blocks: dict[str, list[Block]], cadence: int) -> list[Figure]:
    whole = [block.whole_s for block in blocks[NO_SAVE.name]]
    step_s = statistics.median(whole) / cadence
    taken_s = statistics.median(block.taken_s for block in blocks[NAME])
    slowed = [ours.whole_s / without - 1 for ours, without in zip(blocks[NAME], whole, strict=True)]
    copied = [plain.whole_s / without - 1 for plain, without in zip(blocks[_PLAIN], whole, strict=True)]
    return [
        Figure("taken from the loop by a save", taken_s, Unit.SECONDS),
        Figure("taken from the loop by a save, of the time of one step", taken_s / step_s, Unit.SHARE),
        Figure("the loop slowed down", statistics.median(slowed), Unit.SHARE),
        Figure("the loop slowed down by a plain copy in its place", statistics.median(copied), Unit.SHARE),
    ]


def _renamed(row: Measured, suffix: str) -> Measured:
    beside = row.beside if row.beside is None else row.beside + suffix
    return Measured(row.name + suffix, row.kind, row.nbytes, row.seconds, beside)


CASE = Case(
    "stall",
    "What do memory snapshots every 10 steps take from a training loop, and by how much do they slow it down?",
    "what forward and backward do not hide of bytes / memcpy with as many threads; processors are shared with them",
    _run,
)
