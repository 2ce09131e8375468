"""Any other tracked object: a nested `state_dict()` of tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ktrain.format import objects
from ktrain.state.parts import Collector, Context
from ktrain.state.saved import Reader, Wishes, tensor_names
from ktrain.state.tensors import Leaf, is_dtensor, like


class PlainPart:
    """A scheduler, scaler, data loader, average of weights, generator, ...

    Its stored value replaces the live one as it is; of live tensors only device and sharding are kept.
    """

    kind = "plain"

    def __init__(self, name: str, value: Any, *, is_per_rank: bool) -> None:
        self.name = name
        self.is_per_rank = is_per_rank
        self._value = value

    def describe(self, context: Context) -> tuple[list[Leaf], dict[str, Any]]:
        collector = Collector(context)
        encoded = collector.encode(self._value.state_dict(), self.name)
        return collector.leaves, {"kind": self.kind, "per_rank": self.is_per_rank, "value": encoded}

    def know(self, leaves: Sequence[Leaf], about: dict[str, Any], context: Context) -> None:
        """Nothing: only the object itself knows what it will say the next time."""

    def plan(self, context: Context, wishes: Wishes) -> None:
        about = wishes.saved.objects(self.name) or {}
        live = self._live(context)
        for name in tensor_names(about.get("value")):
            found, own = wishes.saved.shape_and_dtype(name), live.get(name)
            if own is None:
                wishes.add_whole(name)
            elif found is not None and is_dtensor(own) and tuple(own.shape) == found[0]:
                wishes.add(name, wishes.spreads.box_of(own), device=own.device)
            else:
                wishes.add_whole(name, own.device)

    def load(self, saved_objects: Mapping[str, Any], reader: Reader, context: Context) -> None:
        leaves = self._live(context)

        def read(name: str) -> torch.Tensor:
            live = leaves.get(name)
            value = reader.create(name, "cpu" if live is None else live.device)
            if live is not None and is_dtensor(live) and tuple(live.shape) == reader.shape_and_dtype(name)[0]:
                return like(live, value)
            return value

        self._value.load_state_dict(objects.decode(saved_objects["value"], tensor=read))

    def derive(self, seed: int) -> None:
        """Seeds generators anew; any other value stays as the program made it."""
        reseed = getattr(self._value, "reseed", None)
        if reseed is not None:
            reseed(seed)

    def _live(self, context: Context) -> dict[str, torch.Tensor]:
        return {leaf.name: leaf.tensor for leaf in self.describe(context)[0]}
