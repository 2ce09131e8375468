"""ktrain as one of the ways to save from a training loop, memory snapshots alone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

import ktrain
from benchmarks.bench import Bench
from benchmarks.harness import Kind, Proofs
from benchmarks.loop import Loop, Way
from ktrain.base import contract
from ktrain.checkpoint.policy import Every

NAME = "ktrain"
_NEVER = 1 << 40  # steps between drains to the bucket: only the first commit and the last step are drained
_PATIENCE_S = 60.0


@contextmanager
def ktrain_way(bench: Bench, loop: Loop, label: str, *, every: int, proofs: Proofs) -> Iterator[Way]:
    """A Checkpointer of the loop's model and optimizer, which saves in memory every so many steps.

    At the end it is proven that no save was skipped, and that the run holds the last step's model.
    """
    run = bench.work_dir / f"loop-{label}-{os.getpid()}"
    saved: list[int] = []
    with _volume_in(bench.volume_root / f"loop-{label}"):
        state = {"model": loop.model, "optimizer": loop.optimizer}
        checkpointer = ktrain.Checkpointer(run, state=state, every=Every(memory=every, bucket=_NEVER))
        try:
            checkpointer.restore()
            loop.arm()

            def commit(step: int, due: bool) -> None:
                checkpointer.step(step)
                if due:
                    saved.append(step)

            yield Way(NAME, Kind.KTRAIN, commit, finish=lambda: _await_commit(checkpointer, saved[-1]))
            checkpointer.close()
        except BaseException:
            checkpointer.close(success=False)
            raise
    _prove(run, loop.model, saved, proofs)


def _await_commit(checkpointer: ktrain.Checkpointer, step: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while checkpointer.committed.get(contract.TIER_MEMORY, -1) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step} was not committed in memory within {_PATIENCE_S:g} s")
        time.sleep(0.005)


def _prove(run: Path, model: torch.nn.Module, saved: list[int], proofs: Proofs) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    sealed = {event["step"] for event in events if event["kind"] == "snapshot"}
    proofs.true("every save of the loop became a sealed snapshot", bool(saved) and sealed.issuperset(saved))
    notices = [event["message"] for event in events if event["kind"] == "notice" and "at_once" in event["message"]]
    proofs.true("ktrain hid its copies to the end of the loop", not notices)
    stored = load_file(max(run.glob("checkpoints/step-*/data-*/rank-00000.safetensors")))
    live = {f"model/{name}": value for name, value in model.state_dict().items()}
    same = all(torch.equal(stored[name], value.cpu()) for name, value in live.items())
    proofs.true("safetensors' own reader finds the last step's model in the run", same)


@contextmanager
def _volume_in(folder: Path) -> Iterator[None]:
    before = os.environ.get(contract.ENV_VOLUME)
    os.environ[contract.ENV_VOLUME] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[contract.ENV_VOLUME]
        else:
            os.environ[contract.ENV_VOLUME] = before
