"""Two ranks at once: the same ways in lock step in two processes, each on a state of its own, one copy thread each.

A rank's parameters are those of its pipeline stage, so every byte belongs to one rank and nobody can spare any. A way's
time in a round is that of the slower rank. `cases.two_ranks` runs this module, one process per rank.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks import dcp
from benchmarks.bench import FULL, QUICK, TINY, Bench
from benchmarks.harness import Found, Kind, Measured, Outcome, Proofs, Step, measure, memcpy, to_json
from benchmarks.snapshots import Restored, Snapshotter, Tensors
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy
from ktrain.snapshot.arena import NodeVolume

NUM_RANKS = 2
PLAIN = "memcpy, 1 thread per rank"
SIZES = {sizes.name: sizes for sizes in (FULL, QUICK, TINY)}
_NUM_SLOTS = 2
_PLAIN_NBYTES = 256 << 20  # of the plain copy: far over every cache, and memory is short with two ranks and their peers


def main(rank: int, port: int, sizes_name: str, shared: Path) -> None:
    """Measures one rank; writes `rank-<n>.json` into the shared folder."""
    torch.set_num_threads(1)
    with Bench(SIZES[sizes_name], disk=shared, memory=shared) as bench, dcp.process_group(rank, NUM_RANKS, port):
        outcome = _measure(bench, rank, shared)
    found = Found("two_ranks", "", "", outcome)
    (shared / f"rank-{rank}.json").write_text(json.dumps(to_json(found)))


def _measure(bench: Bench, rank: int, shared: Path) -> Outcome:
    """ktrain beside a plain copy, then the others beside one: the files of all would not fit into memory together."""
    sizes, proofs = bench.sizes, Proofs()
    num, nbytes_each = sizes.rank_tensors, sizes.rank_nbytes // sizes.rank_tensors
    module = Tensors(num, nbytes_each, seed=rank + 1, first=rank * num)
    source, target = bench.buffers(min(sizes.rank_nbytes, _PLAIN_NBYTES))
    copy = partial(memcpy, target, source, 1)
    volume = NodeVolume(bench.volume_root, node=f"node-{rank}", run="ranks")
    try:
        rows = _in_step(_ktrain(bench, module, volume, copy, source.nbytes, proofs), sizes.repeats)
    finally:
        volume.remove()
    plain = f"{PLAIN}, beside the others"
    others = _peers(bench, module, plain, shared, proofs)
    rows += _in_step([Step(plain, Kind.BASELINE, source.nbytes, copy), *others], sizes.repeats)
    return Outcome(proofs, rows)


def _in_step(steps: list[Step], repeats: int) -> list[Measured]:
    """No rank begins a way before both have ended the one before."""
    for step in steps:
        step.before = dist.barrier
    return measure(steps, repeats)


def _ktrain(  # noqa: PLR0913 -- the parts of one rank
    bench: Bench, module: Tensors, volume: NodeVolume, copy: Callable[[], None], copy_nbytes: int, proofs: Proofs
) -> list[Step]:
    snapshots = Snapshotter(module, volume, num_threads=1, num_slots=_NUM_SLOTS)
    snapshots.prepare()
    snapshots.capture()
    snapshots.prove(proofs)
    restored = Restored(snapshots, run_url=str(bench.work_dir / "unused"))
    restored.prove(Copy(contract.TIER_MEMORY, volume.node, 0, snapshots.identity), proofs)

    def restore() -> None:
        restored.load(Copy(contract.TIER_MEMORY, volume.node, 0, snapshots.identity))

    return [
        Step(PLAIN, Kind.BASELINE, copy_nbytes, copy),
        Step("capture, sealed", Kind.KTRAIN, snapshots.nbytes, snapshots.capture, PLAIN),
        Step("restore from memory, proven", Kind.KTRAIN, snapshots.nbytes, restore, PLAIN),
    ]


def _peers(bench: Bench, module: Tensors, plain: str, shared: Path, proofs: Proofs) -> list[Step]:
    """safetensors and torch.save with a file per rank, DCP with one checkpoint of both; in memory-backed files."""
    state = {name: value.detach() for name, value in module.state_dict().items()}
    live = {name: torch.zeros_like(value) for name, value in state.items()}
    own, both = bench.volume_root, shared / "dcp"
    nbytes = sum(value.nbytes for value in state.values())
    flat, new, pickled = own / "flat.safetensors", own / "new.safetensors", own / "torch.pt"

    def step(name: str, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> Step:
        return Step(name, Kind.PEER, nbytes, work, plain, after=after)

    def load_flat() -> None:
        for name, value in load_file(flat).items():
            live[name].copy_(value)

    def clean() -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(both / "new")
        dist.barrier()

    save_file(state, flat)
    load_flat()
    _prove("safetensors gives the state back", live, state, proofs)
    torch.save(state, pickled)
    _prove("torch.save gives the state back", torch.load(pickled, weights_only=True, mmap=True), state, proofs)
    pickled.unlink()
    dcp.save(state, both / "kept")
    dcp.load(live, both / "kept")
    _prove("torch DCP gives the state back", live, state, proofs)
    steps = [
        step("safetensors save_file", lambda: save_file(state, new), new.unlink),
        step("safetensors load_file, into live tensors", load_flat),
        step("torch.save", lambda: torch.save(state, pickled), pickled.unlink),
        step("torch DCP save", lambda: dcp.save(state, both / "new"), clean),
        step("torch DCP load", lambda: dcp.load(live, both / "kept")),
    ]
    stager = dcp.stager()
    bench.stack.callback(stager.close)
    for name, how in (("thread", AsyncCheckpointerType.THREAD), ("process", AsyncCheckpointerType.PROCESS)):
        saver = dcp.AsyncSaver(how, stager)
        bench.stack.callback(saver.finish)
        steps.append(_async_step(step, saver, name, state, both / "new", clean))
    return steps


def _async_step(
    step: Callable[..., Step],
    saver: dcp.AsyncSaver,
    name: str,
    state: dcp.State,
    folder: Path,
    clean: Callable[[], None],
) -> Step:
    def until_free() -> None:
        saver.begin(state, folder)
        saver.wait()

    def finish() -> None:
        saver.finish()
        clean()

    return step(f"torch DCP async_save by a {name}, until the state may change", until_free, finish)


def _prove(what: str, found: dcp.State, expected: dcp.State, proofs: Proofs) -> None:
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    proofs.true(what, same)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
