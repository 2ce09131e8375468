"""A plan by one look: it is the plan that a walk would give, whatever happened to the state since the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ktrain.state.plan import SavePlan, plan_save
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import ALONE, Holder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4)
        self.square = nn.Parameter(torch.randn(3, 3))
        self.tied = self.head.weight
        self.register_buffer("seen", torch.zeros(2))
        self.empty: nn.Module | None = None


class Setup:
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.1)
        self.position = Holder({"at": 1, "mean": torch.zeros(2)})
        self.step()
        self.state = TrainState(self.parts)
        self.plan()

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "position": self.position}

    def step(self) -> None:
        self.optimizer.zero_grad()
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def plan(self) -> SavePlan:
        return plan_save(self.state, ALONE)


def require_same(found: SavePlan, expected: SavePlan) -> None:
    assert found.layout == expected.layout
    assert found.digest == expected.digest
    assert found.objects == expected.objects
    assert list(found.objects) == list(expected.objects)
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        form = (one.data_ptr(), one.shape, one.stride(), one.dtype)
        assert form == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    assert found.places.guards == expected.places.guards
    assert found.places.moving == expected.places.moving


def require_as_walked(setup: Setup) -> None:
    """The plan of a state that was planned before is that of one that never was."""
    fresh = plan_save(TrainState(setup.parts), ALONE)
    require_same(setup.plan(), fresh)
    require_same(setup.plan(), fresh)


def is_by_look(setup: Setup) -> bool:
    """Whether the next plan keeps what the last one knew of places."""
    before = setup.plan().places
    return setup.plan().places is before


def replace_parameter(s: Setup) -> None:
    s.model.square = nn.Parameter(torch.randn(3, 3))


def put_other_data(s: Setup) -> None:
    s.model.square.data = torch.randn(3, 3)


def halve(s: Setup) -> None:
    s.model.head.half()


def reinterpret(s: Setup) -> None:
    s.model.seen = s.model.seen.view(torch.int32)


def reshape(s: Setup) -> None:
    s.model.seen.unsqueeze_(0)


def shrink(s: Setup) -> None:
    s.model.seen.resize_(1)


def add_parameter(s: Setup) -> None:
    s.model.body.register_parameter("extra", nn.Parameter(torch.ones(2)))


def add_buffer(s: Setup) -> None:
    s.model.body[0].register_buffer("mask", torch.ones(2))


def add_module(s: Setup) -> None:
    s.model.empty = nn.Linear(2, 2)


def remove_parameter(s: Setup) -> None:
    s.model.square = None


def rename_parameter(s: Setup) -> None:
    value = s.model._parameters.pop("square")
    s.model.register_parameter("cube", value)


def forget_buffer(s: Setup) -> None:
    s.model._non_persistent_buffers_set.add("seen")


def untie(s: Setup) -> None:
    s.model.tied = nn.Parameter(s.model.head.weight.detach().clone())


def tie(s: Setup) -> None:
    s.model.body[0].weight = s.model.head.weight


def share_memory(s: Setup) -> None:
    s.model.body[0].weight.data = s.model.head.weight.data


def swap_modules(s: Setup) -> None:
    s.model.body[0] = nn.Linear(4, 4)


def hook_state_dict(s: Setup) -> None:
    def drop(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        state.pop(f"{prefix}1.running_mean", None)

    s.model.body.register_state_dict_post_hook(drop)


def own_state_dict(s: Setup) -> None:
    only = torch.ones(1)
    s.model.state_dict = lambda *args, **kwargs: {"only": only}  # type: ignore[method-assign]


def entry_of_square(s: Setup) -> dict[str, Any]:
    if s.model.square not in s.optimizer.state:
        raise KeyError("no state")
    found: dict[str, Any] = s.optimizer.state[s.model.square]
    return found


def replace_moment(s: Setup) -> None:
    entry_of_square(s)["exp_avg"] = torch.zeros(3, 3)


def add_moment(s: Setup) -> None:
    entry_of_square(s)["master"] = torch.zeros(3, 3)


def drop_state(s: Setup) -> None:
    del s.optimizer.state[s.model.square]


def count_by_number(s: Setup) -> None:
    entry_of_square(s)["step"] = 7


def reload_optimizer(s: Setup) -> None:
    s.optimizer.load_state_dict(s.optimizer.state_dict())


def change_rate(s: Setup) -> None:
    s.optimizer.param_groups[0]["lr"] *= 0.5


def rate_as_tensor(s: Setup) -> None:
    s.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)


def odd_group_key(s: Setup) -> None:
    s.optimizer.param_groups[0][3] = "three"


def add_group(s: Setup) -> None:
    s.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})


def freeze(s: Setup) -> None:
    s.model.head.weight.requires_grad_(False)


def hook_optimizer(s: Setup) -> None:
    s.optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "state": {}})


def move_position(s: Setup) -> None:
    s.position.value = {"at": 2, "mean": torch.ones(2)}


def grow_position(s: Setup) -> None:
    s.position.value = {"at": 2, "mean": torch.ones(3)}


def nothing(s: Setup) -> None:
    del s


CHANGES: list[Callable[[Setup], None]] = [
    replace_parameter, put_other_data, halve, reinterpret, reshape, shrink, add_parameter, add_buffer, add_module,
    remove_parameter, rename_parameter, forget_buffer, untie, tie, share_memory, swap_modules, hook_state_dict,
    own_state_dict, replace_moment, add_moment, drop_state, count_by_number, reload_optimizer, change_rate,
    rate_as_tensor, odd_group_key, add_group, freeze, hook_optimizer, move_position, grow_position, nothing,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_plan_after_a_change_is_that_of_a_state_never_planned(change: Callable[[Setup], None]) -> None:
    setup = Setup()
    change(setup)
    require_as_walked(setup)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(CHANGES), min_size=2, max_size=5))
def test_plan_after_any_changes_is_that_of_a_state_never_planned(changes: list[Callable[[Setup], None]]) -> None:
    setup = Setup()
    for change in changes:
        try:
            change(setup)
        except (AttributeError, KeyError, RuntimeError, TypeError):  # the change before has taken its object away
            continue
        require_as_walked(setup)


def test_plan_of_changed_values_is_made_by_a_look() -> None:
    setup = Setup()
    setup.step()
    with torch.no_grad():
        setup.model.square.add_(1)
    setup.optimizer.param_groups[0]["lr"] = 0.5
    setup.position.value = {"at": 9, "mean": torch.ones(2)}
    assert is_by_look(setup)
    assert setup.plan().objects["optimizer"]["groups"][0]["lr"] == 0.5
    assert setup.plan().objects["position"]["value"]["at"] == 9


@pytest.mark.parametrize("change", [replace_parameter, put_other_data, reshape, add_buffer, replace_moment, freeze])
def test_plan_after_a_change_is_by_a_look_again_from_the_second_on(change: Callable[[Setup], None]) -> None:
    setup = Setup()
    before = setup.plan().places
    change(setup)
    assert setup.plan().places is not before
    assert is_by_look(setup)


def test_module_with_extra_state_is_asked_for_it_each_time() -> None:
    class Counting(nn.Linear):
        asked = 0

        def get_extra_state(self) -> int:
            self.asked += 1
            return self.asked

        def set_extra_state(self, state: int) -> None:
            self.asked = state

    state = TrainState({"model": Counting(2, 2)})
    found = [plan_save(state, ALONE).objects["model"]["extra"]["_extra_state"] for _ in range(3)]
    assert found == [1, 2, 3]


def test_state_dict_hook_that_gives_other_values_is_honoured_each_time() -> None:
    model = nn.Linear(2, 2, bias=False)
    given_out = []

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        given_out.append(torch.full((2, 2), float(len(given_out))))
        state[f"{prefix}weight"] = given_out[-1]

    model.register_state_dict_post_hook(hook)
    state = TrainState({"model": model})
    for number in range(3):
        plan = plan_save(state, ALONE)
        assert plan.tensors[0].eq(number).all()
        assert plan.places.guards == ((),)


def test_number_in_optimizer_state_is_read_each_time() -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = TrainState({"model": model, "optimizer": optimizer})
    for number in range(3):
        optimizer.state[model.weight]["tries"] = number
        plan = plan_save(state, ALONE)
        assert plan.objects["optimizer"]["values"] == {"model.weight": {"tries": number}}


def test_plan_keeps_no_tensor_alive() -> None:
    import gc
    import weakref

    setup = Setup()
    moment = weakref.ref(setup.optimizer.state[setup.model.square]["exp_avg"])
    parameter = weakref.ref(setup.model.square)
    del setup.optimizer.state[setup.model.square]
    setup.optimizer.param_groups[0]["params"] = [p for p in setup.model.parameters() if p is not setup.model.square]
    setup.model.square = nn.Parameter(torch.zeros(3, 3))
    gc.collect()
    assert moment() is None and parameter() is None


def test_guards_name_every_optimizer_that_has_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    one = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
    two = torch.optim.SGD(list(model[0].parameters()), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    one.step()
    plan = plan_save(TrainState({"model": model, "one": one, "two": two}), ALONE)
    guards = {entry.key: guard for entry, guard in zip(plan.layout.entries, plan.places.guards, strict=True)}
    assert guards["model/0.weight"] == ("one", "two")
    assert guards["one/model.0.weight/momentum_buffer"] == ("one", "two")
    assert guards["model/1.weight"] == () and guards["model/2.running_mean"] == ()
