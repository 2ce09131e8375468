"""Ranks of a mesh one after the other in this process, over a process group that talks to nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from ktrain.state.tensors import box_of


@contextmanager
def fake_rank(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def distribute(full: torch.Tensor, mesh: Any, placements: Sequence[Placement], value: float | None = None) -> Any:
    """This rank's part of a full tensor, without collectives."""
    empty = DTensor.from_local(
        torch.empty((0,) * full.dim()), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    box = box_of(empty)
    local = full[tuple(slice(at, at + n) for at, n in zip(box.offsets, box.lengths, strict=True))].clone()
    if value is not None:
        local.fill_(value)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def mesh_of(shape: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
