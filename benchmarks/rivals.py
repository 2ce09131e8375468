"""Other fault-tolerance libraries beside ktrain, on the same state in the same rounds.

Each wants versions of its own, so it runs in an environment of its own: `make bench-rival RIVAL=dlrover`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks import report
from benchmarks.bench import FULL, Bench, Sizes
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import Restored, Snapshotter, large
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy

State = dict[str, torch.Tensor]
_SHM = Path("/dev/shm")  # noqa: S108 -- where DLRover puts its segments
_DLROVER_SEGMENTS = "ckpt_shm_*"
_BASELINE = "memcpy, 1 thread"


def main(name: str, sizes: Sizes = FULL, record: Path | None = None) -> int:
    """Measures one rival; returns 2 in one line where it is not installed."""
    case, package = RIVALS[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        print(f"bench-rival: {name}: {error}; use `make bench-rival RIVAL={name}`", file=sys.stderr)
        return 2
    about: dict[str, Any] = {"date": report.today(), "facts": report.facts(), "load_before": report.load()}
    about["note"] = f"{name} {importlib.metadata.version(name)}"
    with _nothing_left(), Bench(sizes) as bench:
        outcome = case.run(bench)
    print(report.section(case, outcome), flush=True)
    about["load_after"] = report.load()
    print(report.describe(about, sizes))
    if record is not None:
        report.write_record(record, sizes, [(case, outcome)], about)
    return 0


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """Ends what a library leaves: processes of ours, and the segments of DLRover that were not there before."""
    before = set(_SHM.glob(_DLROVER_SEGMENTS))
    try:
        yield
    finally:
        for path in set(_SHM.glob(_DLROVER_SEGMENTS)) - before:
            path.unlink(missing_ok=True)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _beside(bench: Bench, snapshots: Snapshotter, steps: list[Step], proofs: Proofs) -> Outcome:
    """The rival's steps in turn with a plain copy, and with ktrain's capture and restore with one thread."""
    source, target = bench.buffers(snapshots.nbytes)
    snapshots.num_threads = 1
    restored = Restored(snapshots, run_url=str(bench.work_dir / "run"))
    copy = Copy(contract.TIER_MEMORY, "node-0", 0, snapshots.identity)
    restored.prove(copy, proofs)
    nbytes = snapshots.nbytes

    def restore() -> None:
        restored.load(Copy(contract.TIER_MEMORY, "node-0", 0, snapshots.identity))

    ours = [
        Step(_BASELINE, Kind.BASELINE, nbytes, lambda: memcpy(target, source, 1)),
        Step("ktrain: capture, sealed", Kind.KTRAIN, nbytes, snapshots.capture, _BASELINE),
        Step("ktrain: restore from memory, proven", Kind.KTRAIN, nbytes, restore, _BASELINE),
    ]
    return Outcome(proofs, measure([*ours, *steps], bench.sizes.repeats))


def _state(snapshots: Snapshotter) -> State:
    return {name: value.detach() for name, value in snapshots.module.state_dict().items()}


def _equal(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _step(name: str, nbytes: int, work: Callable[[], Any], after: Callable[[], Any] | None = None) -> Step:
    def run() -> None:
        work()

    more = {} if after is None else {"after": after}
    return Step(name, Kind.PEER, nbytes, run, _BASELINE, **more)


def _dlrover(bench: Bench) -> Outcome:
    # Its own launcher keeps the saver in the agent; here it lives in this process, and nothing is forked.
    os.environ["ROLE_NAME"] = "dlrover-trainer"
    from dlrover.python.elastic_agent.torch.ckpt_saver import (  # type: ignore[import-not-found]
        AsyncCheckpointSaver,
    )
    from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType  # type: ignore[import-not-found]
    from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer  # type: ignore[import-not-found]

    logging.disable(logging.INFO)
    snapshots, proofs = large(bench), Proofs()
    snapshots.prove(proofs)
    state, number = _state(snapshots), iter(range(1, 1_000_000))
    AsyncCheckpointSaver.start_async_saving_ckpt()
    rival = DdpCheckpointer(str(bench.work_dir / "dlrover"))

    def save() -> None:
        rival.save_checkpoint(next(number), state, storage_type=StorageType.MEMORY)

    live = {name: torch.empty_like(value) for name, value in state.items()}

    def restore() -> None:
        for name, value in rival.load_checkpoint().items():
            live[name].copy_(value)

    save()
    restore()
    proofs.true("DLRover gives the state back from its shared memory", _equal(live, state))
    steps = [
        _step("DLRover flash checkpoint: save to memory", snapshots.nbytes, save),
        _step("DLRover flash checkpoint: restore from memory, unproven", snapshots.nbytes, restore),
    ]
    return _beside(bench, snapshots, steps, proofs)


def _torchsnapshot(bench: Bench) -> Outcome:
    from torchsnapshot import Snapshot, StateDict  # type: ignore[import-not-found]

    logging.disable(logging.INFO)
    snapshots, proofs = large(bench), Proofs()
    snapshots.prove(proofs)
    state, folder = _state(snapshots), bench.volume_root / "torchsnapshot"
    app, pending = {"model": StateDict(**state)}, []

    def path() -> str:
        return str(folder / uuid.uuid4().hex)

    def clean() -> None:
        while pending:
            pending.pop().wait()
        shutil.rmtree(folder, ignore_errors=True)

    kept = Snapshot.take(str(bench.volume_root / "kept"), app)
    live = {"model": StateDict(**{name: torch.zeros_like(value) for name, value in state.items()})}
    kept.restore(live)
    proofs.true("torchsnapshot gives the state back", _equal(dict(live["model"]), state))
    steps = [
        _step("torchsnapshot: take", snapshots.nbytes, lambda: Snapshot.take(path(), app), clean),
        _step(
            "torchsnapshot: async_take, until it returns",
            snapshots.nbytes,
            lambda: pending.append(Snapshot.async_take(path(), app)),
            clean,
        ),
        _step("torchsnapshot: restore", snapshots.nbytes, lambda: kept.restore(live)),
    ]
    return _beside(bench, snapshots, steps, proofs)


_QUESTION = "How long does training stand, and how long does a restore take, beside {} on the same state?"
RIVALS: dict[str, tuple[Case, str]] = {
    "dlrover": (Case("dlrover", _QUESTION.format("DLRover's flash checkpoint"), "bytes / memcpy", _dlrover), "dlrover"),
    "torchsnapshot": (
        Case("torchsnapshot", _QUESTION.format("torchsnapshot"), "bytes / memcpy", _torchsnapshot),
        "torchsnapshot",
    ),
}
