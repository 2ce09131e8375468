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

SAMPLED_NBYTES = 4 << 20
"""So many bytes are digested: about a millisecond, and all of a small state."""

# Each run costs a miss or two of the caches, about as much as a KiB more of it.
_LEAST_RUN_NBYTES, _MOST_RUN_NBYTES = 256, 4096
_NUM_ON_DEVICES = 256  # each costs some microseconds to slice
_ITEMS_ON_DEVICES = 64
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, visit all places evenly (Weyl's sequence)
_AROUND = "bytes of a tensor were changed around torch's version counter (.data, a view of numpy, a kernel)"
_version_of = operator.attrgetter("_version")

Words: TypeAlias = Any
"""An array of numpy.uint64; numpy's types are no buffers to type checkers before Python 3.12."""


@dataclass(frozen=True, slots=True)
class HostBytes:
    """Where tensors lie in host memory, and where their copies will: one row for each."""

    addresses: Words
    sizes: Words
    copies: Words


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A tensor on a device and where in host memory its items go, one behind the other."""

    tensor: torch.Tensor
    memory: memoryview
    begin: int = 0

    @property
    def end(self) -> int:
        return self.begin + self.tensor.nbytes

    def copy(self) -> torch.Tensor:
        """The copy's memory as a tensor of the same shape; made here, since a save has no time for it."""
        flat = torch.frombuffer(self.memory, dtype=self.tensor.dtype, count=self.tensor.numel(), offset=self.begin)
        return flat.view(self.tensor.shape)


class Witness:
    """Looks at tensors when it is made; says later whether their copies are what they were then.

    The copies are looked at, not the tensors: one that was changed and changed back while it was copied is found.

    Args:
        tensors: all of them.
        host: the places of those on the host, which are contiguous.
        devices: those on devices.
        turn: chooses where samples are taken; another number, other places.
        all_bytes: digests every byte on the host, whatever its size.
    """

    def __init__(  # noqa: PLR0913 -- made by Stager alone
        self,
        tensors: Sequence[torch.Tensor],
        host: HostBytes,
        devices: Sequence[OnDevice],
        *,
        turn: int,
        all_bytes: bool,
        num_threads: int,
    ) -> None:
        self._tensors = tensors
        self._num_threads = num_threads if all_bytes else 1  # samples are done before a second thread has begun
        owners, begins, self._sizes = choose_samples(host.sizes, None if all_bytes else SAMPLED_NBYTES, turn)
        self._live = host.addresses[owners] + begins
        self._copied = host.copies[owners] + begins
        self._versions = list(map(_version_of, tensors))
        self._digests = self._digest(self._live)
        chosen = _choose_on_devices(devices, turn)
        self._copied_samples = chosen
        self.samples = [
            OnDevice(part, memoryview(bytearray(part.nbytes))) for part in _join([one.tensor for one in chosen])
        ]
        """Values on devices, taken in the order of the current stream; the copier brings them to the host."""

    def problem_of_copies(self) -> str | None:
        """Why the copies, and `samples`, must not be used; None where nothing speaks against them."""
        versions = list(map(_version_of, self._tensors))
        if versions != self._versions:
            at = next(at for at, pair in enumerate(zip(versions, self._versions, strict=True)) if pair[0] != pair[1])
            return f"a tensor of shape {list(self._tensors[at].shape)} was written to"
        if self._digest(self._copied) != self._digests:
            return _AROUND
        copied = b"".join(one.memory[one.begin : one.end] for one in self._copied_samples)
        return _AROUND if copied != b"".join(one.memory for one in self.samples) else None

    def problem_of_tensors(self) -> str | None:
        """How it is known that a tensor on the host has changed since; None where nothing shows it."""
        return _AROUND if self._digest(self._live) != self._digests else None

    def _digest(self, addresses: Words) -> bytes:
        return native.digest_pieces(addresses, self._sizes, num_threads=self._num_threads)


def choose_samples(sizes: Words, budget: int | None, turn: int) -> tuple[Words, Words, Words]:
    """Pieces of about `budget` bytes together, some of each tensor; all of it where None or enough.
    No tensor is smaller than 4 KiB.

    Returns for each piece whose it is, where in its tensor it begins, and its size.
    """
    total = int(sizes.sum())
    if budget is None or total <= budget:
        return numpy.arange(len(sizes)), numpy.zeros(len(sizes), numpy.uint64), sizes
    of_each = sizes.astype(numpy.int64)
    nbytes = min(max(budget // len(sizes), _LEAST_RUN_NBYTES), _MOST_RUN_NBYTES)
    runs = numpy.clip((of_each * (budget / total) / nbytes).astype(numpy.int64), 1, of_each // nbytes)
    stride = of_each // runs  # each run lies somewhere in a stretch of its own
    owners = numpy.repeat(numpy.arange(len(of_each)), runs)
    number = numpy.arange(len(owners)) - numpy.repeat(numpy.cumsum(runs) - runs, runs)
    # Both ends of a stretch are met as often as its middle.
    shift = (_phase(turn) * (stride + nbytes)).astype(numpy.int64) - nbytes
    shift = numpy.clip(shift, 0, stride - nbytes)
    begins = (number * stride[owners] + shift[owners]).astype(numpy.uint64)
    return owners, begins, numpy.full(len(owners), nbytes, numpy.uint64)


def _choose_on_devices(found: Sequence[OnDevice], turn: int) -> list[OnDevice]:
    """Slices of the largest tensors, as views, sorted so that those that are joined follow one another."""
    even = [one for one in found if one.tensor.is_contiguous() and not one.tensor.is_conj()]
    even.sort(key=lambda one: -one.tensor.nbytes)
    chosen = []
    for one in even[:_NUM_ON_DEVICES]:
        begin = int(_phase(turn) * max(1, one.tensor.numel() - _ITEMS_ON_DEVICES))
        part = one.tensor.view(-1)[begin : begin + _ITEMS_ON_DEVICES]
        chosen.append(OnDevice(part, one.memory, one.begin + begin * part.itemsize))
    chosen.sort(key=lambda one: str(one.tensor.device))
    return chosen


def _join(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes of all parts, joined for each device: as bytes NaN equals itself."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for part in parts:
        by_device.setdefault(part.device, []).append(part.view(torch.uint8))
    return [torch.cat(group) for group in by_device.values()]


def _phase(turn: int) -> float:
    return turn * _GOLDEN % 1.0
