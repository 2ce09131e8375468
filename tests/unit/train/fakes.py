"""A Checkpointer that keeps its checkpoints in a dict, and small things to train."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ktrain.checkpoint.gate import Gate
from ktrain.checkpoint.policy import Capture, Every, Keep
from ktrain.train.loss import Loss
from ktrain.train.session import Session, SessionConfig
from ktrain.train.sharding import Mesh, Precision


class Shelf:
    """What survives a session: the newest checkpoint, and everything that was said."""

    def __init__(self) -> None:
        self.step = 0
        self.state: dict[str, Any] = {}
        self.losses: list[tuple[int, float]] = []
        self.values: list[dict[str, Any]] = []
        self.closed: list[bool] = []
        self.policies: tuple[Any, ...] = ()

    def open(
        self, run: str, *, state: Mapping[str, Any], every: Every, keep: Keep, gate: Gate, capture: Capture
    ) -> FakeCheckpointer:
        del run
        self.policies = (keep, gate, capture)
        return FakeCheckpointer(self, state, every.memory)


class FakeCheckpointer:
    def __init__(self, shelf: Shelf, state: Mapping[str, Any], every: int) -> None:
        self._shelf, self._parts, self._every = shelf, dict(state), every

    def restore(self) -> int:
        for name, state in self._shelf.state.items():
            if name == "rng":
                torch.set_rng_state(state)
            else:
                self._parts[name].load_state_dict(copy.deepcopy(state))
        return self._shelf.step

    def step(self, step: int, *, loss: float | None = None, samples: int | None = None) -> None:
        assert loss is not None and samples is not None
        self._shelf.losses.append((step, loss))
        if step % self._every == 0:
            states = {name: copy.deepcopy(part.state_dict()) for name, part in self._parts.items()}
            self._shelf.state = {**states, "rng": torch.get_rng_state()}
            self._shelf.step = step

    def log(self, **values: Any) -> None:
        self._shelf.values.append(values)

    @property
    def committed(self) -> dict[str, int]:
        return {"memory": self._shelf.step} if self._shelf.step else {}

    def close(self, *, success: bool = True) -> None:
        self._shelf.closed.append(success)


def open_session(shelf: Shelf, *, every: int = 1, seed: int = 7, precision: str = "fp32") -> Session:
    config = SessionConfig("runs/test", Mesh.FSDP, Precision(precision), seed, Every(every))
    return Session(config, open_checkpointer=shelf.open)


class Regression:
    """64 samples of a noisy line, as (x, y)."""

    def __init__(self, length: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(length, 4, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 0.1 * torch.randn(length, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 16), nn.Linear(16, 1)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.dropout(torch.tanh(self.layers[0](x)))).squeeze(-1)


def squared_error(model: nn.Module, batch: Any, ctx: Any = None) -> Loss:
    x, y = batch
    return Loss(((model(x) - y) ** 2).sum(), count=len(y))
