"""What tensors were like when a copy of them began, and whether they are still: the proof that a copy is not torn.

A version counter that moved proves a change, one that stands proves nothing: edits through `.data` and by kernels
outside of torch do not move it. So bytes are digested too, all of a small state and samples of a large one (ADR 0010).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch

from ktrain import native

SAMPLED_NBYTES = 8 << 20
"""So many bytes are digested: under a millisecond, and all of a small state."""

_RUN_NBYTES = 256
_NUM_ON_DEVICES = 256  # each costs some microseconds to slice
_ITEMS_ON_DEVICES = 64
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, visit all places evenly (Weyl's sequence)
_version_of = operator.attrgetter("_version")

Words: TypeAlias = Any
"""An array of numpy.uint64; numpy's types are no buffers to type checkers before Python 3.12."""


@dataclass(frozen=True, slots=True)
class HostBytes:
    """Where tensors lie in host memory."""

    addresses: Words
    sizes: Words


class Witness:
    """Looks at tensors at once, and again when it is asked.

    Args:
        tensors: on the host or on devices; on the host contiguous.
        host: the places of those on the host.
        turn: chooses where samples are taken; another number, other places.
        all_bytes: digests every byte on the host, whatever its size.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], host: HostBytes, *, turn: int, all_bytes: bool, num_threads: int
    ) -> None:
        self._tensors = tensors
        self._num_threads = num_threads if all_bytes else 1  # samples are done before a second thread has begun
        budget = None if all_bytes else SAMPLED_NBYTES
        self._addresses, self._sizes = choose_samples(host, budget=budget, turn=turn)
        self._devices = _choose_on_devices(tensors, turn)
        self._versions = list(map(_version_of, tensors))
        self._digests = self._digest()
        self._samples = _take(self._devices)

    def changed(self) -> str | None:
        """How it is known that a tensor has changed since; None where nothing shows it."""
        versions = list(map(_version_of, self._tensors))
        if versions != self._versions:
            at = next(at for at, pair in enumerate(zip(versions, self._versions, strict=True)) if pair[0] != pair[1])
            return f"a tensor of shape {list(self._tensors[at].shape)} was written to"
        if self._digest() != self._digests:
            return "bytes of a tensor were changed around torch's version counter (.data, a view of numpy, a kernel)"
        if not all(map(torch.equal, _take(self._devices), self._samples)):
            return "values on a device were changed around torch's version counter (.data, a kernel)"
        return None

    def _digest(self) -> bytes:
        return native.digest_pieces(self._addresses, self._sizes, num_threads=self._num_threads)


def choose_samples(host: HostBytes, *, budget: int | None, turn: int) -> tuple[Words, Words]:
    """Pieces of memory of about `budget` bytes together, some of each tensor; all of it where None or enough."""
    total = int(host.sizes.sum())
    if budget is None or total <= budget:
        return host.addresses, host.sizes
    sizes = host.sizes.astype(numpy.int64)
    runs = numpy.clip((sizes * (budget / total) / _RUN_NBYTES).astype(numpy.int64), 1, sizes // _RUN_NBYTES)
    stride = sizes // runs  # each run lies somewhere in a stretch of its own
    owner = numpy.repeat(numpy.arange(len(sizes)), runs)
    number = numpy.arange(len(owner)) - numpy.repeat(numpy.cumsum(runs) - runs, runs)
    # Both ends of a stretch are met as often as its middle.
    shift = (_phase(turn) * (stride + _RUN_NBYTES)).astype(numpy.int64) - _RUN_NBYTES
    shift = numpy.clip(shift, 0, stride - _RUN_NBYTES)
    begins = number * stride[owner] + shift[owner]
    addresses = host.addresses[owner] + begins.astype(numpy.uint64)
    return addresses, numpy.full(len(owner), _RUN_NBYTES, numpy.uint64)


def _choose_on_devices(tensors: Sequence[torch.Tensor], turn: int) -> list[torch.Tensor]:
    """Slices of the largest tensors on devices, as views."""
    found = [tensor for tensor in tensors if tensor.device.type != "cpu" and tensor.is_contiguous()]
    found.sort(key=lambda tensor: -tensor.nbytes)
    views = []
    for tensor in found[:_NUM_ON_DEVICES]:
        begin = int(_phase(turn) * max(1, tensor.numel() - _ITEMS_ON_DEVICES))
        views.append(tensor.detach().view(-1)[begin : begin + _ITEMS_ON_DEVICES])
    return views


def _take(views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The values of views, joined for each device and type, in the order of the current stream."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for view in views:
        groups.setdefault((view.device, view.dtype), []).append(view.view(torch.uint8))  # NaN equals itself as bytes
    return [torch.cat(group) for group in groups.values()]


def _phase(turn: int) -> float:
    return turn * _GOLDEN % 1.0
