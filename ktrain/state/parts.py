"""What a part of a TrainState is to the planner, whichever object it wraps."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from ktrain.format import objects
from ktrain.format.shard import Role
from ktrain.state.saved import Reader, Wishes
from ktrain.state.tensors import Leaf, Spreads, is_dtensor, require_base_type, require_shape
from ktrain.state.topology import Topology


class OwnedParameter(NamedTuple):
    """A parameter of a tracked module: `name` is `part.path`, `leaf` the name its tensor is stored by."""

    name: str
    leaf: str
    is_replicated: bool


@dataclass(slots=True)
class Context:
    """What parts tell each other while a state is walked; modules come before optimizers."""

    topology: Topology
    parameters: ChainMap[int, OwnedParameter] = field(default_factory=ChainMap)  # by id of the parameter
    spreads: Spreads = field(default_factory=Spreads)

    def learn(self, owned: MutableMapping[int, OwnedParameter]) -> None:
        """Takes a module's parameters; one that several modules hold is named by the first."""
        self.parameters.maps.append(owned)


class Known(Protocol):
    """A part as it was when it was described. Holds none of its tensors."""

    @property
    def guarded(self) -> Sequence[int | None]:
        """For each leaf the id of the parameter that it changes with: itself, or the one whose state it is."""

    def again(self, context: Context) -> tuple[Sequence[torch.Tensor], dict[str, Any]] | None:
        """The rank's own parts of all leaves' tensors and the part's JSON, as `describe` would give them now.

        None where something but values has changed, or where it cannot be told at this price.
        """


class Part(Protocol):
    """A named member of a TrainState. Use from the training thread."""

    name: str
    kind: str  # a checkpoint's part loads only into a part of its kind
    is_per_rank: bool  # its value differs between ranks and means nothing on another world size

    def describe(self, context: Context) -> tuple[list[Leaf], dict[str, Any]]:
        """The part's tensors, live, and the JSON of everything else.

        Raises:
            ConfigError: something in it cannot be stored.
        """

    def know(self, leaves: Sequence[Leaf], about: dict[str, Any], context: Context) -> Known | None:
        """What `describe` has just returned, for a look instead of a walk the next time; None where there is none."""

    def plan(self, context: Context, wishes: Wishes) -> None:
        """Adds what the part needs of a checkpoint, and everything that does not fit. Changes nothing."""

    def load(self, saved_objects: Mapping[str, Any], reader: Reader, context: Context) -> None:
        """Takes the values that `plan` asked for."""

    def derive(self, seed: int) -> None:
        """Makes a per-rank part's value anew for another world size."""


class Collector:
    """Turns values into tagged JSON while it gathers their tensors as leaves."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._every_rank = tuple(range(context.topology.world_size))
        self.leaves: list[Leaf] = []

    def add(self, name: str, tensor: torch.Tensor, role: Role = Role.RANK, anchor: str | None = None) -> None:
        """A tensor under its name; DTensors are sharded, whatever the role given."""
        require_shape(name, tensor)
        holders: tuple[int, ...] = (self._context.topology.rank,)
        if is_dtensor(tensor):
            role, holders = Role.SHARDED, self._context.spreads.holders_of(tensor)
        elif role is Role.REPLICATED:
            holders = self._every_rank
        self.leaves.append(Leaf(name, tensor, role, holders, anchor or name))

    def encode(self, value: Any, path: str) -> Any:
        """The JSON of a value; its tensors become leaves named by their paths."""
        return objects.encode(value, tensor=self._tensor, path=path)

    def _tensor(self, value: Any, path: str) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.add(path, value)
        require_base_type(path, value)
        return path
