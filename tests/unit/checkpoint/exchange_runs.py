"""Runs to export from: a model with tied weights, a buffer, extra state and an optimizer, saved by Checkpointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import ktrain
from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline


class Tied(nn.Module):
    """Two layers that share their weight, a batch norm, and a parameter of another dtype."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens))) * self.scale.float().sum()


class WithExtra(Tied):
    """The same, with state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"note": "kept"}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"note": "kept"}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make_run(folder: Path, steps: int = 2) -> tuple[str, Tied, torch.optim.Optimizer]:
    """A run with a checkpoint of each step, and its model and optimizer as they were at the last one."""
    run, model = str(folder / "run"), WithExtra()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with ktrain.Checkpointer(run, state={"model": model, "optimizer": optimizer}, every=1, keep=10) as ckpt:
        ckpt.restore()
        for step in range(steps):
            train(model, optimizer)
            ckpt.step(step + 1)
            _await_committed(ckpt, step + 1)
    return run, model, optimizer


def _await_committed(ckpt: ktrain.Checkpointer, step: int) -> None:
    """The bucket takes the newest step only: the next one must not overtake this one."""
    deadline = Deadline.after(60)
    while ckpt.committed.get(contract.TIER_BUCKET) != step:
        assert not deadline.expired(), f"step {step} is not committed: {ckpt.committed}"
        SYSTEM_CLOCK.sleep(0.01)


def plain_tensors(model: Tied) -> dict[str, torch.Tensor]:
    """What a file of the model's tensors has to hold: each once."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and name != "head.weight"
    }
