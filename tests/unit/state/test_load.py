"""What a module has of its own for loading runs on a restore, though its tensors have their values already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ktrain.state.known_module import loads_in_place
from tests.unit.state.worlds import save_and_restore

Calls = list[str]


def pre_hook(module: nn.Module, calls: Calls) -> None:
    module[0].register_load_state_dict_pre_hook(lambda *args: calls.append("pre"))


def post_hook(module: nn.Module, calls: Calls) -> None:
    module[1].register_load_state_dict_post_hook(lambda *args: calls.append("post"))


def own_method(module: nn.Module, calls: Calls) -> None:
    load = module.load_state_dict

    def counted(state: Any) -> Any:
        calls.append("own")
        return load(state)

    module.load_state_dict = counted  # type: ignore[method-assign,assignment]


def own_class(module: nn.Module, calls: Calls) -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            calls.append("class")
            super()._load_from_state_dict(*args, **kwargs)

    module[0] = Own(2, 2)


@pytest.mark.parametrize("give", [pre_hook, post_hook, own_method, own_class])
def test_restore_of_a_module_with_its_own_loading_runs_it(give: Callable[[nn.Module, Calls], None]) -> None:
    saved, fresh = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    calls: Calls = []
    give(fresh, calls)
    assert not loads_in_place(fresh)
    save_and_restore({"model": saved}, {"model": fresh})
    assert len(calls) == 1
    assert torch.equal(saved[1].weight, fresh[1].weight)


def test_restore_of_a_plain_module_fills_its_tensors_where_they_are() -> None:
    saved, fresh = (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))
    before = [tensor.data_ptr() for tensor in fresh.parameters()]
    assert loads_in_place(fresh)
    save_and_restore({"model": saved}, {"model": fresh})
    assert all(map(torch.equal, saved.parameters(), fresh.parameters()))
    assert [tensor.data_ptr() for tensor in fresh.parameters()] == before
