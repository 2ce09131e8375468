"""A data set in its order: what a session iterates, and the data position that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

from ktrain.data.batch import BatchLayout, share_out
from ktrain.data.order import SampleOrder


class Dataset(Protocol):
    """Anything with a length and samples by number: a list, a torch map-style data set, an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Samples:
    """One rank's view of a shuffled data set; its state is five integers, the same on every rank."""

    def __init__(
        self, dataset: Dataset, *, order: SampleOrder, layout: BatchLayout, rank: int, device: torch.device
    ) -> None:
        assert order.global_batch == layout.global_batch
        self.order = order
        self.layout = layout
        self.position = 0  # global batches already used
        self._dataset = dataset
        self._rank = rank
        self._device = device

    def micro_batches(self) -> Iterator[Any]:
        """This rank's micro-batches of the batch at `position`, collated, on the device; does not move on."""
        for part in self.layout.parts(self.order.indices(self.position), self._rank):
            yield load_batch(self._dataset, part.tolist(), self._device)

    def state_dict(self) -> dict[str, int]:
        return self.order.state(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a stored position.

        Raises:
            ConfigError: the position is that of another seed, data length or global batch.
        """
        self.position = self.order.step_of(state)


def load_batch(dataset: Dataset, indices: Iterable[int], device: torch.device) -> Any:
    """The samples of the given numbers, collated by torch's default rules, on the device."""
    fetch = getattr(dataset, "__getitems__", None)  # torch's own convention for reading many samples at once
    numbers = list(indices)
    samples = fetch(numbers) if fetch is not None else [dataset[number] for number in numbers]
    return map_tensors(default_collate(samples), lambda tensor: tensor.to(device, non_blocking=True))


def evaluation_batches(
    dataset: Dataset, *, world_size: int, rank: int, micro_batch: int, device: torch.device
) -> Iterator[tuple[Any, bool]]:
    """This rank's batches of one pass over the data, each with whether it counts.

    A rank that has no sample left gets sample 0 with False: it has to take part in a sharded forward pass,
    but what it computes must not enter the mean.
    """
    for part in share_out(len(dataset), world_size=world_size, rank=rank, micro_batch=micro_batch):
        yield load_batch(dataset, part or (0,), device), bool(part)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nesting of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value
