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

_INSIDE = operator.attrgetter("_spec", "_local_tensor")


class Look:
    """What tensors were when they were looked at. Holds none of them, so none lives longer for it.

    An object that takes the number and the place of one that is gone, in the same form, is the same to a plan: its
    bytes lie at the same address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._num = len(tensors)
        self._dtensors = [at for at, tensor in enumerate(tensors) if is_dtensor(tensor)]
        self._spread_of = picker(self._dtensors)
        self._owners = list(map(id, tensors)) if self._dtensors else []
        specs, parts = self._inside(tensors)
        self._specs = specs
        self.is_possible = all(type(part) in PLAIN_TYPES and not part.is_neg() for part in parts)
        """False where a tensor is of a class, or of a kind of view, whose bytes are not its values."""
        self._read = forms_by_dlpack
        self._forms = self._read(parts) if self.is_possible else None
        if self.is_possible and self._forms is None:
            self._read = forms_by_getters
            self._forms = self._read(parts)

    def try_again(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
        """The rank's own parts of the tensors that were looked at, without views made for it.

        None where these are others, or where their bytes are not where they were in the same form.
        """
        if not self.is_possible or len(tensors) != self._num:
            return None
        if self._dtensors and list(map(id, tensors)) != self._owners:
            return None
        specs, parts = self._inside(tensors)
        # The specification of a DTensor is never changed; one of another placement is another object.
        if not all(map(operator.is_, specs, self._specs)) or not PLAIN_TYPES.issuperset(map(type, parts)):
            return None
        return parts if self._read(parts) == self._forms else None

    def _inside(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], Sequence[torch.Tensor]]:
        """The specifications of the DTensors, and all tensors with the local parts in the place of these."""
        if not self._dtensors:
            return (), tensors
        specs, locals_ = zip(*map(_INSIDE, self._spread_of(tensors)), strict=True)
        parts = list(tensors)
        for at, part in zip(self._dtensors, locals_, strict=True):
            parts[at] = part
        return specs, parts


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
