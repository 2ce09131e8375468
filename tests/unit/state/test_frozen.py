"""Snapshots of what trains alone: adapters on a base that the program loads itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ktrain
from ktrain.errors import ConfigError
from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import ALONE, Holder, restore, save_and_restore, snapshot


class Adapted(nn.Module):
    """A frozen linear map with a trained low-rank part beside it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(num_in, num_out)
        self.base.requires_grad_(False)
        self.down = nn.Linear(num_in, 2, bias=False)
        self.up = nn.Linear(2, num_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Loop:
    """A model whose base is the same on every start, and whose adapters come from the seed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Adapted(4, 8), nn.BatchNorm1d(8), Adapted(8, 3))
        self.base = [layer.base for layer in self.model if isinstance(layer, Adapted)]
        torch.manual_seed(seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            nn.init.normal_(parameter)
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.05)

    def state(self) -> TrainState:
        return TrainState({"model": ktrain.trainable(self.model), "optimizer": self.optimizer})

    def step(self, number: int) -> float:
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        loss = self.model(inputs).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def test_snapshot_of_what_trains_leaves_out_frozen_parameters_alone() -> None:
    loop = Loop(seed=1)
    names = {item.shard.name for item in plan_save(loop.state(), ALONE).items}
    assert not any("base" in name for name in names)
    assert {f"model/{key}" for key in loop.model.state_dict() if "base" not in key} == names


def test_restore_of_what_trains_continues_bit_for_bit_and_says_what_it_kept() -> None:
    loop = Loop(seed=1)
    for number in range(4):
        loop.step(number)
    saved = snapshot(loop.state())
    expected = [loop.step(number) for number in range(4, 8)]

    fresh = Loop(seed=2)
    needs = restore(fresh.state(), {0: saved})

    assert [fresh.step(number) for number in range(4, 8)] == expected
    assert needs.notices == (
        "part 'model': 4 frozen parameters are not in the checkpoint; they stay as the program made them",
    )


def refuse(saved: Any, fresh: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        save_and_restore({"m": saved}, {"m": fresh})
    return str(caught.value)


def test_restore_into_a_whole_module_is_refused_and_says_the_way_out() -> None:
    message = refuse(ktrain.trainable(Adapted(2, 2)), Adapted(2, 2))
    assert "m/base.weight: frozen when it was saved" in message
    assert "ktrain.trainable(module)" in message
    assert "m/up.weight" not in message


def test_restore_where_a_frozen_parameter_trains_now_is_refused_by_name() -> None:
    fresh = Adapted(2, 2)
    fresh.base.bias.requires_grad_(True)
    message = refuse(ktrain.trainable(Adapted(2, 2)), ktrain.trainable(fresh))
    assert "m/base.bias: frozen when it was saved" in message
    assert "m/base.weight" not in message


def test_restore_still_demands_what_trains() -> None:
    saved, fresh = Adapted(2, 2), Adapted(2, 2)
    del saved.up
    message = refuse(ktrain.trainable(saved), ktrain.trainable(fresh))
    assert "m/up.weight: expected float32 [2, 2], found none stored" in message


def test_restore_of_a_base_of_other_names_is_refused() -> None:
    saved, fresh = Adapted(2, 2), Adapted(2, 2)
    fresh.base = nn.Linear(2, 2, bias=False).requires_grad_(False)
    message = refuse(ktrain.trainable(saved), ktrain.trainable(fresh))
    assert "m/base.bias: stored, but the module has no such tensor" in message


def test_restore_of_a_whole_checkpoint_fills_frozen_parameters_too() -> None:
    saved, fresh = Adapted(2, 2), Adapted(2, 2)
    needs = save_and_restore({"m": saved}, {"m": ktrain.trainable(fresh)})
    assert needs.notices == ()
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_parameter_that_freezes_on_the_way_is_left_out_of_the_next_snapshot() -> None:
    model = Adapted(2, 2)
    state = TrainState({"m": ktrain.trainable(model)})
    assert {item.shard.name for item in plan_save(state, ALONE).items} == {"m/down.weight", "m/up.weight"}
    model.down.requires_grad_(False)
    assert {item.shard.name for item in plan_save(state, ALONE).items} == {"m/up.weight"}


def test_tied_frozen_parameters_are_left_out_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    saved = snapshot(TrainState({"m": ktrain.trainable(model)}))
    assert {entry.shard.name for entry in saved[0].entries} == {"m/2.weight", "m/2.bias"}
    fresh = nn.Sequential(*(nn.Linear(3, 3, bias=at == 2) for at in range(3)))
    fresh[:2].requires_grad_(False)
    before = [fresh[0].weight.clone(), fresh[1].weight.clone()]
    restore(TrainState({"m": ktrain.trainable(fresh)}), {0: saved})
    assert torch.equal(fresh[2].weight, model[2].weight)
    assert torch.equal(fresh[0].weight, before[0]) and torch.equal(fresh[1].weight, before[1])


def test_frozen_parameter_that_cannot_be_stored_does_not_matter() -> None:
    model = Adapted(2, 2)
    model.base.weight = nn.Parameter(torch.empty(2, 2, device="meta"), requires_grad=False)
    assert len(plan_save(TrainState({"m": ktrain.trainable(model)}), ALONE).items) == 2


@pytest.mark.parametrize("value", [Holder(1), torch.optim.SGD([torch.zeros(1)], lr=1.0)])
def test_trainable_of_something_else_than_a_module_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="'m'.*takes a torch.nn.Module"):
        TrainState({"m": ktrain.trainable(value)})
