"""Training is not changed by snapshots, and goes on from one bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ktrain.base.clock import Deadline
from ktrain.errors import ConfigError
from ktrain.state.apply import apply, plan_restore
from ktrain.state.plan import plan_save
from ktrain.state.rng import rng_part
from ktrain.state.train_state import TrainState
from ktrain.testing.memory_source import MemorySource
from tests.unit.state.worlds import ALONE, restore, snapshot


class Loop:
    """A small training loop that uses everything that could be disturbed."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        self.optimizer = make_optimizer(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 6], gamma=0.5)
        self.state = TrainState(
            {
                "model": self.model,
                "optimizer": self.optimizer,
                "schedule": self.schedule,
                "rng": rng_part(ALONE),
            }
        )

    def step(self) -> float:
        loss = self.model(torch.randn(8, 6)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def _matrices(parameters: Any) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.dim() == 2]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon(_matrices(p), lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, foreach=True),
    "sgd-momentum-fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request: pytest.FixtureRequest) -> Callable[[Any], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


def test_training_with_a_snapshot_every_step_keeps_its_losses(make_optimizer: Any) -> None:
    plain = Loop(make_optimizer, seed=1)
    expected = [plain.step() for _ in range(8)]
    watched = Loop(make_optimizer, seed=1)
    found = []
    for _ in range(8):
        snapshot(watched.state)
        found.append(watched.step())
    assert found == expected


def test_restore_in_a_fresh_loop_continues_bit_for_bit(make_optimizer: Any) -> None:
    loop = Loop(make_optimizer, seed=1)
    for _ in range(4):
        loop.step()
    saved = snapshot(loop.state)
    expected = [loop.step() for _ in range(5)]

    fresh = Loop(make_optimizer, seed=2)
    restore(fresh.state, {0: saved})

    assert [fresh.step() for _ in range(5)] == expected


def test_restore_in_the_same_loop_goes_back_and_keeps_storage(make_optimizer: Any) -> None:
    loop = Loop(make_optimizer, seed=1)
    for _ in range(4):
        loop.step()
    saved = snapshot(loop.state)
    expected = [loop.step() for _ in range(5)]
    before = [tensor.data_ptr() for tensor in loop.model.state_dict().values()]

    restore(loop.state, {0: saved})

    assert [loop.step() for _ in range(5)] == expected
    assert [tensor.data_ptr() for tensor in loop.model.state_dict().values()] == before


def test_restored_state_gives_the_same_snapshot(make_optimizer: Any) -> None:
    loop = Loop(make_optimizer, seed=1)
    for _ in range(4):
        loop.step()
    saved = snapshot(loop.state)
    fresh = Loop(make_optimizer, seed=2)
    restore(fresh.state, {0: saved})
    assert snapshot(fresh.state) == saved


def test_plan_of_a_fresh_optimizer_gives_it_no_state() -> None:
    loop = Loop(OPTIMIZERS["adamw"], seed=1)
    plan_save(loop.state, ALONE)
    assert len(loop.optimizer.state) == 0


def test_restore_of_a_stateless_optimizer_clears_a_live_one() -> None:
    saved = snapshot(Loop(OPTIMIZERS["adamw"], seed=1).state)
    loop = Loop(OPTIMIZERS["adamw"], seed=2)
    loop.step()
    restore(loop.state, {0: saved})
    assert len(loop.optimizer.state) == 0


def test_plan_when_nothing_changed_reuses_the_layout() -> None:
    loop = Loop(OPTIMIZERS["adamw"], seed=1)
    loop.step()
    first = plan_save(loop.state, ALONE)
    loop.step()
    second = plan_save(loop.state, ALONE)
    assert second.layout is first.layout
    assert second.digest == first.digest
    assert second.objects != first.objects  # the schedule went on


def test_restore_keeps_state_of_another_dtype_than_its_parameter() -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2, bias=False).bfloat16()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = make(1)
    master = torch.randn(2, 3, dtype=torch.float32)
    optimizer.state[model.weight]["master"] = master
    saved = snapshot(TrainState({"model": model, "optimizer": optimizer}))
    model, optimizer = make(2)
    restore(TrainState({"model": model, "optimizer": optimizer}), {0: saved})
    found = optimizer.state[model.weight]["master"]
    assert found.dtype == torch.float32
    assert torch.equal(found, master)


def test_restore_of_lbfgs_with_lists_of_tensors_continues_bit_for_bit() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
        inputs = torch.linspace(-1, 1, 12).reshape(4, 3)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - 1).pow(4).mean()
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(num_steps)]

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    model, optimizer = make(1)
    run(model, optimizer, 2)
    saved = snapshot(TrainState({"model": model, "optimizer": optimizer}))
    expected = run(model, optimizer, 3)
    model, optimizer = make(2)
    restore(TrainState({"model": model, "optimizer": optimizer}), {0: saved})
    assert run(model, optimizer, 3) == expected


def test_restore_brings_every_generator_of_the_host_back() -> None:
    import random

    import numpy

    def draw() -> tuple[float, float, float, float]:
        return float(torch.rand(())), random.random(), float(numpy.random.normal()), random.gauss(0, 1)

    state = TrainState({"rng": rng_part(ALONE)})
    draw()
    saved = snapshot(state)
    expected = draw()
    draw()
    restore(state, {0: saved})
    assert draw() == expected


class _Copies(TorchDispatchMode):
    """Counts what torch is asked to copy from one tensor into another."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0] is not args[1]:
            self.nbytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_restore_of_a_module_leaves_torch_nothing_to_copy() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16))
    state = TrainState({"model": model})
    taken = snapshot(state)
    with _Copies() as copies:
        restore(state, {0: taken})
    assert copies.nbytes == 0


def test_restore_without_a_landing_copies_every_byte_once() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16))
    state = TrainState({"model": model})
    source = MemorySource({0: snapshot(state)})
    needs = plan_restore(state, source.manifests, ALONE)
    source.fetch(needs.ranges, deadline=Deadline.after(30))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    with _Copies() as copies:
        apply(state, needs, source)
    assert copies.nbytes == sum(value.nbytes for value in model.state_dict().values())
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_plan_of_many_tensors_holds_the_garbage_collector_off() -> None:
    state = TrainState({"model": nn.ParameterList(torch.zeros(1) for _ in range(2000))})
    plan_save(state, ALONE)
    collected: list[int] = []  # generations

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    gc.callbacks.append(watch)
    try:
        gc.collect()
        del collected[:]
        plan = plan_save(state, ALONE)
        seen = list(collected)
    finally:
        gc.callbacks.remove(watch)
    assert seen in ([], [0])  # the newest objects once, when it is over
    assert len(plan.items) == 2000 and gc.isenabled()


def test_plan_that_fails_leaves_the_garbage_collector_as_it_was() -> None:
    state = TrainState({"model": nn.LazyLinear(3)})
    for was in (True, False):
        (gc.enable if was else gc.disable)()
        try:
            with pytest.raises(ConfigError):
                plan_save(state, ALONE)
            found = gc.isenabled()
        finally:
            gc.enable()
        assert found == was
