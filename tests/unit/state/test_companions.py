"""What trains beside a model and its optimizer: schedules, scalers, averages, several of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import ALONE, restore, snapshot

BEFORE, AFTER = 4, 5  # steps


class Loop:
    """A model and an optimizer; `extra` are the parts that a test adds. Inputs depend on the step alone."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.dtype = dtype
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.extra: dict[str, Any] = {}

    def parts(self) -> TrainState:
        return TrainState({"model": self.model, "optimizer": self.optimizer, **self.extra})

    def step(self, number: int) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(number)
        loss.backward()
        self.optimizer.step()
        self.after(loss)
        return loss.item()

    def loss(self, number: int) -> torch.Tensor:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).to(self.dtype)
        return self.model(inputs).float().square().mean()

    def after(self, loss: torch.Tensor) -> None:
        """What a test does after each optimizer step."""


def check_resume(make: Callable[[int], Loop]) -> Loop:
    """A restored loop has the same snapshot and the same next losses; returns it."""
    loop = make(1)
    for number in range(BEFORE):
        loop.step(number)
    saved = snapshot(loop.parts())
    expected = [loop.step(number) for number in range(BEFORE, BEFORE + AFTER)]
    fresh = make(2)
    restore(fresh.parts(), {0: saved})
    assert snapshot(fresh.parts()) == saved
    assert [fresh.step(number) for number in range(BEFORE, BEFORE + AFTER)] == expected
    return fresh


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "cosine-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 10)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "swa": lambda o: swa_utils.SWALR(o, 0.02, anneal_epochs=6),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_on_where_it_was(name: str) -> None:
    class Scheduled(Loop):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.extra["schedule"] = SCHEDULES[name](self.optimizer)

        def after(self, loss: torch.Tensor) -> None:
            schedule = self.extra["schedule"]
            is_told = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
            schedule.step(loss.detach()) if is_told else schedule.step()

    check_resume(Scheduled)


class Scaled(Loop):
    """float16 by autocast, with a scaler that overflows, backs off and skips steps within the test."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.extra["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)

    def step(self, number: int) -> float:
        scaler = self.extra["scaler"]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = self.loss(number)
        scaler.scale(loss).backward()
        scaler.step(self.optimizer)
        scaler.update()
        return loss.item() + scaler.get_scale()


def test_gradient_scaler_keeps_its_scale_and_its_count() -> None:
    loop = check_resume(Scaled)
    assert loop.extra["scaler"].get_scale() < 2.0**24


@pytest.mark.parametrize("use_buffers", [False, True])
def test_average_of_weights_goes_on(use_buffers: bool) -> None:
    class Averaged(Loop):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            average = swa_utils.get_ema_multi_avg_fn(0.9)
            self.extra["ema"] = swa_utils.AveragedModel(self.model, multi_avg_fn=average, use_buffers=use_buffers)

        def after(self, loss: torch.Tensor) -> None:
            self.extra["ema"].update_parameters(self.model)

        def step(self, number: int) -> float:
            found = super().step(number)
            return found + sum(float(value.detach().double().sum()) for value in self.extra["ema"].parameters())

    loop = check_resume(Averaged)
    assert int(loop.extra["ema"].n_averaged) == BEFORE + AFTER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_of_another_precision_goes_on(dtype: torch.dtype) -> None:
    check_resume(lambda seed: Loop(seed, dtype))


class Adversaries(Loop):
    """Two models with two optimizers each trained against the other, and one optimizer over parts of both."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.other = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.extra["other"] = self.other
        self.extra["second"] = torch.optim.AdamW(self.other[0].parameters(), lr=0.01)
        shared = [*self.other[2].parameters(), *self.model[2].parameters()]
        self.extra["third"] = torch.optim.RMSprop(shared, lr=0.001, momentum=0.5)

    def step(self, number: int) -> float:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        loss = self.other(self.model(inputs)).square().mean()
        for optimizer in (self.optimizer, self.extra["second"], self.extra["third"]):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (self.optimizer, self.extra["second"], self.extra["third"]):
            optimizer.step()
        return loss.item()


def test_several_models_and_optimizers_go_on_under_names_of_their_own() -> None:
    loop = check_resume(Adversaries)
    names = {item.shard.name for item in plan_save(loop.parts(), ALONE).items}
    assert {"model/0.weight", "other/0.weight", "second/other.0.weight/exp_avg"} <= names
    assert {"third/other.2.bias/square_avg", "third/model.2.bias/square_avg"} <= names
    assert "optimizer/model.2.bias/momentum_buffer" in names


class Delayed(Loop):
    """fp8: a weight quantized with a scale from the history of its largest values, all of it in buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.model.register_buffer("history", torch.ones(4))
        self.model.register_buffer("quantized", torch.zeros(16, 6, dtype=torch.float8_e4m3fn))

    def loss(self, number: int) -> torch.Tensor:
        weight, history = self.model[0].weight, self.model.history
        with torch.no_grad():
            history.copy_(torch.cat([history[1:], weight.abs().max()[None]]))
            self.model.quantized.copy_((weight / history.max() * 448).to(torch.float8_e4m3fn))
        scale = self.model.quantized.float().abs().mean() * history.max() / 448
        return super().loss(number) * scale


def test_history_and_weights_of_8_bits_go_on() -> None:
    loop = check_resume(Delayed)
    dtypes = {item.shard.name: item.shard.dtype for item in plan_save(loop.parts(), ALONE).items}
    assert dtypes["model/quantized"] == "float8_e4m3fn"
