"""Stages of a pipeline cut anew: what is joined, what is refused, and what is only said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ktrain.errors import ConfigError
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import restore, snapshot


class Extra(nn.Linear):
    """A layer with something to store beside its tensors."""

    def __init__(self, said: Any = None) -> None:
        super().__init__(2, 2)
        self.said = said

    def get_extra_state(self) -> Any:
        return self.said

    def set_extra_state(self, state: Any) -> None:
        self.said = state


def stage(layers: Mapping[str, nn.Module], *, lr: float = 0.1, decays: float = 0.0) -> dict[str, Any]:
    """A stage with two groups of parameters, as models have them: weights and biases."""
    model = nn.ModuleDict(layers)
    groups = [
        {"params": [value for name, value in model.named_parameters() if name.endswith("weight")], "lr": lr},
        {"params": [value for name, value in model.named_parameters() if name.endswith("bias")], "lr": lr / 2},
    ]
    return {"model": model, "optimizer": torch.optim.AdamW(groups, weight_decay=decays)}


def save(*stages: dict[str, Any]) -> dict[int, Any]:
    return {rank: snapshot(TrainState(parts), Topology(rank, len(stages))) for rank, parts in enumerate(stages)}


def layers(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(2, 2) for name in names}


def test_stages_joined_on_one_rank_have_the_extra_state_and_options_of_each() -> None:
    saved = save(stage({"a": Extra({"seen": 3})}, lr=0.3), stage({"b": Extra({"seen": 5})}, lr=0.3))
    fresh = stage({"a": Extra(), "b": Extra()}, lr=0.9)
    restore(TrainState(fresh), saved)
    assert [fresh["model"][name].said for name in "ab"] == [{"seen": 3}, {"seen": 5}]
    assert [group["lr"] for group in fresh["optimizer"].param_groups] == [0.3, 0.15]


def test_stages_cut_anew_on_as_many_ranks_give_each_its_layers() -> None:
    before = [stage(layers("a")), stage(layers("b", "c"))]
    saved = save(*before)
    for rank, names in enumerate((("a", "b"), ("c",))):
        fresh = stage(layers(*names))
        assert restore(TrainState(fresh), saved, Topology(rank, 2)).notices == ()
        for name in names:
            twin = next(parts["model"][name] for parts in before if name in parts["model"])
            assert torch.equal(fresh["model"][name].weight, twin.weight)


def test_stages_whose_groups_had_other_options_are_refused_by_group() -> None:
    saved = save(stage(layers("a"), lr=0.3), stage(layers("b"), lr=0.4))
    with pytest.raises(ConfigError, match="optimizer: group 0: its parameters were stored with different options"):
        restore(TrainState(stage(layers("a", "b"))), saved)


def test_stage_with_a_name_that_no_stage_stored_is_refused() -> None:
    saved = save(stage(layers("a")), stage(layers("b")))
    with pytest.raises(ConfigError) as caught:
        restore(TrainState(stage(layers("a", "new"))), saved, Topology(0, 3))
    assert "model/new.weight: expected float32 [2, 2], found none stored" in str(caught.value)
    assert "optimizer: group 0: parameter model.new.weight: not stored" in str(caught.value)


def test_whole_model_cut_into_stages_says_what_each_leaves_out() -> None:
    saved = save(stage(layers("a", "b")))
    fresh = stage(layers("b"))
    needs = restore(TrainState(fresh), saved, Topology(1, 2))
    assert any("model/a.bias, model/a.weight" in notice for notice in needs.notices)
    assert any("optimizer: group 0: parameter model.a.weight" in notice for notice in needs.notices)


def test_whole_model_that_lost_a_layer_is_refused_on_as_many_ranks() -> None:
    saved = save(stage(layers("a", "b")), stage(layers("a", "b")))
    with pytest.raises(ConfigError) as caught:
        restore(TrainState(stage(layers("b"))), saved, Topology(1, 2))
    assert "model/a.bias: stored, but the module has no such tensor" in str(caught.value)
    assert "optimizer: group 1: parameter model.a.bias: stored, but not in the optimizer" in str(caught.value)


def test_tied_weight_whose_stage_was_cut_off_gets_its_value_from_the_one_that_was_stored() -> None:
    whole = nn.ModuleDict({"embed": nn.Linear(2, 3, bias=False), "head": nn.Linear(2, 3, bias=False)})
    whole["head"].weight = whole["embed"].weight
    saved = save({"model": whole})
    last = nn.ModuleDict({"head": nn.Linear(2, 3, bias=False)})
    restore(TrainState({"model": last}), saved, Topology(1, 2))
    assert torch.equal(last["head"].weight, whole["embed"].weight)


def test_optimizer_that_divided_its_work_among_the_ranks_is_joined_on_another_number_of_them() -> None:
    whole = nn.ModuleDict(layers("a", "b", "c"))
    ranks = []
    for mine in ("a", "b", "c"):
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.0, momentum=0.9)
        for value in whole[mine].parameters():
            value.grad = torch.full_like(value, float(ord(mine)))
        optimizer.step()
        optimizer.zero_grad()
        ranks.append({"model": whole, "optimizer": optimizer})
    fresh = nn.ModuleDict(layers("a", "b", "c"))
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5, momentum=0.1)
    restore(TrainState({"model": fresh, "optimizer": optimizer}), save(*ranks), Topology(1, 2))
    for name in ("a", "b", "c"):
        assert optimizer.state[fresh[name].weight]["momentum_buffer"].unique().tolist() == [float(ord(name))]
