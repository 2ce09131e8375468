"""A state that DCP saves and loads in one process, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlanner

from ktrain.checkpoint.dcp import RunStorageReader, RunStorageWriter


def state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": {
            "weight": torch.randn(33, 7),
            "half": torch.randn(5).bfloat16(),
            "flags": torch.tensor([True, False]),
            "scalar": torch.tensor(1.5, dtype=torch.float64),
            "none": torch.empty(0, 3),
            "strided": torch.randn(4, 6).t(),
        },
        "extra": {"lr": 0.1, "names": ["a", "b"], "epoch": seed},
    }


def zeros() -> dict[str, Any]:
    empty = state()
    empty["model"] = {name: torch.zeros_like(tensor) for name, tensor in empty["model"].items()}
    empty["extra"] = {"lr": None, "names": ["", ""], "epoch": None}
    return empty


def save(run: str, step: int, value: dict[str, Any], planner: SavePlanner | None = None) -> None:
    dcp.save(value, storage_writer=RunStorageWriter(run), checkpoint_id=f"step-{step}", planner=planner)


def load(run: str, step: int | None = None) -> dict[str, Any]:
    found = zeros()
    dcp.load(found, storage_reader=RunStorageReader(run, step=step))
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    return tensors and first["extra"] == second["extra"]


def payload(run: str) -> Path:
    (found,) = Path(run).glob("checkpoints/*/*/*.safetensors")
    return found
