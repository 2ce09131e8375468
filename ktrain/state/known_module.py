"""A module that was described before: finds by one look at its dictionaries whether only values have changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch

from ktrain.state.look import Look, picker
from ktrain.state.parts import Context, OwnedParameter
from ktrain.state.tensors import Leaf

_TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_tree_of = operator.itemgetter(*_TREE)


def can_look(module: torch.nn.Module) -> bool:
    """Whether the module's state dict is what lies in its dictionaries: no hook and no method of its own."""
    found = list(module.modules())
    try:
        return all(map(_is_common, set(map(type, found)))) and not any(map(_has_own, map(vars, found)))
    except KeyError:  # a class that keeps them elsewhere
        return False


def loads_in_place(module: torch.nn.Module) -> bool:
    """Whether `load_state_dict` does nothing but copy values onto tensors: no hook and no method of its own."""
    found = list(module.modules())
    return all(map(_loads_as_common, set(map(type, found)))) and not any(map(_has_own_load, map(vars, found)))


class KnownModule:
    """Implements `Known`. Holds neither tensors nor submodules."""

    def __init__(
        self,
        module: torch.nn.Module,
        leaves: Sequence[Leaf],
        about: dict[str, Any],
        owned: MutableMapping[int, OwnedParameter],
    ) -> None:
        self._module = module
        self._about = about
        self._owned = owned
        found = _Walk(module)
        places = {id(tensor): at for at, tensor in reversed(list(enumerate(found.tensors)))}
        ids = [id(leaf.tensor) for leaf in leaves]
        self.is_possible = all(number in places for number in ids)
        """False where the state dict gave other tensors than the module has."""
        self.guarded: Sequence[int | None] = [number if number in owned else None for number in ids]
        self._shape = found.shape
        mine = [places[number] for number in ids] if self.is_possible else []
        self._leaves_of = picker(mine)
        # Under other names, and what is not stored: which of them is which, so that aliases are seen.
        self._rest_of = picker(sorted(set(range(len(found.tensors))).difference(mine)))
        self._rest = list(map(id, self._rest_of(found.tensors)))
        self._look = Look(self._leaves_of(found.tensors))
        self.is_possible = self.is_possible and self._look.is_possible

    def again(self, context: Context) -> tuple[Sequence[torch.Tensor], dict[str, Any]] | None:
        found = _Walk(self._module)
        if found.has_own or found.shape != self._shape:
            return None
        tensors = self._leaves_of(found.tensors)
        if type(None) in map(type, tensors):  # one was taken away
            return None
        if list(map(id, self._rest_of(found.tensors))) != self._rest:
            return None
        parts = self._look.try_again(tensors)
        if parts is None:
            return None
        context.learn(self._owned)
        return parts, self._about


class _Walk:
    """All that a module and its submodules hold, level by level. A submodule with two names comes twice."""

    def __init__(self, module: torch.nn.Module) -> None:
        modules: list[torch.nn.Module] = []
        level = [module]
        while level:
            modules += level
            level = [child for each in level for child in vars(each)["_modules"].values() if child is not None]
        dicts = list(map(vars, modules))
        trees = list(map(_tree_of, dicts))
        children, parameters, buffers, left_out = zip(*trees, strict=True)
        self.tensors: list[Any] = [*_values(parameters), *_values(buffers)]  # some None
        self.has_own = any(map(_has_own, dicts))
        self.shape = (
            list(map(type, modules)),
            [list(map(len, table)) for table in (children, parameters, buffers)],
            list(itertools.chain.from_iterable((*children, *parameters, *buffers))),
            [sorted(names) if names else None for names in left_out],
            [at for at, child in enumerate(_values(children)) if child is None],
        )


def _values(tables: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return itertools.chain.from_iterable(map(dict.values, tables))


def _is_common(kind: type[torch.nn.Module]) -> bool:
    common = torch.nn.Module
    return (
        kind.state_dict is common.state_dict
        and kind._save_to_state_dict is common._save_to_state_dict
        and kind.get_extra_state is common.get_extra_state
    )


def _loads_as_common(kind: type[torch.nn.Module]) -> bool:
    common = torch.nn.Module
    return (
        kind.load_state_dict is common.load_state_dict
        and kind._load_from_state_dict is common._load_from_state_dict
        and kind.set_extra_state is common.set_extra_state
    )


def _has_own_load(attributes: dict[str, Any]) -> bool:
    return bool(
        "load_state_dict" in attributes
        or "_load_from_state_dict" in attributes
        or attributes.get("_load_state_dict_pre_hooks")
        or attributes.get("_load_state_dict_post_hooks")
    )


def _has_own(attributes: dict[str, Any]) -> bool:
    if "state_dict" in attributes or "_save_to_state_dict" in attributes:
        return True
    before, after = attributes["_state_dict_pre_hooks"], attributes["_state_dict_hooks"]
    # fully_shard's own hook puts sharded parameters in the place of gathered ones. Where it would have something to
    # do, the look finds other tensors than the sharded ones, and the state dict is asked.
    return bool(after) or any(not _is_of_fully_shard(hook) for hook in before.values())


def _is_of_fully_shard(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard.")
