"""One look at many tensors: where their bytes lie and in what form. Finds everything but a change of values.

Twenty thousand tensors take a few milliseconds: their properties are read by a loop in C++. See ADR 0024.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ktrain import native
from ktrain.state.tensors import PLAIN_TYPES, is_dtensor

_SPECIFICATION, _INSIDE = "_spec", "_local_tensor"  # of a DTensor
_inside_of = operator.attrgetter(_SPECIFICATION, _INSIDE)


class Look:
    """What tensors were when they were looked at. Holds none of them, so none lives longer for it.

    An object that takes the number and the place of one that is gone, in the same form, is the same to a plan: its
    bytes lie at the same address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._num = len(tensors)
        dtensors = [tensor for tensor in tensors if is_dtensor(tensor)]
        # The specification of a DTensor is never changed; one of another placement is another object. They are kept, so
        # that no other object gets the number of one.
        self._specs = [_inside_of(tensor)[0] for tensor in dtensors]
        parts = list(map(inside_of, tensors))
        self.is_possible = all(type(part) in PLAIN_TYPES and not part.is_neg() for part in parts)
        """False where a tensor is of a class, or of a kind of view, whose bytes are not its values."""
        self._read = read_by_dlpack
        found = self._read(tensors, bool(dtensors)) if self.is_possible else None
        if self.is_possible and found is None:
            self._read = read_by_getters
            found = self._read(tensors, bool(dtensors))
        self._forms = None if found is None else found[0]

    def try_again(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
        """The rank's own parts of the tensors that were looked at, without views made for it.

        None where these are others, or where their bytes are not where they were in the same form.
        """
        if not self.is_possible or len(tensors) != self._num:
            return None
        found = self._read(tensors, bool(self._specs))
        return None if found is None or found[0] != self._forms else found[1]


def inside_of(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a DTensor, as it is; any other tensor itself."""
    part: torch.Tensor = _inside_of(tensor)[1] if is_dtensor(tensor) else tensor
    return part


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Takes the members at these places out of a sequence, in a loop in C."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: [values[place] for place in places]


Found: TypeAlias = "tuple[object, Sequence[torch.Tensor]]"
"""What tensors are besides their values, to be compared, and the tensors that have their bytes."""


def read_by_dlpack(tensors: Sequence[torch.Tensor], has_dtensors: bool) -> Found | None:
    """None where torch or DLPack cannot tell."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if has_dtensors:
        kind = sys.modules["torch.distributed.tensor"].DTensor
        around = native.Around(kind, _SPECIFICATION, _INSIDE, tuple(PLAIN_TYPES))
        return native.describe_parts(exchange, tensors, around)
    if not PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    forms = native.describe_tensors(exchange, tensors)
    return None if forms is None else (forms, tensors)


def read_by_getters(tensors: Sequence[torch.Tensor], has_dtensors: bool) -> Found | None:
    """The same by torch's getters: about five times as slow."""
    owners: list[Any] = []
    parts = tensors
    if has_dtensors:
        parts = list(map(inside_of, tensors))
        owners = [(id(tensor), id(_inside_of(tensor)[0])) for tensor in tensors if is_dtensor(tensor)]
    if not PLAIN_TYPES.issuperset(map(type, parts)):
        return None
    # Few at a time: then each tensor is fetched into the cache once, not once for each property.
    blocks = [parts[begin : begin + _BLOCK] for begin in range(0, len(parts), _BLOCK)]
    return (owners, [[list(map(get, block)) for get in _GETTERS] for block in blocks]), parts


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
