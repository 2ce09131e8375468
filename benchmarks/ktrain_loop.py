"""ktrain as one of the ways to save from a training loop, memory snapshots alone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
_POLL_S = 0.02
_SKIPPED = "save_skipped"


@dataclass(slots=True)
class Saves:
    """Steps whose save was due, and at the end of the loop those that were skipped."""

    due: list[int] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)


@contextmanager
def ktrain_way(  # noqa: PLR0913 -- a Checkpointer's options
    bench: Bench, loop: Loop, label: str, *, every: int, proofs: Proofs, capture: str = "hidden"
) -> Iterator[tuple[Way, Saves]]:
    """A Checkpointer of the loop's model and optimizer that saves in memory every so many steps.

    At the end it is proven that every save became a sealed snapshot or was skipped, and that the run holds the last
    step's model.
    """
    run, saves = bench.work_dir / f"loop-{label}-{os.getpid()}", Saves()
    with _volume_in(bench.volume_root / f"loop-{label}"):
        state = {"model": loop.model, "optimizer": loop.optimizer}
        cadence = Every(memory=every, bucket=_NEVER)
        checkpointer = ktrain.Checkpointer(run, state=state, every=cadence, capture=capture)
        try:
            checkpointer.restore()
            loop.arm()

            def commit(step: int, is_due: bool) -> None:
                del is_due  # the Checkpointer knows
                checkpointer.step(step)
                if step % every == 0:
                    saves.due.append(step)

            yield Way(NAME, Kind.KTRAIN, commit, finish=lambda: _await_end(run, checkpointer, saves.due[-1])), saves
            commit(loop.step + 1, False)  # the loop commits before it trains: this is the state that it ends with
            checkpointer.close()
        except BaseException:
            checkpointer.close(success=False)
            raise
    saves.skipped = _steps(run, _SKIPPED).intersection(saves.due)
    _prove(run, loop.model, saves, proofs, capture)


def _await_end(run: Path, checkpointer: ktrain.Checkpointer, step: int) -> None:
    """Until the save of the step is committed in memory, or known to be skipped."""
    deadline = time.monotonic() + _PATIENCE_S
    while checkpointer.committed.get(contract.TIER_MEMORY, -1) < step and step not in _steps(run, _SKIPPED):
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step} was not committed in memory within {_PATIENCE_S:g} s")
        time.sleep(_POLL_S)


def _prove(run: Path, model: torch.nn.Module, saves: Saves, proofs: Proofs, capture: str) -> None:
    sealed = _steps(run, "snapshot")
    proofs.true(
        "every save of the loop is a sealed snapshot or counted as skipped", sealed | saves.skipped >= {*saves.due}
    )
    proofs.true("there were saves that were not skipped", not sealed.isdisjoint(saves.due))
    if capture == "hidden":
        notices = [event["message"] for event in _events(run, "notice") if "at_once" in event["message"]]
        proofs.true("ktrain hid its copies to the end of the loop", not notices)
    stored = load_file(max(run.glob("checkpoints/step-*/data-*/rank-00000.safetensors")))
    live = {f"model/{name}": value for name, value in model.state_dict().items()}
    same = all(torch.equal(stored[name], value.cpu()) for name, value in live.items())
    proofs.true("safetensors' own reader finds the last step's model in the run", same)


def _steps(run: Path, kind: str) -> set[int]:
    return {int(event["step"]) for event in _events(run, kind)}


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


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
