"""Device or host to slot: the bytes of a SavePlan and their digests.

What a copy in the background may take is decided by the caller; what it cannot take for its form is copied at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from ktrain import device, native
from ktrain.errors import ConfigError
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.snapshot.witness import HostBytes, OnDevice, Witness, Words
from ktrain.state.plan import Places, SavePlan

LATER_NBYTES = 4096
"""Below, a tensor on the host is copied at once: watching it costs as much."""

_ALONE_NBYTES = 8 << 20  # up to here one thread is done before others were given a processor, on a busy machine

_BATCH_NBYTES = 64 << 20  # of a device's copies: a millisecond of them, large beside the cost of a wait
_BATCHES_AHEAD = 2  # so that the device never waits for the next one to be told

_EMPTY, _HOST, _UNEVEN, _DEVICE = range(4)


def stage(plan: SavePlan, memory: memoryview, *, num_threads: int = 1) -> tuple[int, ...]:
    """Writes the plan's payload into a slot and returns the digests of its chunks, header included.

    Returns when every byte is in the slot, also those of devices; then the tensors may change. Host tensors
    are copied and digested in one pass over memory.

    Raises:
        ConfigError: the slot has not the payload's size.
    """
    staging = Stager(num_threads).begin(plan, memory, None)
    staging.copy()
    return staging.digest()


@dataclass(frozen=True, slots=True)
class Later:
    """What `Stager.begin` may leave for later, and how closely it is watched.

    Args:
        optimizers: names of parts; a tensor that changes in their steps alone may wait.
        turn: number of the save, so that samples are taken elsewhere each time.
        all_bytes: the witness digests every byte on the host.
    """

    optimizers: frozenset[str]
    turn: int
    all_bytes: bool


class Stager:
    """Brings plans into slots; keeps the table of addresses while a plan's places stay the same.

    Use from the training thread.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._table: _Table | None = None

    def begin(self, plan: SavePlan, memory: memoryview, later: Later | None) -> Staging:
        """Copies what may not wait, and returns the rest as work for any one thread.

        What lies on a device is copied in the order of its current stream: this returns before it is there. With
        `later` None nothing is watched and nothing may change before `Staging.copy` has returned.

        Raises:
            ConfigError: the slot has not the payload's size.
        """
        if memory.nbytes != plan.layout.nbytes:
            raise ConfigError(f"stage: the payload has {plan.layout.nbytes} bytes, the slot {memory.nbytes}")
        if self._table is None or not self._table.is_of(plan):
            self._table = _Table(plan)
        table = self._table
        table.find_moving(plan)
        waits = table.all_rows() if later is None else table.rows_for(later.optimizers)
        now = ~waits
        uneven = numpy.flatnonzero(now & (table.kinds == _UNEVEN)).tolist()
        addresses = table.addresses.copy() if uneven else table.addresses
        temporaries = [_plain(plan.tensors[row]) for row in uneven]
        for row, tensor in zip(uneven, temporaries, strict=True):
            addresses[row] = tensor.data_ptr()
        columns = table.columns(
            addresses, now & ((table.kinds == _HOST) | (table.kinds == _UNEVEN)), plan.layout.header
        )
        num_threads = self._num_threads if int(columns[1].sum()) > _ALONE_NBYTES else 1
        native.gather(memory, columns, num_threads=num_threads)
        copies = _DeviceCopies(plan, memory, numpy.flatnonzero(table.kinds == _DEVICE).tolist(), waits)
        rows = numpy.flatnonzero(waits & (table.kinds == _HOST))
        rest = table.addresses[rows], table.sizes[rows], table.offsets[rows]
        tensors = [plan.tensors[row] for row in numpy.flatnonzero(waits).tolist()]
        witness = None
        if later is not None and tensors:
            begin = numpy.frombuffer(memory, numpy.uint8).ctypes.data
            witness = Witness(
                tensors,
                HostBytes(rest[0], rest[1], rest[2] + numpy.uint64(begin)),
                copies.beside,
                turn=later.turn,
                all_bytes=later.all_bytes,
                num_threads=self._num_threads,
            )
            copies.samples = witness.samples
        copies.start()
        return Staging(memory, rest, tensors, copies, witness, num_threads=self._num_threads)


