"""Gradients of one step: from sums to means, their norm, and the clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor


def parameters_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Every parameter of the optimizers that has a gradient, in their order."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [value for group in groups for value in group["params"] if value.grad is not None]


def scale(parameters: Sequence[torch.Tensor], factor: float) -> None:
    """Multiplies every gradient by `factor`, in place, without a word to other ranks."""
    local = [_local(value.grad) for value in parameters if value.grad is not None]
    if local:
        torch._foreach_mul_(local, factor)


def norm(parameters: Sequence[torch.Tensor]) -> float:
    """The 2-norm over all gradients, the same on every rank; waits for the device."""
    total = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
    whole = total.full_tensor() if isinstance(total, DTensor) else total
    return float(whole)


def clip(parameters: Sequence[torch.Tensor], limit: float, total_norm: float) -> None:
    """Scales the gradients down where their norm is above `limit`."""
    if total_norm > limit:
        scale(parameters, limit / total_norm)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
