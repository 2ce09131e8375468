"""Trainings on the device, small ones, and what is shared between their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktrain import device
from ktrain.format.manifest import Identity
from ktrain.state.rng import rng_part
from tests.unit.checkpoint.saving import RUN, Rig
from tests.unit.state.worlds import ALONE, Taken

WIDTH = 1024
A_WHILE = 200_000_000
"""Cycles of `torch.cuda._sleep`, some 0.1 s."""


class Loop:
    """Linear layers around a batch norm, whose buffers every forward changes."""

    def __init__(self, *, seed: int = 3, **options: Any) -> None:
        torch.manual_seed(seed)
        self.device = device.for_rank(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.model.to(self.device)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), 0.01, **options)

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def backward(self) -> float:
        loss = self.model(torch.randn(64, WIDTH, device=self.device)).square().mean()
        loss.backward()
        return float(loss.item())

    def step(self) -> float:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def values(self) -> dict[str, torch.Tensor]:
        """Copies on the host of all tensors, under the names that they are stored by."""
        found = {f"model/{name}": value.cpu().clone() for name, value in self.model.state_dict().items()}
        names = {id(value): name for name, value in self.model.named_parameters()}
        for param, entry in self.optimizer.state.items():
            # A step count on the host is its own `cpu()`, and the next step would change it here too.
            found |= {f"optimizer/model.{names[id(param)]}/{key}": value.cpu().clone() for key, value in entry.items()}
        return found


class MixedLoop(Loop):
    """Half precision in forward, a scaler at the edge where steps overflow and are skipped, and a dropout."""

    def __init__(self, *, seed: int = 3) -> None:
        super().__init__(seed=seed)
        self.model.insert(2, nn.Dropout(0.1))
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**26, backoff_factor=0.25, growth_interval=2)
        self.rng = rng_part(ALONE)

    @property
    def parts(self) -> dict[str, Any]:
        return {**super().parts, "scaler": self.scaler, "rng": self.rng}

    def backward(self) -> float:
        batch = torch.randn(64, WIDTH, device=self.device)
        with torch.autocast(self.device.type, torch.float16):
            loss = self.model(batch).float().square().mean()
        self.scaler.scale(loss).backward()
        return float(loss.item())

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self) -> float:
        loss = self.backward()
        self.update()
        return loss


def rig_of(loop: Loop, folder: Path) -> Rig:
    """A rig whose optimizer was seen to announce a step, and whose slots are made and registered."""
    rig = Rig(folder, loop.parts)
    loop.step()
    rig.saver.prepare()
    return rig


def taken(rig: Rig, step: int) -> Taken:
    """The sealed snapshot of a step: its manifest and a copy of its payload."""
    assert rig.saver.volume is not None
    with rig.saver.volume.open(0, Identity(RUN, step, 1, 1)) as slot:
        return slot.manifest, bytes(slot.memory)
