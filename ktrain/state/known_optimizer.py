"""An optimizer that was described before: finds by one look at its state whether only values have changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ktrain.format import objects
from ktrain.state.look import Look, picker
from ktrain.state.parts import Collector, Context, OwnedParameter
from ktrain.state.tensors import Leaf

_NEEDS = operator.attrgetter("requires_grad")
_PLAIN = frozenset({bool, int, float, str, type(None)})


class _OptimizerPart(Protocol):
    name: str
    optimizer: torch.optim.Optimizer

    def owned(self, context: Context) -> list[OwnedParameter]: ...


def can_look(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's state dict is what lies in its attributes: no hook and no method of its own."""
    attributes = vars(optimizer)
    return (
        type(optimizer).state_dict is torch.optim.Optimizer.state_dict
        and "state_dict" not in attributes
        and isinstance(attributes.get("state"), dict)
        and not attributes.get("_optimizer_state_dict_pre_hooks")
        and not attributes.get("_optimizer_state_dict_post_hooks")
    )


class KnownOptimizer:
    """Implements `Known`. Holds no tensor.

    Learning rates and all else in the groups, and step counts that are plain numbers, are read and encoded anew each
    time; only the names of the parameters are kept.
    """

    def __init__(self, part: _OptimizerPart, leaves: Sequence[Leaf], about: dict[str, Any], context: Context) -> None:
        self._part = part
        self._about = about
        self._named_by = context.parameters.maps[1:]
        self._names = [group.get("params") for group in about["groups"]]
        found = _Contents(part.optimizer)
        self._shape = found.shape
        places = [at for at, value in enumerate(found.values) if isinstance(value, torch.Tensor)]
        self._tensors_of = picker(places)
        tensors = self._tensors_of(found.values)
        others = [value for value in found.values if not isinstance(value, torch.Tensor)]
        self._look = Look(tensors)
        self.is_possible = (
            found.is_plain
            and None not in self._names
            and not about["other"]
            and self._look.is_possible
            and all(type(value) in _PLAIN for value in others)
            and [id(leaf.tensor) for leaf in leaves] == list(map(id, tensors))  # nothing in the groups is one
        )
        """False where the state has a form of its own."""
        if not self.is_possible:
            return
        of_value = [number for number, num in zip(found.owners, found.lengths, strict=True) for _ in range(num)]
        self.guarded: Sequence[int | None] = [of_value[at] for at in places]
        names = {id(param): owned.name for param, owned in zip(found.distinct(), part.owned(context), strict=True)}
        self._others = [
            (at, names[of_value[at]], found.keys[at])
            for at, value in enumerate(found.values)
            if not isinstance(value, torch.Tensor)
        ]

    def again(self, context: Context) -> tuple[Sequence[torch.Tensor], dict[str, Any]] | None:
        if not can_look(self._part.optimizer) or not _are_same(context.parameters.maps[1:], self._named_by):
            return None
        found = _Contents(self._part.optimizer)
        if not found.is_plain or found.shape != self._shape:
            return None
        parts = self._look.try_again(self._tensors_of(found.values))
        if parts is None:
            return None
        collector = Collector(context)
        groups = [self._group(at, group, collector) for at, group in enumerate(self._part.optimizer.param_groups)]
        values: dict[str, dict[str, Any]] = {}
        for at, name, key in self._others:
            path = objects.child_path(objects.child_path(self._part.name, name), key)
            values.setdefault(name, {})[key] = collector.encode(found.values[at], path)
        if collector.leaves or any("$" in group for group in groups):
            return None  # a value became a tensor, or a group has keys that JSON writes in another form
        return parts, {**self._about, "groups": groups, "values": values}

    def _group(self, at: int, group: dict[str, Any], collector: Collector) -> Any:
        # As torch's own state dict orders it: the parameters last.
        rest = {key: value for key, value in group.items() if key != "params"}
        encoded = collector.encode(rest, f"{self._part.name}/param_groups/{at}")
        return {**encoded, "params": self._names[at]}


class _Contents:
    """What an optimizer holds, as flat lists."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        entries = list(optimizer.state.values())
        self._flat = list(itertools.chain.from_iterable(groups))
        self.parameters = list(map(id, self._flat))
        self.owners = list(map(id, optimizer.state))
        self.is_plain = set(map(type, entries)) <= {dict} and set(self.owners) <= set(self.parameters)
        self.lengths: list[int] = list(map(len, entries)) if self.is_plain else []
        self.keys: list[str] = list(itertools.chain.from_iterable(entries)) if self.is_plain else []
        self.values: list[Any] = list(itertools.chain.from_iterable(map(dict.values, entries))) if self.is_plain else []
        self.shape = (
            self.parameters,
            list(map(_NEEDS, self._flat)),  # says whether a parameter may lack state
            list(map(len, groups)),
            self.owners,
            self.lengths,
            self.keys,
            list(map(type, self.values)),
        )

    def distinct(self) -> list[torch.Tensor]:
        """Every parameter once, in the order of torch's indices."""
        return list({id(param): param for param in self._flat}.values())


def _are_same(found: Sequence[object], expected: Sequence[object]) -> bool:
    return len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))
