"""How long does training stand while other libraries bring the same state into memory-backed files?

For orientation. They write new files each time, which is how they are used; ktrain uses its slots again.
"""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import large

State = dict[str, torch.Tensor]


def _run(bench: Bench) -> Outcome:
    snapshots = large(bench)
    snapshots.num_threads = bench.threads
    proofs = Proofs()
    snapshots.prove(proofs)
    state: State = {name: value.detach() for name, value in snapshots.module.state_dict().items()}
    folder = bench.volume_root / "peers"
    folder.mkdir(exist_ok=True)
    pickled, flat, spread = folder / "torch.pt", folder / "flat.safetensors", folder / "dcp"
    torch.save(state, pickled)
    proofs.true("torch.save's file gives the state back", _equal(torch.load(pickled, weights_only=True), state))
    save_file(state, flat)
    proofs.true("save_file's file gives the state back", _equal(load_file(flat), state))
    _dcp_save(state, spread)
    proofs.true("torch.distributed.checkpoint gives the state back", _equal(_dcp_load(state, spread), state))
    _remove(folder)
    nbytes = snapshots.nbytes
    source, target = bench.buffers(nbytes)
    clean = partial(_remove, folder)
    plain = "memcpy"
    steps = [
        Step(plain, Kind.BASELINE, nbytes, lambda: memcpy(target, source, bench.threads)),
        Step("ktrain capture", Kind.KTRAIN, nbytes, snapshots.capture, plain),
        Step("safetensors save_file", Kind.PEER, nbytes, lambda: save_file(state, flat), plain, after=clean),
        Step("torch.save", Kind.PEER, nbytes, lambda: torch.save(state, pickled), plain, after=clean),
        Step("torch.distributed.checkpoint", Kind.PEER, nbytes, lambda: _dcp_save(state, spread), plain, after=clean),
    ]
    return Outcome(proofs, measure(steps, bench.sizes.repeats))


def _dcp_save(state: State, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process without a process group is meant
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)


def _dcp_load(state: State, folder: Path) -> State:
    import torch.distributed.checkpoint as dcp

    found = {name: torch.zeros_like(value) for name, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def _equal(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


CASE = Case(
    "peers",
    "How long does training stand while other libraries bring the same state into memory-backed files?",
    "bytes / memcpy with as many threads",
    _run,
)
