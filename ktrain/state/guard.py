"""Which optimizers say when they are about to change what they own. See ADR 0010 for the cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ktrain import device
from ktrain.state.optimizer import OptimizerPart
from ktrain.state.train_state import TrainState


class UpdateGuard:
    """Calls `before_update` in front of every step of any optimizer of this process that torch announces.

    Use from the training thread. `before_update` raises nothing.
    """

    def __init__(self, state: TrainState, before_update: Callable[[], None]) -> None:
        self._optimizers = {part.name: part.optimizer for part in state.parts if isinstance(part, OptimizerPart)}
        self._before_update = before_update
        self._fired: set[int] = set()  # by id
        self._was_captured = False
        # Of all optimizers: one that the state does not name may own the same parameters.
        self._handle = register_optimizer_step_pre_hook(self._on_step)

    def take_sure(self) -> frozenset[str]:
        """The parts whose hook was seen to fire since the last call, and stands in front of any step that they take."""
        fired, self._fired = self._fired, set()
        if self._was_captured:
            return frozenset()
        return frozenset(
            name for name, optimizer in self._optimizers.items() if id(optimizer) in fired and _is_announced(optimizer)
        )

    def close(self) -> None:
        """Takes the hook away."""
        self._handle.remove()

    def _on_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        # While it is traced it must leave no trace: `fullgraph=True` would fail, and a graph break would cost time.
        if torch.compiler.is_compiling():
            return
        if device.is_capturing():
            self._was_captured = True  # a replay of the graph will call no hook
        self._fired.add(id(optimizer))
        self._before_update()


def _is_announced(optimizer: torch.optim.Optimizer) -> bool:
    """Whether no way to the optimizer's step is known that goes around torch's hooks."""
    of_class = type(optimizer).step
    if not getattr(of_class, "hooked", False) or any(group.get("capturable") for group in optimizer.param_groups):
        return False
    own = vars(optimizer).get("step")
    if own is None:
        return True
    # A learning rate scheduler counts steps by a wrapper. By its code, since wrappers copy each other's names.
    function = getattr(own, "__func__", own)
    code = getattr(function, "__code__", None)
    return (
        code is not None
        and code.co_filename == lr_scheduler.__file__
        and getattr(function, "__wrapped__", None) is of_class
    )
