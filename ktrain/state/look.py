"""One look at many tensors: where their bytes lie and in what form. Finds everything but a change of values.

Twenty thousand tensors take a few milliseconds: their properties are read by a loop in C++. See ADR 0024.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ktrain import native
from ktrain.state.tensors import PLAIN_TYPES, is_dtensor

_LOCAL, _SPEC = operator.attrgetter("_local_tensor"), operator.attrgetter("_spec")


class Look:
    """What tensors were when they were looked at. Holds none of them, so none lives longer for it.

    An object that takes the number and the place of one that is gone, in the same form, is the same to a plan: its
    bytes lie at the same address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._num = len(tensors)
        self._parts = Parts(tensors)
        self._owners = list(map(id, tensors)) if self._parts.num_spread else []
        self._specs = list(map(_SPEC, self._parts.spread_of(tensors)))
        parts = self._parts.of(tensors)
        self.is_possible = all(type(part) in PLAIN_TYPES and not part.is_neg() for part in parts)
        """False where a tensor is of a class, or of a kind of view, whose bytes are not its values."""
        self._read = forms_by_dlpack
        self._forms = self._read(parts) if self.is_possible else None
        if self.is_possible and self._forms is None:
            self._read = forms_by_getters
            self._forms = self._read(parts)

    def is_same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors that were looked at, their bytes where they were, in the same form."""
        if not self.is_possible or len(tensors) != self._num:
            return False
        if self._parts.num_spread:
            if list(map(id, tensors)) != self._owners:
                return False
            # The specification of a DTensor is never changed; one of another placement is another object.
            if not all(map(operator.is_, map(_SPEC, self._parts.spread_of(tensors)), self._specs)):
                return False
        parts = self._parts.of(tensors)
        return PLAIN_TYPES.issuperset(map(type, parts)) and self._read(parts) == self._forms


class Parts:
    """Takes a rank's own parts out of tensors of which always the same ones are DTensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._places = [at for at, tensor in enumerate(tensors) if is_dtensor(tensor)]
        self.num_spread = len(self._places)
        self.spread_of = picker(self._places)
        """Takes the DTensors out of them."""

    def of(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The local parts, of whatever class, without a view or a record in autograd made for it."""
        if not self.num_spread:
            return tensors
        parts = list(tensors)
        for at, part in zip(self._places, map(_LOCAL, self.spread_of(tensors)), strict=True):
            parts[at] = part
        return parts


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Takes the members at these places out of a sequence, in a loop in C."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: [values[place] for place in places]


def forms_by_dlpack(parts: Sequence[torch.Tensor]) -> object | None:
    """What plain tensors are besides their values; None where torch or DLPack cannot tell."""
    return native.describe_tensors(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), parts)


def forms_by_getters(parts: Sequence[torch.Tensor]) -> object | None:
    """The same by torch's getters: about five times as slow."""
    # Few at a time: then each tensor is fetched into the cache once, not once for each property.
    blocks = [parts[begin : begin + _BLOCK] for begin in range(0, len(parts), _BLOCK)]
    return [[list(map(get, block)) for get in _GETTERS] for block in blocks]


_BLOCK = 256
_GETTERS: tuple[Callable[[Any], Any], ...] = (
    id,
    type,
    torch.Tensor.data_ptr,
    torch.Tensor.get_device,  # an address is of one kind of device alone
    operator.attrgetter("dtype"),
    operator.attrgetter("shape"),
    torch.Tensor.stride,
)
