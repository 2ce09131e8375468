from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from ktrain.data.batch import lay_out_batch
from ktrain.data.order import SampleOrder
from ktrain.data.samples import Samples, evaluation_batches, map_tensors
from ktrain.errors import ConfigError

CPU = torch.device("cpu")


def samples(dataset: list, *, batch: int, world: int = 1, micro: int | None = None, rank: int = 0) -> Samples:
    layout = lay_out_batch(batch, world_size=world, micro_batch=micro)
    order = SampleOrder(5, len(dataset), batch)
    return Samples(dataset, order=order, layout=layout, rank=rank, device=CPU)


def used(data: Samples, num_steps: int) -> list[list[int]]:
    found = []
    for step in range(num_steps):
        data.position = step
        found.append([value for micro in data.micro_batches() for value in micro.tolist()])
    return found


def test_samples_any_world_and_micro_batch_are_the_same_global_batches() -> None:
    dataset = list(range(30))
    alone = used(samples(dataset, batch=12), 5)
    for world, micro in ((2, None), (2, 3), (4, 1), (3, 2)):
        ranks = [used(samples(dataset, batch=12, world=world, micro=micro, rank=rank), 5) for rank in range(world)]
        for step in range(5):
            assert sorted(value for rank in ranks for value in rank[step]) == sorted(alone[step])


def test_samples_loaded_state_go_on_where_the_other_stopped() -> None:
    dataset = list(range(30))
    first, second = samples(dataset, batch=6), samples(dataset, batch=6)
    first.position = 7
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second.micro_batches()] == [batch.tolist() for batch in first.micro_batches()]


def test_samples_state_of_other_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="length: 31 -> 30"):
        samples(list(range(30)), batch=6).load_state_dict(samples(list(range(31)), batch=6).state_dict())


def test_samples_of_dicts_and_tuples_are_collated() -> None:
    dataset = [{"x": torch.full((2,), float(i)), "pair": (i, i + 1)} for i in range(4)]
    batch = next(samples(dataset, batch=4).micro_batches())
    assert batch["x"].shape == (4, 2)
    assert sorted(batch["pair"][1].tolist()) == [1, 2, 3, 4]


def test_samples_data_set_that_reads_many_at_once_is_asked_once() -> None:
    class Batched(list):
        asked: list[list[int]] = []

        def __getitems__(self, indices: list[int]) -> list[int]:
            self.asked.append(indices)
            return [self[index] for index in indices]

    data = Batched(range(8))
    assert len(next(samples(data, batch=4).micro_batches())) == 4
    assert [len(asked) for asked in data.asked] == [4]


def test_evaluation_batches_rank_without_samples_takes_part_but_does_not_count() -> None:
    def batches(rank: int) -> list[tuple[list[int], bool]]:
        found = evaluation_batches([10, 11, 12, 13, 14], world_size=2, rank=rank, micro_batch=2, device=CPU)
        return [(batch.tolist(), counts) for batch, counts in found]

    assert batches(0) == [([10, 11], True), ([14], True)]
    assert batches(1) == [([12, 13], True), ([10], False)]


def test_map_tensors_nested_value_keeps_its_types() -> None:
    class Pair(NamedTuple):
        left: torch.Tensor
        right: str

    value = {"a": Pair(torch.ones(1), "x"), "b": [torch.ones(1), (2,)]}
    found = map_tensors(value, lambda tensor: tensor * 3)
    assert type(found["a"]) is Pair and found["a"].left.item() == 3 and found["a"].right == "x"
    assert found["b"][0].item() == 3 and found["b"][1] == (2,)
