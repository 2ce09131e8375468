"""Captures of device tensors: a side stream copies beside training, in the order that the program sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from ktrain import device
from ktrain.checkpoint.policy import Capture
from tests.unit.checkpoint.saving import COPYING, Rig, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_available(), reason="this process sees no accelerator"),
]

WIDTH = 1024


class Loop:
    def __init__(self, **options: bool) -> None:
        torch.manual_seed(3)
        self.device = device.for_rank(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01, **options)

    def backward(self) -> None:
        self.model(torch.randn(64, WIDTH, device=self.device)).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, torch.Tensor]:
        found = {f"model/{name}": value.cpu().clone() for name, value in self.model.state_dict().items()}
        names = {id(value): name for name, value in self.model.named_parameters()}
        for param, entry in self.optimizer.state.items():
            # A step count on the host is its own `cpu()`, and the next step would change it here too.
            found |= {f"optimizer/model.{names[id(param)]}/{key}": value.cpu().clone() for key, value in entry.items()}
        return found


def rig_of(loop: Loop, folder: Path) -> Rig:
    rig = Rig(folder, {"model": loop.model, "optimizer": loop.optimizer})
    loop.step()
    rig.saver.prepare()
    return rig


@pytest.fixture
def loop() -> Iterator[Loop]:
    yield Loop()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_capture_beside_training_holds_the_values_of_its_step(options: dict[str, bool], tmp_path: Path) -> None:
    loop = Loop(**options)
    with rig_of(loop, tmp_path) as rig:
        for step in range(1, 5):
            loop.step()
            rig.saver.wait_copied()
            expected = loop.values()
            assert rig.saver.save(step)
            loop.step()  # its hook waits; batch norm does not
            assert rig.saver.finish()
            assert same(rig.snapshot(step), expected)
        assert rig.saver.capture is Capture.HIDDEN


@pytest.mark.skipif(device.name() != "cuda", reason="needs a kernel that only waits")
def test_save_behind_a_step_that_the_device_has_not_begun_holds_that_step(loop: Loop, tmp_path: Path) -> None:
    buffers = {f"model/{name}" for name, _ in loop.model.named_buffers()}
    with rig_of(loop, tmp_path) as rig:
        torch.cuda._sleep(200_000_000)  # cycles, some 0.1 s: all that follows waits on the compute stream
        loop.step()
        assert rig.saver.save(1)
        loop.backward()  # changes the buffers alone
        assert rig.saver.finish()
        expected = loop.values().items()
        assert same(rig.snapshot(1), {name: value for name, value in expected if name not in buffers})


@pytest.mark.skipif(device.name() != "cuda", reason="needs memory that CUDA can register")
def test_prepared_slots_are_registered_with_the_device(loop: Loop) -> None:
    with TemporaryDirectory(dir="/dev/shm") as volume, rig_of(loop, Path(volume)) as rig:  # noqa: S108
        assert rig.saver.save(1) and rig.saver.finish() and rig.saver.volume is not None
        writer = rig.saver.volume.acquire(0, rig.manifest(1).nbytes, protect=(), limit=4)
        assert writer is not None
        with writer:  # given back without a seal
            assert torch.frombuffer(writer.memory, dtype=torch.uint8).is_pinned()


def test_buffer_that_forward_changes_while_the_copy_is_held_is_that_of_the_step(loop: Loop, tmp_path: Path) -> None:
    with rig_of(loop, tmp_path) as rig:
        expected = loop.values()
        rig.gate.hold(COPYING)
        assert rig.saver.save(1)
        for _ in range(5):
            loop.backward()
        rig.gate.open(COPYING)
        assert rig.saver.finish() and same(rig.snapshot(1), expected)


def test_optimizer_step_waits_for_a_copy_that_is_held(loop: Loop, tmp_path: Path) -> None:
    with rig_of(loop, tmp_path) as rig:
        expected = loop.values()
        rig.gate.hold(COPYING)
        assert rig.saver.save(1)
        loop.backward()
        thread = threading.Thread(target=loop.optimizer.step)
        thread.start()
        rig.gate.open(COPYING)
        thread.join(60)
        assert rig.saver.finish() and same(rig.snapshot(1), expected)


@pytest.mark.parametrize("by_data", [False, True])
def test_edit_while_the_copy_is_held_is_never_sealed(loop: Loop, tmp_path: Path, by_data: bool) -> None:
    with rig_of(loop, tmp_path) as rig:
        rig.gate.hold(COPYING)
        assert rig.saver.save(1)
        with torch.no_grad():
            (loop.model[0].weight.data if by_data else loop.model[0].weight).add_(1)
        rig.gate.open(COPYING)
        assert not rig.saver.finish() and rig.steps_held() == []
        expected = loop.values()
        assert rig.saver.save(2)
        loop.model[0].weight.data.add_(1)
        assert rig.saver.finish() and same(rig.snapshot(2), expected)


@pytest.mark.skipif(device.name() != "cuda", reason="needs CUDA graphs")
def test_replay_of_a_captured_step_does_not_reach_the_snapshot(tmp_path: Path) -> None:
    loop = Loop(capturable=True)
    batch = torch.randn(64, WIDTH, device=loop.device)

    def whole() -> None:
        loop.optimizer.zero_grad()
        loop.model(batch).square().mean().backward()
        loop.optimizer.step()

    with rig_of(loop, tmp_path) as rig:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                whole()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole()
        for step in range(1, 4):
            graph.replay()
            expected = loop.values()
            rig.gate.hold(COPYING)
            assert rig.saver.save(step)
            graph.replay()
            rig.gate.open(COPYING)
            assert rig.saver.finish() and same(rig.snapshot(step), expected)