class Staging:
    """The rest of a payload on its way into its slot. From one thread at a time."""

    def __init__(  # noqa: PLR0913 -- made by Stager alone
        self,
        memory: memoryview,
        columns: tuple[Words, Words, Words],
        tensors: Sequence[torch.Tensor],
        copies: _DeviceCopies,
        witness: Witness | None,
        *,
        num_threads: int,
    ) -> None:
        self._memory = memory
        self._columns = columns
        # Where a tensor gets other memory meanwhile, what is copied stays alive.
        self._storages = [tensor.untyped_storage() for tensor in tensors]
        self._copies = copies
        self._witness = witness
        self._num_threads = num_threads
        self._chunks: list[int] = []  # of the payload's beginning, as far as it was digested
        self.waits = bool(tensors)
        """Whether training must leave tensors alone until `copy` has returned."""

    def copy(self) -> None:
        """Brings the rest into the slot. Afterwards no tensor is read any more, except by `problem_of_tensors`."""
        if self._copies.is_empty and self.waits:
            self._chunks = native.gather_digest(
                self._memory, self._columns, chunk_nbytes=CHUNK_NBYTES, num_threads=self._num_threads
            )
            return
        native.gather(self._memory, self._columns, num_threads=self._num_threads)
        self._copies.finish(lambda end: self._digest(end - end % CHUNK_NBYTES))

    def problem_of_copies(self) -> str | None:
        """Why what was copied must not be used: a tensor was changed since `begin`; None where nothing shows it."""
        return None if self._witness is None else self._witness.problem_of_copies()

    def problem_of_tensors(self) -> str | None:
        """How it is known that a tensor on the host was changed since `begin`, also after it was copied."""
        return None if self._witness is None else self._witness.problem_of_tensors()

    def digest(self) -> tuple[int, ...]:
        """The digests of the payload's chunks, after `copy`."""
        self._digest(self._memory.nbytes)
        return tuple(self._chunks)

    def release(self) -> None:
        """Lets go of all tensors; nothing is known of changes any more."""
        self._storages = []
        self._witness = None
        self._copies.release()

    def _digest(self, end: int) -> None:
        """Digests up to there, the end of a chunk, from where it was done before."""
        rest = self._memory[min(len(self._chunks) * CHUNK_NBYTES, end) : end]
        self._chunks += native.digest_chunks(rest, chunk_nbytes=CHUNK_NBYTES, num_threads=self._num_threads)


class _DeviceCopies:
    """Copies from devices: those that may not wait in the order of the current stream, the rest beside it."""

    def __init__(self, plan: SavePlan, memory: memoryview, rows: Sequence[int], waits: NDArray[numpy.bool_]) -> None:
        self.beside: list[OnDevice] = []
        self.samples: Sequence[OnDevice] = ()
        self._streams: dict[torch.device, device.SideStream] = {}
        self.is_empty = not rows
        for row in rows:
            one = OnDevice(plan.tensors[row].detach(), memory, plan.layout.entries[row].begin)
            self._streams.setdefault(one.tensor.device, device.side_stream(one.tensor.device))
            if waits[row]:
                self.beside.append(one)
            else:
                one.copy().copy_(one.tensor, non_blocking=True)

    def start(self) -> None:
        """Lets the side streams begin when the current streams have come to this point."""
        for stream in self._streams.values():
            stream.follow_current()

    def finish(self, arrived: Callable[[int], None]) -> None:
        """Copies what is left, and returns when all bytes are in the slot.

        Args:
            arrived: told of offsets before which all bytes of devices are in the slot, while others are still copied.
        """
        for used, stream in self._streams.items():
            with stream.running():
                on_way: deque[tuple[torch.Event, int]] = deque()
                for batch in _batches([one for one in self.beside if one.tensor.device == used]):
                    _copy(batch)
                    on_way.append((stream.mark(), batch[-1].end))
                    if len(on_way) > _BATCHES_AHEAD:
                        _await(on_way.popleft(), arrived)
                _copy([one for one in self.samples if one.tensor.device == used])
                while on_way and len(self._streams) == 1:  # several devices fill the slot in no order
                    _await(on_way.popleft(), arrived)

    def release(self) -> None:
        self.beside, self.samples = [], ()


