"""A tracked `torch.optim.Optimizer`: its state by parameter name.

The optimizer is never initialised or stepped: one without state is stored as such, and a fresh one gets the
stored state through its own `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ktrain.errors import ConfigError, InternalError
from ktrain.format import objects
from ktrain.format.shard import Role
from ktrain.state.known_optimizer import KnownOptimizer, can_look
from ktrain.state.parts import Collector, Context, OwnedParameter
from ktrain.state.saved import Reader, Wishes
from ktrain.state.stages import join_optimizer
from ktrain.state.tensors import Leaf, dtype_name, is_dtensor, like, local_of


class OptimizerPart:
    """An optimizer. Its parameters are named as the tracked modules name them, others `group.index`."""

    kind = "optimizer"
    is_per_rank = False

    def __init__(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise ConfigError(
                f"part {name!r}: ZeroRedundancyOptimizer gives its state only to one rank; use fully_shard instead"
            )
        self.name = name
        self.optimizer = optimizer

    def describe(self, context: Context) -> tuple[list[Leaf], dict[str, Any]]:
        state = self.optimizer.state_dict()
        owned = self.owned(context)
        live = list(parameters_of(self.optimizer))
        collector = Collector(context)
        # Where a parameter that trains has no state here, other ranks may hold it (optimizers that divide the
        # work by parameter): then nothing may be left to another rank to store.
        has_all = all(index in state["state"] for index, p in enumerate(live) if p.requires_grad)
        tensors: dict[str, list[str]] = {}
        values: dict[str, dict[str, Any]] = {}
        other: dict[str, Any] = {}
        for index, entry in state["state"].items():
            if not isinstance(index, int) or index >= len(live) or not isinstance(entry, dict):
                other[self.text(index)] = collector.encode(entry, objects.child_path(f"{self.name}/other", index))
                continue
            param, names = live[index], owned[index]
            path = objects.child_path(self.name, names.name)
            for key, value in entry.items():
                leaf = objects.child_path(path, self.text(key))
                if isinstance(value, torch.Tensor):
                    replicated = has_all and names.is_replicated and value.shape == param.shape
                    collector.add(leaf, value, Role.REPLICATED if replicated else Role.RANK, names.leaf)
                    tensors.setdefault(names.name, []).append(key)
                else:
                    values.setdefault(names.name, {})[key] = collector.encode(value, leaf)
            tensors.setdefault(names.name, [])
        groups = self.encode_groups(state["param_groups"], owned, collector)
        about = {"kind": self.kind, "groups": groups, "values": values, "other": other, **_pack(tensors)}
        return collector.leaves, about

    def know(self, leaves: Sequence[Leaf], about: dict[str, Any], context: Context) -> KnownOptimizer | None:
        known = KnownOptimizer(self, leaves, about, context) if can_look(self.optimizer) else None
        return known if known is not None and known.is_possible else None

    def plan(self, context: Context, wishes: Wishes) -> None:
        owned = self.owned(context)
        groups = self.optimizer.state_dict()["param_groups"]
        about = join_optimizer(self.name, [[owned[at].name for at in group["params"]] for group in groups], wishes)
        if about is None:
            return
        wishes.objects[self.name] = about
        indices = {names.name: index for index, names in enumerate(owned)}
        live = list(parameters_of(self.optimizer))
        for name, keys in _unpack(about).items():
            param = live[indices[name]]
            for key in keys:
                self._wish(self._leaf(name, key), param, key, wishes)
        for value in (*about["values"].values(), *about["other"].values(), *about["groups"]):
            wishes.add_all(value)

    def load(self, saved_objects: Mapping[str, Any], reader: Reader, context: Context) -> None:
        owned = self.owned(context)
        live = list(parameters_of(self.optimizer))
        indices = {names.name: index for index, names in enumerate(owned)}
        state: dict[Any, Any] = {}
        for name, keys in _unpack(saved_objects).items():
            param = live[indices[name]]
            entry = {key: self._read(self._leaf(name, key), param, key, reader) for key in keys}
            for key, value in saved_objects["values"].get(name, {}).items():
                entry[key] = _decode(value, reader, param.device)
            state[indices[name]] = entry
        for key, value in saved_objects["other"].items():
            state[key] = _decode(value, reader, torch.device("cpu"))
        groups = self._decode_groups(saved_objects["groups"], indices, reader)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._keep_dtypes(state, live)

    def derive(self, seed: int) -> None:
        raise InternalError(f"part {self.name!r} is an optimizer and belongs to no rank alone")

    def owned(self, context: Context) -> list[OwnedParameter]:
        """The names of all parameters, in the order of torch's indices."""
        found: dict[int, OwnedParameter] = {}
        for group_index, group in enumerate(self.optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                name = f"{group_index}.{index}"
                unowned = OwnedParameter(name, f"{self.name}/{name}", False)
                found.setdefault(id(param), context.parameters.get(id(param), unowned))
        return list(found.values())

    def _leaf(self, name: str, key: str) -> str:
        return objects.child_path(objects.child_path(self.name, name), key)

    def text(self, key: Any) -> str:
        if not isinstance(key, str):
            raise ConfigError(f"part {self.name!r}: expected text as keys of optimizer state, found {key!r}")
        return key

    def encode_groups(
        self, groups: list[dict[str, Any]], owned: list[OwnedParameter], collector: Collector
    ) -> list[Any]:
        named = [{**group, "params": [owned[index].name for index in group["params"]]} for group in groups]
        return [collector.encode(group, f"{self.name}/param_groups/{at}") for at, group in enumerate(named)]

    def _decode_groups(self, groups: list[Any], indices: Mapping[str, int], reader: Reader) -> list[dict[str, Any]]:
        """The stored groups, with this optimizer's parameters in its own order."""
        decoded = []
        for live, encoded in zip(self.optimizer.state_dict()["param_groups"], groups, strict=True):
            lr = live.get("lr")
            device = lr.device if isinstance(lr, torch.Tensor) else torch.device("cpu")
            group = _decode(encoded, reader, device)
            assert {indices[name] for name in group["params"]} == set(live["params"])
            decoded.append({**group, "params": _Indices(live["params"])})
        return decoded

    def _wish(self, leaf: str, param: torch.Tensor, key: str, wishes: Wishes) -> None:
        found = wishes.saved.shape_and_dtype(leaf)
        if found is None:
            wishes.problems.append(f"{leaf}: named by its part, but not stored")
            return
        live = self._live(param, key)
        if live is not None and (tuple(live.shape), dtype_name(live.dtype)) == found:
            wishes.add(leaf, wishes.spreads.box_of(live), into=local_of(live))
        elif is_dtensor(param) and tuple(param.shape) == found[0]:
            wishes.add(leaf, wishes.spreads.box_of(param), device=local_of(param).device)
        else:
            wishes.add_whole(leaf, _device(param, key))

    def _read(self, leaf: str, param: torch.Tensor, key: str, reader: Reader) -> torch.Tensor:
        """The live tensor with the stored value, or a new one spread as the parameter is."""
        live = self._live(param, key)
        shape, dtype = reader.shape_and_dtype(leaf)
        if live is not None and tuple(live.shape) == shape and dtype_name(live.dtype) == dtype:
            reader.fill(leaf, local_of(live))
            return live
        if is_dtensor(param) and tuple(param.shape) == shape:
            return like(param, reader.create(leaf, local_of(param).device))
        return reader.create(leaf, _device(param, key))

    def _live(self, param: torch.Tensor, key: str) -> torch.Tensor | None:
        # `in` first: the state is a defaultdict, and looking must not give a fresh optimizer state.
        entry = self.optimizer.state[param] if param in self.optimizer.state else {}
        value = entry.get(key) if isinstance(entry, dict) else None
        return value if isinstance(value, torch.Tensor) else None

    def _keep_dtypes(self, state: Mapping[Any, Any], live: list[torch.Tensor]) -> None:
        """torch casts state to its parameter's dtype; state that was kept in another one gets it back."""
        for index, entry in state.items():
            if not isinstance(index, int):
                continue
            for key, value in self.optimizer.state[live[index]].items():
                given = entry.get(key)
                if key != "step" and isinstance(given, torch.Tensor) and given.dtype != value.dtype:
                    self.optimizer.state[live[index]][key] = given.to(value.device)


class _Indices(list[int]):
    """The parameters of a group, found at once: torch looks each one up for every tensor of its state."""

    def __init__(self, indices: Iterable[int] = ()) -> None:
        super().__init__(indices)
        self._known = frozenset(self)

    def __contains__(self, index: object) -> bool:
        return index in self._known


def _device(param: torch.Tensor, key: str) -> torch.device:
    """Where a tensor of state is made: a step counter on the host, load_state_dict moves it where it is wanted."""
    return torch.device("cpu") if key == "step" else param.device


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every parameter once, in the order of the indices of `state_dict()`."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) not in seen:
                seen.add(id(param))
                yield param


def _pack(tensors: Mapping[str, list[str]]) -> dict[str, Any]:
    """Nearly all parameters have the same keys: each distinct list is written once."""
    lists: list[list[str]] = []
    state: dict[str, int] = {}
    for name, keys in tensors.items():
        if keys not in lists:
            lists.append(keys)
        state[name] = lists.index(keys)
    return {"keys": lists, "state": state}


def _unpack(about: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: about["keys"][index] for name, index in about["state"].items()}


def _decode(encoded: Any, reader: Reader, device: torch.device) -> Any:
    return objects.decode(encoded, tensor=partial(reader.create, device=device))
