"""A small training under `ktrain launch`: `launch_worker.py STEPS SECONDS_PER_STEP`. Imported, the reference for it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

import ktrain


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> Iterator[float]:
    """Steps `first` to `last`, on data that follows from the step alone; yields the losses."""
    for step in range(first, last + 1):
        data = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(data) - data).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def build(wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = wrap(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)))
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def reference(steps: int) -> dict[int, float]:
    """Losses of a run that nobody touched. (Equal gradients average to themselves, so one process gives the same.)"""
    model, optimizer = build(lambda module: module)
    return dict(enumerate(train(model, optimizer, 1, steps), start=1))


def main(steps: int, seconds: float) -> None:
    dist.init_process_group("gloo")
    model, optimizer = build(torch.nn.parallel.DistributedDataParallel)
    run = os.environ["KTRAIN_RUN"]
    checkpointer = ktrain.Checkpointer(run, state={"model": model, "optimizer": optimizer}, every=5)
    start = checkpointer.restore()
    for step, loss in enumerate(train(model, optimizer, start + 1, steps), start=start + 1):
        checkpointer.step(step, loss=loss, samples=8)
        time.sleep(seconds)
    checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
