"""How long does a training loop stand in `Checkpointer.step()`?

The loop is a user's: plain python, every=10, a drain to a directory in the background. The plain copy of the same
bytes runs after each saving step, in the same minutes and beside the same background work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import ktrain
from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Measured, Outcome, Proofs, memcpy
from benchmarks.snapshots import ALONE
from ktrain import device as devices
from ktrain.base import contract
from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState

_EVERY = 10
_WIDTH = 512
_WARM_SAVES = 2


@dataclass(slots=True)
class _Times:
    saving: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    copying: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)


def _run(bench: Bench) -> Outcome:
    return run_on(bench, torch.device("cpu"))


def run_on(bench: Bench, device: torch.device) -> Outcome:
    """The same loop on any device; the plain copy is one from that device into warm host memory."""
    proofs = Proofs()
    torch.manual_seed(0)
    layers = max(1, bench.sizes.loop_nbytes // (3 * 4 * _WIDTH * _WIDTH))  # a parameter and two moments
    model = torch.nn.Sequential(*(torch.nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    run = bench.work_dir / f"loop-{os.getpid()}"
    times = _Times()
    with _volume_in(bench.volume_root / "loop"):
        nbytes = _train(bench, model, optimizer, str(run), times)
    _prove(run, model, proofs)
    plain = "plain copy of the same bytes"
    rows = [
        Measured("forward, backward, optimizer", Kind.BASELINE, 0, tuple(times.training)),
        Measured(plain, Kind.BASELINE, nbytes, tuple(times.copying)),
        Measured("step() that saves", Kind.KTRAIN, nbytes, tuple(times.saving), plain),
        Measured("step() between saves", Kind.KTRAIN, 0, tuple(times.between)),
    ]
    return Outcome(proofs, rows)


def _train(bench: Bench, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: str, times: _Times) -> int:
    """Returns the bytes of a snapshot."""
    device = next(model.parameters()).device
    batch = torch.randn(4, _WIDTH, device=device)

    def train() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        devices.synchronize(device)

    checkpointer = ktrain.Checkpointer(run, state={"model": model, "optimizer": optimizer}, every=_EVERY)
    checkpointer.restore()
    train()  # gives the optimizer its state
    checkpointer.step(1)
    nbytes = plan_save(TrainState({"model": model, "optimizer": optimizer}), ALONE).layout.nbytes
    copy = _plain_copy(bench, nbytes, device)
    warm = _WARM_SAVES * _EVERY
    for step in range(2, warm + bench.sizes.num_saves * _EVERY + 1):
        begin = time.perf_counter()
        train()
        trained = time.perf_counter()
        checkpointer.step(step)
        stepped = time.perf_counter()
        if step > warm:
            times.training.append(trained - begin)
            (times.between if step % _EVERY else times.saving).append(stepped - trained)
        if step % _EVERY == 0:
            copying = time.perf_counter()
            copy()
            copied = time.perf_counter()
            if step > warm:
                times.copying.append(copied - copying)
    checkpointer.close()
    return nbytes


def _plain_copy(bench: Bench, nbytes: int, device: torch.device) -> Callable[[], object]:
    """The least that a snapshot must do before the next step may change the state."""
    if device.type == "cpu":
        source, target = bench.buffers(nbytes)
        return partial(memcpy, target, source, bench.threads)
    whole = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        pinned.copy_(whole, non_blocking=True)
        devices.synchronize(device)

    return copy


def _prove(run: Path, model: torch.nn.Module, proofs: Proofs) -> None:
    """What the last step left in the run is what the model holds; otherwise no time is reported."""
    newest = max(run.glob("checkpoints/step-*/data-*/rank-00000.safetensors"))
    stored = load_file(newest)
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


CASE = Case(
    "stall",
    "How long does a training loop stand in Checkpointer.step(), every=10, with the drain in the background?",
    "on a CPU the state must be copied before step() returns: bytes / memcpy with as many threads",
    _run,
)
