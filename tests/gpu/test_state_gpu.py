"""State on an accelerator: staging into a pinned slot, exact resume with fused AdamW, device generators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ktrain import device
from ktrain.snapshot.staging import stage
from ktrain.state.plan import plan_save
from ktrain.state.rng import rng_part
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import ALONE, restore, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_available(), reason="this process sees no accelerator"),
]


class Loop:
    def __init__(self, seed: int, **options: bool) -> None:
        torch.manual_seed(seed)
        self.device = device.for_rank(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 8))
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, **options)
        self.state = TrainState({"m": self.model, "o": self.optimizer, "rng": rng_part(ALONE)})

    def step(self) -> float:
        loss = self.model(torch.randn(16, 32, device=self.device)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_restore_on_a_device_continues_bit_for_bit(options: dict[str, bool]) -> None:
    loop = Loop(1, **options)
    for _ in range(3):
        loop.step()
    saved = snapshot(loop.state)
    expected = [loop.step() for _ in range(4)]
    fresh = Loop(2, **options)
    restore(fresh.state, {0: saved})
    assert [fresh.step() for _ in range(4)] == expected


def test_stage_into_registered_memory_equals_pageable_memory() -> None:
    plan = plan_save(Loop(1).state, ALONE)
    plain, pinned = bytearray(plan.layout.nbytes), bytearray(plan.layout.nbytes)
    memory = memoryview(pinned)
    is_registered = device.register_host_memory(memory)
    try:
        assert stage(plan, memory) == stage(plan, memoryview(plain))
        assert pinned == plain
    finally:
        if is_registered:
            device.unregister_host_memory(memory)


def test_process_group_backend_of_the_device_is_torchs_own() -> None:
    assert device.process_group_backend() != "gloo"
