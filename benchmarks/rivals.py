"""Other fault-tolerance libraries beside ktrain, on the same state in the same rounds.

Each wants versions of its own, so it runs in an environment of its own, which `make rivals` lays over ktrain's. A whole
run of the benchmarks takes along the ones whose environments exist.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import FULL, Bench, Sizes
from benchmarks.cases.stall_peers import PeerWays, run_beside, way_of
from benchmarks.harness import Case, Found, Kind, Outcome, Proofs, Step, from_json, measure, memcpy, run
from benchmarks.loop import Loop, Way
from benchmarks.snapshots import Restored, Snapshotter, large
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy

State = dict[str, torch.Tensor]
_SHM = Path("/dev/shm")  # noqa: S108 -- where DLRover puts its segments
_DLROVER_SOCKETS = Path("/tmp/ckpt_sock")  # noqa: S108 -- where DLRover puts its own
_DLROVER_RUN = f"ktrain-bench-{os.getpid()}"
_BASELINE = "memcpy, 1 thread"
_ROOT = Path(__file__).parents[1]
_PATIENCE_S = 240.0
_START_S = 30.0


@dataclass(frozen=True, slots=True)
class Rival:
    """One other library: what to import, its saves and restores beside ktrain's, and its saves from a training loop."""

    package: str
    title: str
    beside: Callable[[Bench], Outcome]
    ways: PeerWays


def run_here(name: str, sizes: Sizes = FULL) -> list[Found] | str:
    """Measures one rival in this process; where it is not installed, says in one line how it gets there."""
    rival = RIVALS[name]
    try:
        importlib.import_module(rival.package)
    except ImportError as error:
        return f"{name}: {error}; use `make bench-rival RIVAL={name}`"
    told = f"{rival.title} {importlib.metadata.version(name)}"
    cases = [
        Case(name, f"How long do a save and a restore of the same state take: {told}?", "bytes / memcpy", rival.beside),
        Case(
            f"stall_{name}",
            f"How long does training stand for a save: {told}, ktrain, a plain copy?",
            "a peer that copies in the loop: bytes / memcpy",
            partial(run_beside, label=name, peers=rival.ways),
        ),
    ]
    found = []
    with _nothing_left():
        for case in cases:
            with Bench(sizes) as bench:
                found.append(run(case, bench))
    return found


