"""Two ranks at once: the same ways in lock step in two processes, each on a state of its own, one copy thread each.

A rank's parameters are those of its pipeline stage, so every byte belongs to one rank and nobody can spare any. A way's
time in a round is that of the slower rank. `cases.two_ranks` runs this module, one process per rank.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks import dcp
from benchmarks.bench import FULL, QUICK, TINY, Bench
from benchmarks.harness import Found, Kind, Outcome, Proofs, Step, measure, memcpy, to_json
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
    sizes, proofs = bench.sizes, Proofs()
    num, nbytes_each = sizes.rank_tensors, sizes.rank_nbytes // sizes.rank_tensors
    module = Tensors(num, nbytes_each, seed=rank + 1, first=rank * num)
    volume = bench.stack.enter_context(NodeVolume(bench.volume_root, node=f"node-{rank}", run="ranks"))
    snapshots = Snapshotter(module, volume, num_threads=1, num_slots=_NUM_SLOTS)
    snapshots.prepare()
    snapshots.capture()
    snapshots.prove(proofs)
    restored = Restored(snapshots, run_url=str(bench.work_dir / "unused"))
    restored.prove(Copy(contract.TIER_MEMORY, volume.node, 0, snapshots.identity), proofs)
    nbytes = snapshots.nbytes
    source, target = bench.buffers(min(nbytes, _PLAIN_NBYTES))

    def restore() -> None:
        restored.load(Copy(contract.TIER_MEMORY, volume.node, 0, snapshots.identity))

    steps = [
        Step(PLAIN, Kind.BASELINE, source.nbytes, lambda: memcpy(target, source, 1)),
        Step("capture, sealed", Kind.KTRAIN, nbytes, snapshots.capture, PLAIN),
        Step("restore from memory, proven", Kind.KTRAIN, nbytes, restore, PLAIN),
        *_peers(bench, snapshots, restored.module, shared, proofs),
    ]
    for step in steps:
        step.before = dist.barrier
    rows = measure(steps, sizes.repeats)
    snapshots.prove(proofs)
    return Outcome(proofs, rows)


def _peers(bench: Bench, snapshots: Snapshotter, into: torch.nn.Module, shared: Path, proofs: Proofs) -> list[Step]:
    """safetensors and torch.save with a file per rank, DCP with one checkpoint of both; in memory-backed files."""
    state = {name: value.detach() for name, value in snapshots.module.state_dict().items()}
    live = {name: value.detach() for name, value in into.state_dict().items()}
    own, both, nbytes = bench.volume_root, shared / "dcp", snapshots.nbytes
    flat, new, pickled = own / "flat.safetensors", own / "new.safetensors", own / "torch.pt"

    def step(name: str, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> Step:
        return Step(name, Kind.PEER, nbytes, work, PLAIN, after=after)

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
