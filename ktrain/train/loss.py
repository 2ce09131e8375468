"""Losses as sums with counts, so that the mean over a global batch is taken once and is the same on any
layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ktrain.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """The summed loss of one micro-batch and how many things (samples, tokens, bytes) it is the sum over.

    Gradients are those of the sum over the global batch divided by the count over the global batch. A mean
    per micro-batch would weigh samples by how they happen to be cut.
    """

    sum: torch.Tensor  # scalar, with its graph
    count: int | float | torch.Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.sum, torch.Tensor) or self.sum.numel() != 1:
            found = list(self.sum.shape) if isinstance(self.sum, torch.Tensor) else type(self.sum).__name__
            raise ConfigError(f"Loss: expected one summed value as a tensor, found {found}; reduce it with .sum()")

    def totals(self) -> torch.Tensor:
        """Sum and count, shape [2], float64, detached, on the loss's device."""
        total = self.sum.detach().reshape(()).double()
        return torch.stack([total, torch.as_tensor(self.count, dtype=torch.float64, device=total.device).reshape(())])


def as_loss(mean: torch.Tensor, batch: object) -> Loss:
    """A bare tensor as the mean over the leading dimension of its batch."""
    count = _leading_size(batch)
    if count is None:
        raise ConfigError("loss: the batch has no leading dimension to count; return ktrain.Loss(sum, count)")
    return Loss(mean * count, count)


def mean_over_ranks(totals: torch.Tensor, what: str) -> tuple[float, float]:
    """The global mean and the global count of `totals` ([sum, count], float64); the same on every rank.

    All ranks must call it together. `totals` is changed.

    Raises:
        ConfigError: the count is not above zero.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    total, count = totals.tolist()
    if math.isnan(count) or not count > 0:
        raise ConfigError(f"{what}: expected a count above 0 over all ranks, found {count:g}")
    return total / count, count


def _leading_size(batch: object) -> int | None:
    """The size of the leading dimension of the first tensor in a batch, or None where there is no such
    tensor."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return next((size for size in map(_leading_size, batch) if size is not None), None)
    return None