def run_apart(name: str, *, quick: bool) -> list[Found] | str:
    """Measures one rival in its own environment, in a process of its own; one line where there is none, or it fails."""
    python = _ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        return "not installed for this run; `make rivals` makes its environment"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [python, "-m", "benchmarks", "--rival", name, "--json", path, *(["--quick"] if quick else [])]
        try:
            ended = subprocess.run(command, cwd=_ROOT, timeout=_PATIENCE_S, check=False, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return f"did not end within {_PATIENCE_S:g} s"
        if not path.exists():
            return f"ended with exit code {ended.returncode} and no outcome"
        return [from_json(value) for value in json.loads(path.read_text())]


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """Ends what a library leaves: processes of ours, and the segments and sockets of DLRover under this run's name."""
    import psutil  # type: ignore[import-untyped]

    try:
        yield
    finally:
        for path in _SHM.glob(f"{_DLROVER_RUN}*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(_DLROVER_SOCKETS / _DLROVER_RUN, ignore_errors=True)
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


def _dlrover_checkpointer(bench: Bench) -> Any:
    # Its own launcher keeps the saver in the agent; here it lives in this process, and nothing is forked.
    os.environ["ROLE_NAME"] = "dlrover-trainer"
    os.environ["TORCHELASTIC_RUN_ID"] = _DLROVER_RUN  # else it would talk to the sockets that another run left
    from dlrover.python.elastic_agent.torch.ckpt_saver import (  # type: ignore[import-not-found]
        AsyncCheckpointSaver,
    )
    from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer  # type: ignore[import-not-found]

    logging.disable(logging.INFO)
    AsyncCheckpointSaver.start_async_saving_ckpt()
    factory = _DLROVER_SOCKETS / _DLROVER_RUN / "sharedqueue_factory.sock"
    deadline = time.monotonic() + _START_S
    while not factory.exists():  # its checkpointer does not wait for its saver
        if time.monotonic() > deadline:
            raise TimeoutError(f"DLRover's saver did not start within {_START_S:g} s")
        time.sleep(0.02)
    return DdpCheckpointer(str(bench.work_dir / "dlrover"))


class _Dlrover:
    """Its flash checkpoint of a flat state, in memory alone."""

    def __init__(self, bench: Bench, state: State) -> None:
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType  # type: ignore[import-not-found]

        self._checkpointer = bench.once("dlrover", lambda: _dlrover_checkpointer(bench))
        self._memory = StorageType.MEMORY
        self._state = state
        self._numbers = iter(range(1, 1_000_000))
        self.live = {name: torch.empty_like(value) for name, value in state.items()}

    def save(self) -> None:
        self._checkpointer.save_checkpoint(next(self._numbers), self._state, storage_type=self._memory)

    def restore(self) -> None:
        for name, value in self._checkpointer.load_checkpoint().items():
            self.live[name].copy_(value)

    def prove(self, proofs: Proofs) -> None:
        self.save()
        self.restore()
        proofs.true("DLRover gives the state back from its shared memory", _equal(self.live, self._state))


def _dlrover(bench: Bench) -> Outcome:
    snapshots, proofs = large(bench), Proofs()
    snapshots.prove(proofs)
    rival = _Dlrover(bench, _state(snapshots))
    rival.prove(proofs)
    steps = [
        _step("DLRover flash checkpoint: save to memory", snapshots.nbytes, rival.save),
        _step("DLRover flash checkpoint: restore from memory, unproven", snapshots.nbytes, rival.restore),
    ]
    return _beside(bench, snapshots, steps, proofs)


def _dlrover_ways(bench: Bench, loop: Loop, proofs: Proofs, stack: contextlib.ExitStack) -> list[Way]:
    del stack
    rival = _Dlrover(bench, loop.state())
    rival.prove(proofs)
    return [way_of("DLRover flash checkpoint to memory", lambda step: rival.save())]


class _Folders:
    """A new folder for each save, and the pending saves in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: list[Callable[[], object]] = []

    def new(self) -> str:
        return str(self._folder / uuid.uuid4().hex)

    def note(self, wait: Callable[[], object]) -> None:
        self._pending.append(wait)

    def finish(self) -> None:
        """Waits for the saves and removes what they wrote."""
        while self._pending:
            self._pending.pop()()
        shutil.rmtree(self._folder, ignore_errors=True)


def _torchsnapshot(bench: Bench) -> Outcome:
    from torchsnapshot import Snapshot, StateDict  # type: ignore[import-not-found]

    logging.disable(logging.INFO)
    snapshots, proofs = large(bench), Proofs()
    snapshots.prove(proofs)
    state, folders = _state(snapshots), _Folders(bench.volume_root / "torchsnapshot")
    app = {"model": StateDict(**state)}
    kept = Snapshot.take(str(bench.volume_root / "kept"), app)
    live = {"model": StateDict(**{name: torch.zeros_like(value) for name, value in state.items()})}
    kept.restore(live)
    proofs.true("torchsnapshot gives the state back", _equal(dict(live["model"]), state))
    steps = [
        _step("torchsnapshot: take", snapshots.nbytes, lambda: Snapshot.take(folders.new(), app), folders.finish),
        _step(
            "torchsnapshot: async_take, until it returns",
            snapshots.nbytes,
            lambda: folders.note(Snapshot.async_take(folders.new(), app).wait),
            folders.finish,
        ),
        _step("torchsnapshot: restore", snapshots.nbytes, lambda: kept.restore(live)),
    ]
    return _beside(bench, snapshots, steps, proofs)


def _torchsnapshot_ways(bench: Bench, loop: Loop, proofs: Proofs, stack: contextlib.ExitStack) -> list[Way]:
    from torchsnapshot import Snapshot, StateDict

    logging.disable(logging.INFO)
    state, folders = loop.state(), _Folders(bench.volume_root / "torchsnapshot")
    app = {"state": StateDict(**state)}
    pending = Snapshot.async_take(folders.new(), app)
    live = {"state": StateDict(**{name: torch.zeros_like(value) for name, value in state.items()})}
    pending.wait().restore(live)
    proofs.true("torchsnapshot gives the state of the loop back", _equal(dict(live["state"]), state))
    folders.finish()
    stack.callback(folders.finish)

    def begin(step: int) -> None:
        folders.note(Snapshot.async_take(folders.new(), app).wait)

    return [way_of("torchsnapshot async_take", begin, finish=folders.finish)]


class _TorchCheckpointing:
    """Its asynchronous saves: staged into shared memory by a thread, written by a process."""

    def __init__(self, folder: Path, state: State) -> None:
        from torch_checkpointing import CheckpointManager  # type: ignore[import-not-found]
        from torch_checkpointing.config import AsyncCheckpointSaverConfig  # type: ignore[import-not-found]
        from torch_checkpointing.storage.filesystem import (  # type: ignore[import-not-found]
            LocalFileSystemStorageConfig,
        )

        logging.disable(logging.INFO)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)  # no memory-backed file system has it
        config = CheckpointManager.Config(save=AsyncCheckpointSaverConfig(), storage_config=storage)
        self.manager = config.build()
        self.folders = _Folders(folder)
        self._state = state
        self.live = {name: torch.zeros_like(value) for name, value in state.items()}
        self.kept = str(folder.with_name("kept"))
        self.manager.prewarm_staging({"state": state})

    def begin(self) -> None:
        """Returns while the copy runs; `wait` before the state changes."""
        self.folders.note(self.manager.save(self.folders.new(), {"state": self._state}).result)

    def wait(self) -> None:
        """As its `lock()` around an optimizer step does."""
        with self.manager.lock():
            return

    def save(self) -> None:
        self.begin()
        self.wait()

    def restore(self) -> None:
        self.manager.load(self.kept, into={"state": self.live}, strict=True)

    def prove(self, proofs: Proofs) -> None:
        self.manager.save(self.kept, {"state": self._state}).result()
        self.restore()
        proofs.true("torch_checkpointing gives the state back", _equal(self.live, self._state))

    def close(self) -> None:
        self.folders.finish()
        self.manager.close()


def _torch_checkpointing(bench: Bench) -> Outcome:
    snapshots, proofs = large(bench), Proofs()
    snapshots.prove(proofs)
    rival = _TorchCheckpointing(bench.volume_root / "new", _state(snapshots))
    bench.stack.callback(rival.close)
    rival.prove(proofs)
    steps = [
        _step(
            "torch_checkpointing: save, until the state may change", snapshots.nbytes, rival.save, rival.folders.finish
        ),
        _step("torch_checkpointing: load, into live tensors", snapshots.nbytes, rival.restore),
    ]
    return _beside(bench, snapshots, steps, proofs)


def _torch_checkpointing_ways(bench: Bench, loop: Loop, proofs: Proofs, stack: contextlib.ExitStack) -> list[Way]:
    rival = _TorchCheckpointing(bench.volume_root / "new", loop.state())
    stack.callback(rival.close)
    rival.prove(proofs)
    begin = way_of("torch_checkpointing save", lambda step: rival.begin(), wait=rival.wait, finish=rival.folders.finish)
    return [begin]


RIVALS = {
    "dlrover": Rival("dlrover", "DLRover's flash checkpoint", _dlrover, _dlrover_ways),
    "torchsnapshot": Rival("torchsnapshot", "torchsnapshot", _torchsnapshot, _torchsnapshot_ways),
    "torch_checkpointing": Rival(
        "torch_checkpointing", "torch_checkpointing", _torch_checkpointing, _torch_checkpointing_ways
    ),
}
