"""Names in a snapshot are those of the model itself, whatever wraps it, and stay the same when the wrapping changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import ALONE, restore, snapshot


class Net(nn.Module):
    """Blocks of an attribute and a list, a tied head, a buffer, and a parameter without dimensions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(6, 4, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.head = nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = y + block(y)
        return (y @ self.head.weight) * self.scale


def _compile_inside(net: Net) -> nn.Module:
    net.blocks[0] = torch.compile(net.blocks[0], backend="aot_eager")
    return net


def _compile_both(net: Net) -> nn.Module:
    return torch.compile(_compile_inside(net), backend="aot_eager")


def _compile_in_place(net: Net) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


def _checkpoint(net: Net) -> nn.Module:
    net.blocks[1] = checkpoint_wrapper(net.blocks[1])
    return net


def _checkpoint_and_compile(net: Net) -> nn.Module:
    net.blocks[0] = torch.compile(checkpoint_wrapper(net.blocks[0]), backend="aot_eager")
    net.blocks[1] = checkpoint_wrapper(torch.compile(net.blocks[1], backend="aot_eager"))
    return net


WRAPPINGS: dict[str, Callable[[Net], nn.Module]] = {
    "plain": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="aot_eager"),
    "compiled-inside": _compile_inside,
    "compiled-twice": _compile_both,
    "compiled-in-place": _compile_in_place,
    "recomputed": _checkpoint,
    "recomputed-and-compiled": _checkpoint_and_compile,
}


class Loop:
    def __init__(self, wrapping: str, seed: int) -> None:
        self.model: Any = WRAPPINGS[wrapping](Net(seed))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = TrainState({"model": self.model, "optimizer": self.optimizer})

    def step(self, number: int) -> float:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        loss = (self.model(inputs) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def names_of(loop: Loop) -> list[str]:
    return [item.shard.name for item in plan_save(loop.state, ALONE).items]


@pytest.fixture(autouse=True)
def _quick_compiler() -> Any:
    """What is compiled runs as it was written: names do not depend on it, and compiling takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trained(wrapping: str) -> Loop:
    loop = Loop(wrapping, seed=1)
    for number in range(3):
        loop.step(number)
    return loop


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_are_those_of_the_model_itself(wrapping: str) -> None:
    names = names_of(trained(wrapping))
    assert names == names_of(trained("plain"))
    assert "model/head.weight" not in names
    assert "optimizer/model.blocks.1.0.weight/exp_avg" in names


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_snapshot_goes_from_a_wrapped_model_to_a_plain_one_and_back(wrapping: str) -> None:
    loop = trained(wrapping)
    saved = snapshot(loop.state)
    expected = [loop.step(number) for number in range(3, 6)]
    for other in ("plain", wrapping):
        fresh = Loop(other, seed=2)
        restore(fresh.state, {0: saved})
        assert snapshot(fresh.state) == saved
        assert [fresh.step(number) for number in range(3, 6)] == expected


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_model_that_was_compiled_goes_on_bit_for_bit() -> None:
    with torch.compiler.set_stance("default"):
        loop = trained("compiled")
        saved = snapshot(loop.state)
        expected = [loop.step(number) for number in range(3, 6)]
        fresh = Loop("compiled", seed=2)
        restore(fresh.state, {0: saved})
        assert [fresh.step(number) for number in range(3, 6)] == expected
