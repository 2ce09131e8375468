"""State on an accelerator: staging into a pinned slot, exact resume with fused AdamW, device generators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ktrain import device, native
from ktrain.format.payload import CHUNK_NBYTES
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


class Tensors(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(f"tensor{name}", tensor)


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


def test_digests_made_while_others_are_copied_are_those_of_the_payload() -> None:
    sizes = [1000, 9 << 20, 0, 37 << 20, 5, 1 << 20, 61 << 20, 3 << 20, 40 << 20]  # several batches, uneven ends
    place = device.for_rank(0)
    tensors = {
        str(at): torch.randint(0, 255, (size,), dtype=torch.uint8, device=place) for at, size in enumerate(sizes)
    }
    tensors |= {"turned": torch.randn(3000, 2000, device=place).T, "half": torch.randn(4097, device=place).half()}
    tensors |= {"eight": torch.randn(4097, device=place).to(torch.float8_e4m3fn), "host": torch.randn(1 << 20)}
    plan = plan_save(TrainState({"all": Tensors(tensors)}), ALONE)
    memory = memoryview(bytearray(plan.layout.nbytes))
    digests = stage(plan, memory, num_threads=2)
    assert list(digests) == native.digest_chunks(memory, chunk_nbytes=CHUNK_NBYTES)
    for tensor, entry in zip(plan.tensors, plan.layout.entries, strict=True):
        plain = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert memory[entry.begin : entry.end] == plain


def test_process_group_backend_of_the_device_is_torchs_own() -> None:
    assert device.process_group_backend() != "gloo"
