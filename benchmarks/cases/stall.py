"""How much time does a save take from a training loop: in `Checkpointer.step()`, and waiting in the step after it?

The loop is a user's: plain python, every=10, a drain to a directory in the background. The plain copy of the same
bytes runs before each saving step, in the same minutes; not after it, where it would take the time that the copy in the
background hides in. Two batch sizes: forward and backward much shorter than the copy, and longer.
"""

from __future__ import annotations

import json
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
_BATCHES = {"short": 4, "long": 128}


@dataclass(slots=True)
class _Times:
    saving: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    copying: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)


def _run(bench: Bench) -> Outcome:
    return run_on(bench, torch.device("cpu"))


def run_on(bench: Bench, device: torch.device) -> Outcome:
    """The same loop on any device; the plain copy is one from that device into warm host memory."""
    proofs = Proofs()
    rows: list[Measured] = []
    for name, batch in _BATCHES.items():
        rows += _loop(bench, device, name, batch, proofs)
    return Outcome(proofs, rows)


def _loop(bench: Bench, device: torch.device, name: str, batch: int, proofs: Proofs) -> list[Measured]:
    torch.manual_seed(0)
    layers = max(1, bench.sizes.loop_nbytes // (3 * 4 * _WIDTH * _WIDTH))  # a parameter and two moments
    model = torch.nn.Sequential(*(torch.nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    run = bench.work_dir / f"loop-{name}-{os.getpid()}"
    times = _Times()
    with _volume_in(bench.volume_root / f"loop-{name}"):
        nbytes = _train(bench, model, optimizer, str(run), times, torch.randn(batch, _WIDTH, device=device))
    _prove(run, model, proofs)
    plain = f"plain copy of the same bytes, {name} steps"
    return [
        Measured(f"forward, backward, optimizer, {name} steps", Kind.BASELINE, 0, tuple(times.training)),
        Measured(plain, Kind.BASELINE, nbytes, tuple(times.copying)),
        Measured(f"step() that saves, {name} steps", Kind.KTRAIN, nbytes, tuple(times.saving), plain),
        Measured(f"- and the wait after it, {name} steps", Kind.KTRAIN, nbytes, tuple(times.taken), plain),
        Measured(f"step() between saves, {name} steps", Kind.KTRAIN, 0, tuple(times.between)),
    ]


def _train(  # noqa: PLR0913 -- the loop as a whole
    bench: Bench,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    run: str,
    times: _Times,
    batch: torch.Tensor,
) -> int:
    """Returns the bytes of a snapshot."""
    device = batch.device

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
        if step % _EVERY == 0:
            copy()
            if step > warm:
                times.copying.append(time.perf_counter() - trained)
            devices.synchronize(device)
        before = time.perf_counter()
        checkpointer.step(step)
        stepped = time.perf_counter()
        if step > warm:
            times.training.append(trained - begin)
            (times.between if step % _EVERY else times.saving).append(stepped - before)
    checkpointer.close()
    events = [json.loads(line) for line in Path(run, "events.jsonl").read_text().splitlines()]
    times.taken += [event["stall_s"] for event in events if event["kind"] == "snapshot" and event["step"] > warm][
        : len(times.saving)
    ]
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
    "How much time does a save take from a loop, in step() and in the next optimizer step, with the drain beside it?",
    "what forward and backward do not hide of bytes / memcpy with as many threads; processors are shared with them",
    _run,
)