def _batches(found: list[OnDevice]) -> Iterator[list[OnDevice]]:
    """In the order of their places, each at least as large as is worth a wait of its own."""
    batch: list[OnDevice] = []
    nbytes = 0
    for one in sorted(found, key=lambda one: one.begin):
        batch.append(one)
        nbytes += one.tensor.nbytes
        if nbytes >= _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _await(mark: tuple[torch.Event, int], arrived: Callable[[int], None]) -> None:
    event, end = mark
    event.synchronize()
    arrived(end)


def _copy(batch: list[OnDevice]) -> None:
    if batch:  # one call for all: it takes the interpreter's lock once
        torch._foreach_copy_([one.copy() for one in batch], [one.tensor for one in batch], non_blocking=True)


class _Table:
    """Where the tensors of plans with the same places lie, as columns with one row for each entry of the layout."""

    def __init__(self, plan: SavePlan) -> None:
        entries = plan.layout.entries
        self._places: Places = plan.places
        self.offsets: Words = numpy.array([entry.begin for entry in entries], numpy.uint64)
        self.sizes: Words = numpy.array([entry.end - entry.begin for entry in entries], numpy.uint64)
        self.addresses: Words = numpy.array([tensor.data_ptr() for tensor in plan.tensors], numpy.uint64)
        self.kinds: NDArray[Any] = numpy.array(list(map(_kind_of, plan.tensors)), numpy.uint8)
        self._split: tuple[frozenset[str], NDArray[numpy.bool_]] | None = None

    def is_of(self, plan: SavePlan) -> bool:
        return self._places is plan.places

    def find_moving(self, plan: SavePlan) -> None:
        """Reads anew where the tensors lie that may lie elsewhere in each plan."""
        for row in self._places.moving:
            self.addresses[row] = plan.tensors[row].data_ptr()
            self.kinds[row] = _kind_of(plan.tensors[row])

    def all_rows(self) -> NDArray[numpy.bool_]:
        found: NDArray[numpy.bool_] = (self.kinds == _HOST) | (self.kinds == _DEVICE)
        return found

    def rows_for(self, optimizers: frozenset[str]) -> NDArray[numpy.bool_]:
        """Those that may wait for a copy in the background: all that changes them is a step of these."""
        if self._split is None or self._split[0] != optimizers:
            sure = [bool(guard) and optimizers.issuperset(guard) for guard in self._places.guards]
            is_worth = (self.sizes >= LATER_NBYTES) | (self.kinds == _DEVICE)
            self._split = optimizers, numpy.array(sure, numpy.bool_) & is_worth
        return self._split[1] & self.all_rows()

    def columns(self, addresses: Words, rows: NDArray[numpy.bool_], header: bytes) -> tuple[Words, Words, Words]:
        """Those rows as segments, behind the header."""
        head = numpy.frombuffer(header, numpy.uint8).ctypes.data
        return (
            numpy.concatenate([numpy.array([head], numpy.uint64), addresses[rows]]),
            numpy.concatenate([numpy.array([len(header)], numpy.uint64), self.sizes[rows]]),
            numpy.concatenate([numpy.array([0], numpy.uint64), self.offsets[rows]]),
        )


def _kind_of(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return _EMPTY
    if tensor.device.type != "cpu":
        return _DEVICE
    # A conjugate is told from its original by a bit of the tensor, which may change with nothing else.
    is_even = tensor.is_contiguous() and not tensor.is_complex() and not tensor.is_neg() and not tensor.is_inference()
    return _HOST if is_even else _UNEVEN


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its items in memory as they are counted; itself where they are so already."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()
