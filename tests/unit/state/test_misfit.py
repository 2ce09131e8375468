"""A checkpoint that does not fit is refused whole; another world size makes per-rank parts anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ktrain.errors import ConfigError
from ktrain.state.rng import rng_part
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState, per_rank
from tests.unit.state.worlds import Holder, restore, save_and_restore, snapshot, world


def refuse(saved: dict[str, Any], fresh: dict[str, Any]) -> str:
    """The message; also proves that the module `m` was not touched."""
    before = {name: value.clone() for name, value in fresh["m"].state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        save_and_restore(saved, fresh)
    assert all(torch.equal(value, before[name]) for name, value in fresh["m"].state_dict().items())
    return str(caught.value)


def test_misfit_of_a_shape_names_tensor_expected_and_found() -> None:
    message = refuse({"m": nn.Linear(3, 2)}, {"m": nn.Linear(4, 2)})
    assert "m/weight: expected float32 [2, 4], found float32 [2, 3]" in message
    assert "m/bias" not in message
    assert "step 7" in message


def test_misfit_of_a_dtype_names_both() -> None:
    message = refuse({"m": nn.Linear(3, 2)}, {"m": nn.Linear(3, 2).half()})
    assert "m/bias: expected float16 [2], found float32 [2]" in message


def test_misfit_of_names_lists_missing_and_unexpected() -> None:
    message = refuse({"m": nn.Linear(3, 2)}, {"m": nn.Sequential(nn.Linear(3, 2, bias=False))})
    assert "m/bias: stored, but the module has no such tensor" in message
    assert "m/0.weight: expected float32 [2, 3], found none stored" in message


def test_misfit_of_parts_lists_both_sides() -> None:
    message = refuse({"m": nn.Linear(1, 1), "old": Holder(1)}, {"m": nn.Linear(1, 1), "new": Holder(1)})
    assert "new: the state has this part" in message
    assert "old: the checkpoint has this part" in message


def test_misfit_of_many_tensors_lists_ten_and_counts_the_rest() -> None:
    message = refuse({"m": nn.ParameterList([torch.zeros(1)] * 13)}, {"m": nn.ParameterList([torch.zeros(2)] * 13)})
    assert message.count("expected float32") == 10
    assert "and 3 more" in message


def test_misfit_of_an_optimizer_names_the_parameters() -> None:
    def parts(frozen: bool) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        return {"m": model, "o": torch.optim.SGD([model.weight] if frozen else model.parameters(), lr=0.1)}

    message = refuse(parts(frozen=True), parts(frozen=False))
    assert "o: group 0: parameter m.bias: not stored" in message


def test_misfit_of_a_parts_kind_is_named() -> None:
    message = refuse({"m": nn.Linear(1, 1), "x": Holder(1)}, {"m": nn.Linear(1, 1), "x": nn.Linear(1, 1)})
    assert "x: expected a part of kind 'module', found 'plain'" in message


def test_optimizer_with_parameters_in_another_order_gets_each_its_own() -> None:
    def parts(turn: int) -> dict[str, Any]:
        model = nn.Linear(2, 3)
        return {"m": model, "o": torch.optim.Adam([model.weight, model.bias][::turn], lr=0.1)}

    saved, fresh = parts(1), parts(-1)
    saved["m"].weight.grad, saved["m"].bias.grad = torch.ones(3, 2), torch.full((3,), 2.0)
    saved["o"].step()
    save_and_restore(saved, fresh)
    for name in ("weight", "bias"):
        expected = saved["o"].state[getattr(saved["m"], name)]["exp_avg"]
        assert torch.equal(fresh["o"].state[getattr(fresh["m"], name)]["exp_avg"], expected)


def make(rank: int) -> TrainState:
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(rank)
    loader = per_rank(Holder({"position": rank, "order": torch.tensor([rank])}))
    return TrainState({"m": model, "loader": loader, "rng": rng_part(Topology(rank, 4))})


def test_same_world_gives_every_rank_its_own_values() -> None:
    saved = world(make, size=4, per_node=2)
    model, loader = nn.BatchNorm1d(2), Holder(None)
    state = TrainState({"m": model, "loader": per_rank(loader), "rng": rng_part(Topology(3, 4))})
    needs = restore(state, saved, Topology(3, 4, 1, 2))
    assert needs.notices == ()
    assert model.running_mean.tolist() == [3.0, 3.0]
    assert loader.value == {"position": 3, "order": torch.tensor([3])}


def test_other_world_makes_per_rank_parts_anew_and_says_so() -> None:
    saved = world(make, size=4, per_node=2)
    draws = []
    for rank in range(2):
        model, loader = nn.BatchNorm1d(2), Holder("fresh")
        topology = Topology(rank, 2)
        state = TrainState({"m": model, "loader": per_rank(loader), "rng": rng_part(topology)})
        for _ in range(2):
            needs = restore(state, saved, topology)
            draws.append(float(torch.rand(())))
        assert loader.value == "fresh"
        assert model.running_mean.tolist() == [0.0, 0.0]
        assert [notice.split("'")[1] for notice in needs.notices] == ["loader", "rng"]
        assert "stored by 4 ranks" in needs.notices[0]
    assert draws[0] == draws[1]  # the same place in the run gives the same seed
    assert draws[2] == draws[3]
    assert draws[0] != draws[2]  # another rank another one


def test_snapshot_with_a_changed_byte_is_refused_at_fetch() -> None:
    from ktrain.errors import CorruptionError

    model = nn.Linear(3, 2)
    manifest, payload = snapshot(TrainState({"m": model}))
    bad = bytearray(payload)
    bad[-1] ^= 1
    with pytest.raises(CorruptionError, match="rank 0"):
        restore(TrainState({"m": model}), {0: (manifest, bytes(bad))})
