"""Tensors of every form that a device holds, and memory that moves between two saves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ktrain import device
from ktrain.checkpoint.policy import Capture
from ktrain.state.train_state import TrainState
from tests.gpu.loops import A_WHILE, Loop, rig_of, taken
from tests.unit.checkpoint.saving import COPYING, Rig, same
from tests.unit.state.worlds import restore

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_available(), reason="this process sees no accelerator"),
]

SIZE = 64
# Each has more than 4 KiB, so that it may be left to the background where it trains.
TRAINED: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.randn(SIZE, SIZE),
    "bfloat16": lambda: torch.randn(SIZE, SIZE, dtype=torch.bfloat16),
    "float16": lambda: torch.randn(SIZE, SIZE).half(),
    "float64": lambda: torch.randn(SIZE, SIZE, dtype=torch.float64),
    "transposed": lambda: torch.randn(SIZE, 2 * SIZE).t(),
    "every-second": lambda: torch.randn(2 * SIZE, SIZE)[::2],
    "columns": lambda: torch.randn(SIZE, 2 * SIZE)[:, 5 : SIZE + 5],
    "channels-last": lambda: torch.randn(16, 16, 3, 3).to(memory_format=torch.channels_last),
    "empty": lambda: torch.randn(0, SIZE),
    "one": lambda: torch.randn(()),
}
KEPT: dict[str, Callable[[], torch.Tensor]] = {
    "float8_e4m3fn": lambda: noise(SIZE, SIZE).view(torch.float8_e4m3fn),
    "float8_e5m2": lambda: noise(SIZE, SIZE).view(torch.float8_e5m2),
    "float8_e8m0fnu": lambda: noise(SIZE, SIZE).view(torch.float8_e8m0fnu),
    "float8 transposed": lambda: noise(SIZE, 2 * SIZE).view(torch.float8_e4m3fn).t(),
    "float8 empty": lambda: noise(SIZE, 0).view(torch.float8_e4m3fn),
    "int64": lambda: torch.randint(-(1 << 40), 1 << 40, (SIZE,)),
    "bool": lambda: torch.rand(SIZE + 1) > 0.5,
    "uint8": lambda: noise(SIZE * SIZE + 1),
    "complex": lambda: torch.randn(SIZE, SIZE, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(SIZE, SIZE, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(SIZE, SIZE, dtype=torch.complex64).conj().imag,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


class Forms(nn.Module):
    """A tensor of every form: those that train, and those that only change with the program."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        with device.for_rank(0):
            for name, make in TRAINED.items():
                self.register_parameter(f"trained {name}", nn.Parameter(make()))
            for name, make in KEPT.items():
                self.register_buffer(f"kept {name}", make())


def forms(seed: int) -> tuple[Forms, dict[str, Any]]:
    module = Forms(seed)
    optimizer = torch.optim.AdamW(module.parameters(), 0.01)
    update(module, optimizer)
    return module, {"model": module, "optimizer": optimizer}


def update(module: Forms, optimizer: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def values_of(module: Forms) -> dict[str, torch.Tensor]:
    return {f"model/{name}": plain(value) for name, value in module.state_dict().items()}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Its values on the host, item behind item."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().clone()


def forms_of(module: Forms) -> list[tuple[Any, ...]]:
    return [
        (name, value.dtype, value.shape, value.stride(), value.is_conj(), value.is_neg(), value.data_ptr())
        for name, value in module.state_dict().items()
    ]


def test_tensors_of_every_form_are_saved_beside_training_and_restored_in_place(tmp_path: Path) -> None:
    module, parts = forms(1)
    with Rig(tmp_path, parts) as rig:
        update(module, parts["optimizer"])
        rig.saver.prepare()
        expected = values_of(module)
        rig.gate.hold(COPYING)
        if device.name() == "cuda":
            torch.cuda._sleep(A_WHILE)  # nothing has arrived on the host when `save` returns
        assert rig.saver.save(1)
        rig.gate.open(COPYING)
        update(module, parts["optimizer"])
        assert rig.saver.finish() and same(rig.snapshot(1), expected)
        assert rig.saver.capture is Capture.HIDDEN

        other, fresh = forms(2)
        before = forms_of(other)
        restore(TrainState(fresh), {0: taken(rig, 1)})
        assert same(values_of(other), expected)
        assert forms_of(other) == before  # the tensors that were there, as they lay
        update_alike(other, fresh["optimizer"])
        restore(TrainState(parts), {0: taken(rig, 1)})
        update_alike(module, parts["optimizer"])
        assert same(values_of(other), values_of(module))  # the optimizers' state too


def update_alike(module: Forms, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(4)
    update(module, optimizer)


@pytest.fixture
def loop() -> Iterator[Loop]:
    yield Loop()


def move(loop: Loop) -> None:
    """Gives every tensor of the state other memory, and what it had back to the device."""
    for parameter in loop.model.parameters():
        entry = loop.optimizer.state[parameter]
        parameter.data = parameter.data.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = entry[key].clone()
    for module in loop.model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.clone())
    torch.accelerator.empty_cache()


def addresses_of(loop: Loop) -> list[int]:
    entries = [value for entry in loop.optimizer.state.values() for value in entry.values()]
    return [value.data_ptr() for value in (*loop.model.state_dict().values(), *entries) if value.device.type != "cpu"]


def test_memory_that_moved_between_two_saves_is_found(loop: Loop, tmp_path: Path) -> None:
    with rig_of(loop, tmp_path) as rig:
        for step in range(1, 4):
            loop.step()
            before = addresses_of(loop)
            move(loop)
            assert not set(before[:1]) & set(addresses_of(loop)[:1])
            scratch = torch.full((1 << 22,), 7.0, device=loop.device)  # over what was given back
            expected = loop.values()
            assert rig.saver.save(step)
            loop.step()
            assert rig.saver.finish() and same(rig.snapshot(step), expected)
            del scratch
        assert rig.saver.capture is Capture.HIDDEN


def test_memory_that_is_given_back_while_the_copy_is_held_is_still_that_of_the_step(loop: Loop, tmp_path: Path) -> None:
    with rig_of(loop, tmp_path) as rig:
        expected = loop.values()
        rig.gate.hold(COPYING)
        assert rig.saver.save(1)
        with torch.no_grad():
            for parameter in loop.model.parameters():
                parameter.data = torch.zeros_like(parameter)
                loop.optimizer.state[parameter]["exp_avg"] = torch.ones_like(parameter)
        torch.accelerator.empty_cache()
        scratch = [torch.full_like(parameter, 7.0) for parameter in loop.model.parameters() for _ in range(4)]
        device.synchronize()
        rig.gate.open(COPYING)
        assert rig.saver.finish() and same(rig.snapshot(1), expected)
        del scratch


@pytest.mark.skipif(device.name() != "cuda", reason="needs CUDA's allocator")
def test_memory_in_segments_that_grow_moves_no_less(tmp_path: Path) -> None:
    names = ("memory_that_moved_between", "memory_that_is_given_back")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " or ".join(names), __file__]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'inner'}"],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
