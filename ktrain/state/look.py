"""One look at many tensors: where their bytes lie and in what form. Finds everything but a change of values.

Twenty thousand tensors take a few milliseconds: each property is read for all of them by a loop in C.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ktrain.state.tensors import PLAIN_TYPES, is_dtensor

_BLOCK = 256
_DTYPE, _SHAPE = operator.attrgetter("dtype"), operator.attrgetter("shape")


class Look:
    """What tensors were when they were looked at. Holds none of them, so none lives longer for it.

    An object that takes the number and the place of one that is gone, in the same form, is the same to a plan: its
    bytes lie at the same address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._dtensors = [at for at, tensor in enumerate(tensors) if is_dtensor(tensor)]
        self._specs = [_spec(tensors[at]) for at in self._dtensors]
        parts = self.locals_of(tensors)
        self.is_possible = all(type(part) in PLAIN_TYPES and not part.is_neg() for part in parts)
        """False where a tensor is of a class, or of a kind of view, whose bytes are not its values."""
        self._owners = list(map(id, tensors)) if self._dtensors else []
        self._forms = [_form(block) for block in _blocks(parts)] if self.is_possible else []
        contiguous = [is_contiguous for form in self._forms for is_contiguous in form[-1]]
        self._uneven = [at for at, is_contiguous in enumerate(contiguous) if not is_contiguous]
        self._strides = [parts[at].stride() for at in self._uneven]

    def is_same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors that were looked at, their bytes where they were, in the same form."""
        if not self.is_possible or len(tensors) != sum(len(form[0]) for form in self._forms):
            return False
        if self._dtensors:
            if list(map(id, tensors)) != self._owners:
                return False
            # The specification of a DTensor is never changed; one of another placement is another object.
            if not all(map(operator.is_, [_spec(tensors[at]) for at in self._dtensors], self._specs)):
                return False
        parts = self.locals_of(tensors)
        # Strides follow from the shape where there are no holes.
        return (
            all(map(operator.eq, map(_form, _blocks(parts)), self._forms))
            and [parts[at].stride() for at in self._uneven] == self._strides
        )

    def locals_of(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The rank's own parts, without a view or a record in autograd made for it."""
        if not self._dtensors:
            return tensors
        parts = list(tensors)
        for at in self._dtensors:
            parts[at] = parts[at]._local_tensor  # type: ignore[attr-defined]
        return parts


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Takes the members at these places out of a sequence, in a loop in C."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: [values[place] for place in places]


def _blocks(tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    """Few at a time: then each tensor is fetched into the cache once, not once for each property."""
    for begin in range(0, len(tensors), _BLOCK):
        yield tensors[begin : begin + _BLOCK]


def _form(parts: Sequence[torch.Tensor]) -> list[list[Any]]:
    return [
        list(map(id, parts)),
        list(map(type, parts)),
        list(map(torch.Tensor.data_ptr, parts)),
        list(map(torch.Tensor.get_device, parts)),  # an address is of one kind of device alone
        list(map(_DTYPE, parts)),
        list(map(_SHAPE, parts)),
        list(map(torch.Tensor.is_contiguous, parts)),
    ]


def _spec(tensor: Any) -> Any:
    return tensor._spec
