"""What tensors were like when a copy of them began, and whether they are still: the proof that a copy is not torn.

A version counter that moved proves a change, one that stands proves nothing: edits through `.data` and by kernels
outside of torch do not move it. So bytes are digested too, all of a small state and samples of a large one (ADR 0010):
some while training waits, more by the thread that copies before it begins (ADR 0026).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch

from ktrain import native

FIRST_NBYTES = 512 << 10
"""So many bytes are digested while training waits: a tenth of a millisecond, and all of a very small state."""

SAMPLED_NBYTES = 4 << 20
"""So many before the copy begins: about a millisecond, and all of a small state."""

# Each run costs a miss or two of the caches, about as much as a KiB more of it.
_LEAST_RUN_NBYTES, _MOST_RUN_NBYTES = 256, 4096
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


class Samples:
    """Places in tensors of certain sizes, none of them below 4 KiB: about `budget` bytes together, some of each tensor.

    All bytes where the budget is None or enough.
    """

    def __init__(self, sizes: Words, budget: int | None) -> None:
        of_each = sizes.astype(numpy.int64)
        total = int(of_each.sum())
        self._stride: Any = None  # where all bytes are taken
        self.owners = numpy.arange(len(sizes))
        """For each piece, whose it is."""
        self.sizes: Words = sizes
        """For each piece, its bytes."""
        if budget is None or total <= budget:
            return
        nbytes = min(max(budget // len(sizes), _LEAST_RUN_NBYTES), _MOST_RUN_NBYTES)
        runs = numpy.clip((of_each * (budget / total) / nbytes).astype(numpy.int64), 1, of_each // nbytes)
        self._nbytes, self._stride = nbytes, of_each // runs  # each run lies somewhere in a stretch of its own
        self.owners = numpy.repeat(self.owners, runs)
        number = numpy.arange(len(self.owners)) - numpy.repeat(numpy.cumsum(runs) - runs, runs)
        self._stretches = number * self._stride[self.owners]
        self.sizes = numpy.full(len(self.owners), nbytes, numpy.uint64)

    def begins(self, turn: int) -> Words:
        """For each piece where in its tensor it begins; elsewhere each turn."""
        if self._stride is None:
            return numpy.zeros(len(self.owners), numpy.uint64)
        # Both ends of a stretch are met as often as its middle.
        shift = (_phase(turn) * (self._stride + self._nbytes)).astype(numpy.int64) - self._nbytes
        shift = numpy.clip(shift, 0, self._stride - self._nbytes)
        return (self._stretches + shift[self.owners]).astype(numpy.uint64)


@dataclass(frozen=True, slots=True)
class Watch:
    """How closely tensors on the host are looked at.

    Attributes:
        first: while training waits.
        closer: before they are copied; None where `first` has all bytes.
        turn: number of the save.
    """

    first: Samples
    closer: Samples | None
    turn: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """Pieces of tensors, where they are and where they will be, and what was in them."""

    live: Words
    copied: Words
    sizes: Words
    digests: bytes


class Witness:
    """Looks at tensors when it is made, and closer before they are copied; says later whether the copies are the same.

    The copies are looked at, not the tensors: one that was changed and changed back while it was copied is found.

    Args:
        tensors: all of them.
        host: the places of those on the host, which are contiguous.
        devices: of those on devices some that are contiguous, those of one device and dtype behind one another.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        host: HostBytes,
        devices: Sequence[OnDevice],
        *,
        watch: Watch,
        num_threads: int,
    ) -> None:
        self._tensors = tensors
        self._host = host
        self._watch = watch
        self._num_threads = num_threads if watch.closer is None else 1  # samples are done before another has begun
        self._versions = list(map(_version_of, tensors))
        self._seen = [self._look(watch.first)]
        self._copied_samples = _slices(devices, watch.turn)
        self.samples = [
            OnDevice(part, memoryview(bytearray(part.nbytes)))
            for part in _join([one.tensor for one in self._copied_samples])
        ]
        """Values on devices, taken in the order of the current stream; the copier brings them to the host."""

    def look_closer(self) -> None:
        """Takes more samples than there was time for, before the copy begins. From the thread that copies."""
        if self._watch.closer is not None:
            self._seen.append(self._look(self._watch.closer))

    def problem_of_copies(self) -> str | None:
        """Why the copies, and `samples`, must not be used; None where nothing speaks against them."""
        versions = list(map(_version_of, self._tensors))
        if versions != self._versions:
            at = next(at for at, pair in enumerate(zip(versions, self._versions, strict=True)) if pair[0] != pair[1])
            return f"a tensor of shape {list(self._tensors[at].shape)} was written to"
        if any(self._digest(seen.copied, seen.sizes) != seen.digests for seen in self._seen):
            return _AROUND
        copied = b"".join(one.memory[one.begin : one.end] for one in self._copied_samples)
        return _AROUND if copied != b"".join(one.memory for one in self.samples) else None

    def problem_of_tensors(self) -> str | None:
        """How it is known that a tensor on the host has changed since; None where nothing shows it."""
        return _AROUND if any(self._digest(seen.live, seen.sizes) != seen.digests for seen in self._seen) else None

    def _look(self, samples: Samples) -> _Seen:
        begins = samples.begins(self._watch.turn)
        live = self._host.addresses[samples.owners] + begins
        copied = self._host.copies[samples.owners] + begins
        return _Seen(live, copied, samples.sizes, self._digest(live, samples.sizes))

    def _digest(self, addresses: Words, sizes: Words) -> bytes:
        return native.digest_pieces(addresses, sizes, num_threads=self._num_threads)


@torch.no_grad()  # slices of parameters are no part of a graph
def _slices(devices: Sequence[OnDevice], turn: int) -> list[OnDevice]:
    """A few items of each, elsewhere each turn; views."""
    phase, found = _phase(turn), []
    for one in devices:
        numel = one.tensor.numel()
        begin = int(phase * max(1, numel - _ITEMS_ON_DEVICES))
        num_items = min(_ITEMS_ON_DEVICES, numel - begin)
        part = one.tensor.as_strided((num_items,), (1,), one.tensor.storage_offset() + begin)
        found.append(OnDevice(part, one.memory, one.begin + begin * part.itemsize))
    return found


def _join(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes of all parts, joined for each device and dtype: as bytes NaN equals itself."""
    groups = itertools.groupby(parts, key=lambda part: (part.device, part.dtype))
    # Not every device joins every dtype of one byte; as bytes each does.
    return [
        torch.cat([part.view(torch.uint8) for part in group] if dtype.itemsize == 1 else list(group)).view(torch.uint8)
        for (_, dtype), group in groups
    ]


def _phase(turn: int) -> float:
    return turn * _GOLDEN % 1.0
