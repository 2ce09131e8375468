"""Everything a run needs to continue, as named parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ktrain.errors import ConfigError
from ktrain.state.module import ModulePart, Stored
from ktrain.state.optimizer import OptimizerPart
from ktrain.state.parts import Part
from ktrain.state.plain import PlainPart
from ktrain.state.rng import Generators

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class PerRank:
    """A part whose value differs between ranks: restored on the same world size, made anew on another."""

    value: Any


def per_rank(value: Any) -> PerRank:
    """Marks a part whose value differs between ranks, such as a data loader at its rank's own position."""
    return PerRank(value)


@dataclass(frozen=True, slots=True)
class Trainable:
    """A module of which only what trains is stored."""

    module: torch.nn.Module


def trainable(module: torch.nn.Module) -> Trainable:
    """Marks a module whose frozen parameters (`requires_grad` is false) are left out of snapshots.

    For adapters (LoRA) on a base that the program loads itself, before the restore, on every start. Buffers and
    extra state are stored as ever. A restore fills what the checkpoint has; frozen parameters that it left out stay as
    they are, which is said, and one that trains now is refused.
    """
    return Trainable(module)


def module_of(part: Any) -> torch.nn.Module | None:
    """The module that a part is, marked or not; None for other parts."""
    found = part.module if isinstance(part, Trainable) else part
    return found if isinstance(found, torch.nn.Module) else None


class TrainState:
    """Named parts, each with `state_dict` and `load_state_dict`. Use from the training thread.

    Raises:
        ConfigError: there is no part, a name is bad, or a part cannot be tracked.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ConfigError("state: expected at least one part, found none; give state={'model': model, ...}")
        made = [_make_part(name, value) for name, value in parts.items()]
        # Modules name the parameters of optimizers; generators come last, after all that may draw from them.
        self.parts: tuple[Part, ...] = tuple(sorted(made, key=_order))
        self.memo: Any = None  # of `plan_save`

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


def _make_part(name: Any, value: Any) -> Part:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"state: part {name!r}: expected a name of letters, digits, _ and - that begins with a letter; rename it"
        )
    inner = value.value if isinstance(value, PerRank) else value.module if isinstance(value, Trainable) else value
    if isinstance(value, Trainable) and not isinstance(inner, torch.nn.Module):
        raise ConfigError(
            f"state: part {name!r}: ktrain.trainable takes a torch.nn.Module, found {type(inner).__qualname__}"
        )
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(inner, method, None)):
            raise ConfigError(
                f"state: part {name!r}: expected an object with state_dict and load_state_dict, "
                f"found {type(inner).__module__}.{type(inner).__qualname__} without {method}"
            )
    if isinstance(value, PerRank | Generators):
        return PlainPart(name, inner, is_per_rank=True)
    if isinstance(value, Trainable):
        return ModulePart(name, value.module, Stored.TRAINABLE)
    if isinstance(value, torch.nn.Module):
        return ModulePart(name, value)
    if isinstance(value, torch.optim.Optimizer):
        return OptimizerPart(name, value)
    return PlainPart(name, value, is_per_rank=False)


def _order(part: Part) -> int:
    if isinstance(part, ModulePart):
        return 0
    if isinstance(part, OptimizerPart):
        return 1
    return 3 if part.is_per_rank else 2
