"""How long does training stand for torch's own checkpoints, beside ktrain in the same loop?"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks import dcp
from benchmarks.bench import Bench
from benchmarks.harness import Case, Figure, Kind, Outcome, Proofs, Unit
from benchmarks.ktrain_loop import NAME, ktrain_way
from benchmarks.loop import Loop, Way, median_s, plain_copy, rows_of, take_turns

_CADENCE = 3  # long enough to hold the save, the wait for it, and what follows
_TIMES_THE_COPY = 10
_PLAIN = "plain copy"

PeerWays = Callable[[Bench, Loop, Proofs, ExitStack], Sequence[Way]]


def run_beside(bench: Bench, label: str, peers: PeerWays) -> Outcome:
    """Peers, ktrain and a plain copy take turns in one loop, on the same state."""
    proofs = Proofs()
    with Loop(bench.sizes.loop_nbytes, torch.device("cpu")) as loop:
        nbytes = loop.snapshot_nbytes
        copy = plain_copy(bench, nbytes, loop.device)
        loop.stretch(_TIMES_THE_COPY * median_s(copy, bench.sizes.repeats))
        with ktrain_way(bench, loop, label, every=_CADENCE, proofs=proofs) as (ktrain, _), ExitStack() as stack:
            plain = Way(_PLAIN, Kind.BASELINE, lambda step, due: copy() if due else None)
            ways = [plain, ktrain, *peers(bench, loop, proofs, stack)]
            blocks = take_turns(loop, ways, num_steps=_CADENCE, repeats=bench.sizes.repeats)
    medians = {name: statistics.median(block.taken_s for block in taken) for name, taken in blocks.items()}
    fastest = min((way.name for way in ways if way.kind is Kind.PEER), key=lambda name: medians[name])
    factor = statistics.median(
        peer.taken_s / ours.taken_s for peer, ours in zip(blocks[fastest], blocks[NAME], strict=True)
    )
    figures = [
        Figure("the fastest peer's stall, of ktrain's", factor, Unit.TIMES),
        Figure(f"the stall of {fastest}, the fastest peer", medians[fastest], Unit.SECONDS),
        Figure("ktrain's stall", medians[NAME], Unit.SECONDS),
    ]
    return Outcome(proofs, rows_of(ways, blocks, f"{_PLAIN}: taken from the loop", nbytes), figures)


def way_of(name: str, begin: Callable[[int], object], **others: Callable[[], object]) -> Way:
    """A peer that does something only when a save is due."""
    return Way(name, Kind.PEER, lambda step, due: begin(step) if due else None, **others)


def _torch_ways(bench: Bench, loop: Loop, proofs: Proofs, stack: ExitStack) -> list[Way]:
    stack.enter_context(dcp.process_group())
    state, folder = loop.state(), bench.volume_root / "stall-dcp"
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    ways = [way_of("torch DCP save", lambda step: dcp.save(state, folder / "new"), finish=lambda: _remove(folder))]
    savers = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}
    stager = dcp.stager()
    stack.callback(stager.close)
    for name, how in savers.items():
        saver = dcp.AsyncSaver(how, stager)
        stack.callback(saver.finish)
        _prove(saver, state, folder, name, proofs)
        ways.append(_async_way(saver, state, folder, name))
    return ways


def _async_way(saver: dcp.AsyncSaver, state: dcp.State, folder: Path, name: str) -> Way:
    def finish() -> None:
        saver.finish()
        _remove(folder)

    begin = lambda step: saver.begin(state, folder / "new")  # noqa: E731
    return way_of(f"torch DCP async_save, {name}", begin, wait=saver.wait, finish=finish)


def _prove(saver: dcp.AsyncSaver, state: dcp.State, folder: Path, name: str, proofs: Proofs) -> None:
    saver.begin(state, folder / "new")
    saver.finish()
    found = {key: torch.zeros_like(value) for key, value in state.items()}
    dcp.load(found, folder / "new")
    same = all(torch.equal(found[key], value) for key, value in state.items())
    proofs.true(f"torch DCP gives the state back that its {name} saved", same)
    _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _run(bench: Bench) -> Outcome:
    return run_beside(bench, "peers", _torch_ways)


CASE = Case(
    "stall_peers",
    "How long does training stand for a save: torch's own checkpoints into memory-backed files, ktrain, a plain copy?",
    "a peer that copies in the loop: bytes / memcpy; one that copies beside it: what forward and backward do not hide",
    _run,
)
