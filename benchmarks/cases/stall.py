"""What do memory snapshots every 10 steps take from a training loop, and by how much do they slow it down?

The loop is a user's, plain python. Two lengths of a step: ten times the plain copy of a snapshot, of which the targets
speak, and as short as it gets, where forward and backward cannot hide the copy. Blocks of steps with saves, with a
plain copy in their place, and without either take turns.
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
_BLOCK_STEPS = 10  # at least


def _run(bench: Bench) -> Outcome:
    return run_on(bench, torch.device("cpu"), Proofs())


def run_on(bench: Bench, device: torch.device, proofs: Proofs, *, capture: str = "hidden") -> Outcome:
    """The same loop on any device; the plain copy is one from that device into warm host memory."""
    long = run_loop(
        bench, device, f"long-{capture}", times=_TIMES_THE_COPY, cadence=CADENCE, proofs=proofs, capture=capture
    )
    short = run_loop(bench, device, f"short-{capture}", times=0, cadence=CADENCE, proofs=proofs, capture=capture)
    rows = [*long.rows, *(renamed(row, ", short steps") for row in short.rows)]
    figures = [Figure(f"{one.name}, short steps", one.value, one.unit) for one in short.figures]
    return Outcome(proofs, rows, [*long.figures, *figures])


def run_loop(  # noqa: PLR0913 -- one loop as a whole
    bench: Bench,
    device: torch.device,
    label: str,
    *,
    times: float,
    cadence: int,
    proofs: Proofs,
    capture: str = "hidden",
) -> Outcome:
    """One loop whose steps take at least `times` as long as the copy, saved every `cadence` steps."""
    num_steps = -(-_BLOCK_STEPS // cadence) * cadence
    with Loop(bench.sizes.loop_nbytes, device) as loop:
        nbytes = loop.snapshot_nbytes
        copy = plain_copy(bench, nbytes, device)
        copy_s = median_s(copy, bench.sizes.repeats)
        step_s = loop.stretch(times * copy_s)
        with ktrain_way(bench, loop, label, every=cadence, proofs=proofs, capture=capture) as (ktrain, saves):
            plain = Way(_PLAIN, Kind.BASELINE, lambda step, due: copy() if step % cadence == 0 else None)
            ways = [NO_SAVE, plain, ktrain]
            blocks = take_turns(loop, ways, num_steps=num_steps, repeats=bench.sizes.num_saves)
        figures = [
            *_figures(blocks, num_steps, num_steps // cadence),
            Figure("a step, of the plain copy", step_s / copy_s, Unit.TIMES),
            Figure("saves that were skipped, since the one before was not sealed", len(saves.skipped), Unit.COUNT),
        ]
        return Outcome(proofs, rows_of(ways, blocks, f"{_PLAIN}: taken from the loop", nbytes), figures)


def _figures(blocks: dict[str, list[Block]], num_steps: int, num_saves: int) -> list[Figure]:
    whole = [block.whole_s for block in blocks[NO_SAVE.name]]
    step_s = statistics.median(whole) / num_steps
    taken_s = statistics.median(block.taken_s for block in blocks[NAME]) / num_saves
    slowed = [ours.whole_s / without - 1 for ours, without in zip(blocks[NAME], whole, strict=True)]
    copied = [plain.whole_s / without - 1 for plain, without in zip(blocks[_PLAIN], whole, strict=True)]
    return [
        Figure("taken from the loop by a save", taken_s, Unit.SECONDS),
        Figure("taken from the loop by a save, of the time of one step", taken_s / step_s, Unit.SHARE),
        Figure("the loop slowed down", statistics.median(slowed), Unit.SHARE),
        Figure("the loop slowed down by a plain copy in its place", statistics.median(copied), Unit.SHARE),
    ]


def renamed(row: Measured, suffix: str) -> Measured:
    """The row under a longer name, with its baseline's."""
    beside = row.beside if row.beside is None else row.beside + suffix
    return Measured(row.name + suffix, row.kind, row.nbytes, row.seconds, beside)


CASE = Case(
    "stall",
    "What do memory snapshots every 10 steps take from a training loop, and by how much do they slow it down?",
    "what forward and backward do not hide of bytes / memcpy with as many threads; processors are shared with them",
    _run,
)
