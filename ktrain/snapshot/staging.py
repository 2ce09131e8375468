"""Device or host to slot: the bytes of a SavePlan and their digests.

What a copy in the background may take is decided by the caller; what it cannot take for its form is copied at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from ktrain import device, native
from ktrain.errors import ConfigError
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.snapshot.witness import FIRST_NBYTES, SAMPLED_NBYTES, HostBytes, OnDevice, Samples, Watch, Witness, Words
from ktrain.state.look import picker
from ktrain.state.plan import Places, SavePlan

LATER_NBYTES = 4096
"""Below, a tensor on the host is copied at once: watching it costs as much."""

_ALONE_NBYTES = 8 << 20  # up to here one thread is done before others were given a processor, on a busy machine

_BATCH_NBYTES = 64 << 20  # of a device's copies: a millisecond of them, large beside the cost of a wait
_NUM_WATCHED = 64  # tensors on devices in each save: a sample of each costs some microseconds
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
        split = table.split_for(None if later is None else later.optimizers, plan.layout.header)
        addresses = table.addresses
        temporaries = [_plain(plan.tensors[row]) for row in split.uneven]
        if temporaries:
            addresses = addresses.copy()
            addresses[split.uneven] = [tensor.data_ptr() for tensor in temporaries]
        num_threads = self._num_threads if split.num_now_nbytes > _ALONE_NBYTES else 1
        native.gather(memory, split.columns_now(addresses), num_threads=num_threads)
        copies = _DeviceCopies(plan, memory, split)
        rest = table.addresses[split.rest], split.rest_sizes, split.rest_offsets
        tensors = split.waiting_of(plan.tensors)
        # Where a tensor on the host gets other memory meanwhile, what is copied stays alive.
        held = [tensor.untyped_storage() for tensor in split.rest_of(plan.tensors)]
        witness = None
        if later is not None and tensors:
            witness = Witness(
                tensors,
                HostBytes(rest[0], rest[1], rest[2] + numpy.uint64(_address_of(memory))),
                split.samples_of(plan.tensors, memory, later.turn),
                watch=split.watch(later),
                num_threads=self._num_threads,
            )
            copies.samples = witness.samples
        copies.start()
        return Staging(memory, rest, held, copies, witness, num_threads=self._num_threads)


class Staging:
    """The rest of a payload on its way into its slot. From one thread at a time."""

    def __init__(  # noqa: PLR0913 -- made by Stager alone
        self,
        memory: memoryview,
        columns: tuple[Words, Words, Words],
        held: Sequence[torch.UntypedStorage],
        copies: _DeviceCopies,
        witness: Witness | None,
        *,
        num_threads: int,
    ) -> None:
        self._memory = memory
        self._columns = columns
        self._held = held
        self._copies = copies
        self._witness = witness
        self._num_threads = num_threads
        self._chunks: list[int] = []  # of the payload's beginning, as far as it was digested
        self.waits = bool(held) or copies.waits
        """Whether training must leave tensors alone until `copy` has returned."""

    def copy(self) -> None:
        """Brings the rest into the slot. Afterwards no tensor is read any more, except by `problem_of_tensors`."""
        if self._witness is not None:
            self._witness.look_closer()
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
        self._held = ()
        self._witness = None
        self._copies.release()

    def _digest(self, end: int) -> None:
        """Digests up to there, the end of a chunk, from where it was done before."""
        rest = self._memory[min(len(self._chunks) * CHUNK_NBYTES, end) : end]
        self._chunks += native.digest_chunks(rest, chunk_nbytes=CHUNK_NBYTES, num_threads=self._num_threads)


class _DeviceCopies:
    """Copies from devices: those that may not wait in the order of the current stream, the rest beside it."""

    def __init__(self, plan: SavePlan, memory: memoryview, split: _Split) -> None:
        self.samples: Sequence[OnDevice] = ()
        self._memory = memory
        # Detached, what is copied stays where it is when a tensor gets other memory meanwhile.
        self._tensors = list(map(torch.Tensor.detach, split.beside_of(plan.tensors)))
        self._begins = split.beside_begins
        self.waits = bool(self._tensors)
        self._streams = {used: device.side_stream(used) for used in split.devices}
        self.is_empty = not self._streams
        for row in split.devices_now:
            one = OnDevice(plan.tensors[row].detach(), memory, plan.layout.entries[row].begin)
            one.copy().copy_(_plain(one.tensor), non_blocking=True)

    def start(self) -> None:
        """Lets the side streams begin when the current streams have come to this point."""
        for stream in self._streams.values():
            stream.follow_current()

    def finish(self, arrived: Callable[[int], None]) -> None:
        """Copies what is left, and returns when all bytes are in the slot.

        Args:
            arrived: told of offsets before which all bytes of devices are in the slot, while others are still copied.
        """
        pairs = zip(self._tensors, self._begins, strict=True)
        beside = [OnDevice(tensor, self._memory, begin) for tensor, begin in pairs]
        for used, stream in self._streams.items():
            with stream.running():
                on_way: deque[tuple[torch.Event, int]] = deque()
                for batch in _batches([one for one in beside if one.tensor.device == used]):
                    _copy(batch)
                    on_way.append((stream.mark(), batch[-1].end))
                    if len(on_way) > _BATCHES_AHEAD:
                        _await(on_way.popleft(), arrived)
                _copy([one for one in self.samples if one.tensor.device == used])
                while on_way and len(self._streams) == 1:  # several devices fill the slot in no order
                    _await(on_way.popleft(), arrived)

    def release(self) -> None:
        self._tensors, self._begins, self.samples = [], [], ()


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
        torch._foreach_copy_([one.copy() for one in batch], [_plain(one.tensor) for one in batch], non_blocking=True)


class _Table:
    """Where the tensors of plans with the same places lie, as columns with one row for each entry of the layout."""

    def __init__(self, plan: SavePlan) -> None:
        entries = plan.layout.entries
        self._places: Places = plan.places
        self.offsets: Words = numpy.array([entry.begin for entry in entries], numpy.uint64)
        self.sizes: Words = numpy.array([entry.end - entry.begin for entry in entries], numpy.uint64)
        self.addresses: Words = numpy.array([tensor.data_ptr() for tensor in plan.tensors], numpy.uint64)
        self.kinds: NDArray[Any] = numpy.array(list(map(_kind_of, plan.tensors)), numpy.uint8)
        self.devices = {tensor.device for tensor in plan.tensors if _kind_of(tensor) == _DEVICE}
        self.watched = self._find_watched(plan.tensors)
        """Rows on devices of which samples can be taken, by device and dtype, and their places in the payload."""
        self._split: tuple[frozenset[str] | None, _Split] | None = None

    def is_of(self, plan: SavePlan) -> bool:
        return self._places is plan.places

    def find_moving(self, plan: SavePlan) -> None:
        """Reads anew where the tensors lie that may lie elsewhere in each plan."""
        for row in self._places.moving:
            tensor = plan.tensors[row]
            self.addresses[row] = tensor.data_ptr()
            kind = _kind_of(tensor)
            if kind == _DEVICE:
                self.devices.add(tensor.device)
            if kind != self.kinds[row]:
                self.kinds[row] = kind
                self._split = None

    def split_for(self, optimizers: frozenset[str] | None, header: bytes) -> _Split:
        """What may wait for a copy in the background, since all that changes it is a step of these; all where None."""
        if self._split is None or self._split[0] != optimizers:
            waits = (self.kinds == _HOST) | (self.kinds == _DEVICE)
            if optimizers is not None:
                sure = [bool(guard) and optimizers.issuperset(guard) for guard in self._places.guards]
                waits &= numpy.array(sure, numpy.bool_) & ((self.sizes >= LATER_NBYTES) | (self.kinds == _DEVICE))
            self._split = optimizers, _Split(self, waits, header)
        return self._split[1]

    def _find_watched(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        moving = frozenset(self._places.moving)
        found = [row for row in numpy.flatnonzero(self.kinds == _DEVICE).tolist() if row not in moving]
        found = [row for row in found if _is_even(tensors[row])]
        found.sort(key=lambda row: f"{tensors[row].device} {tensors[row].dtype}")
        return [(row, int(self.offsets[row])) for row in found]


class _Split:
    """The rows of a table, by when they are copied; the same as long as nothing but addresses changes."""

    def __init__(self, table: _Table, waits: NDArray[numpy.bool_], header: bytes) -> None:
        self.waits = waits
        self.waiting_of = picker(numpy.flatnonzero(waits).tolist())
        self.uneven: list[int] = numpy.flatnonzero(~waits & (table.kinds == _UNEVEN)).tolist()
        on_devices = table.kinds == _DEVICE
        self.devices = table.devices
        self.devices_now: list[int] = numpy.flatnonzero(~waits & on_devices).tolist()
        beside = numpy.flatnonzero(waits & on_devices)
        self.beside_of = picker(beside.tolist())
        self.beside_begins: list[int] = table.offsets[beside].tolist()
        self._watched = [(row, begin) for row, begin in table.watched if waits[row]]
        self.rest = numpy.flatnonzero(waits & (table.kinds == _HOST))
        self.rest_of = picker(self.rest.tolist())
        self.rest_sizes: Words = table.sizes[self.rest]
        self.rest_offsets: Words = table.offsets[self.rest]
        self._now = numpy.flatnonzero(~waits & ((table.kinds == _HOST) | (table.kinds == _UNEVEN)))
        self._header = header  # kept alive: its address is used
        self._header_address = numpy.array([_address_of(header)], numpy.uint64)
        self._now_sizes: Words = numpy.concatenate([[numpy.uint64(len(header))], table.sizes[self._now]])
        self._now_offsets: Words = numpy.concatenate([[numpy.uint64(0)], table.offsets[self._now]])
        self.num_now_nbytes = int(self._now_sizes.sum())

    def columns_now(self, addresses: Words) -> tuple[Words, Words, Words]:
        """What is copied at once as segments, behind the header."""
        return numpy.concatenate([self._header_address, addresses[self._now]]), self._now_sizes, self._now_offsets

    def samples_of(self, tensors: Sequence[torch.Tensor], memory: memoryview, turn: int) -> list[OnDevice]:
        """Tensors on devices that the witness looks at: others each turn, evenly spread over all."""
        stride = -(-len(self._watched) // _NUM_WATCHED) or 1
        return [OnDevice(tensors[row], memory, begin) for row, begin in self._watched[turn % stride :: stride]]

    def watch(self, later: Later) -> Watch:
        """How the rest is looked at."""
        if later.all_bytes:
            return Watch(Samples(self.rest_sizes, None), None, later.turn)
        return Watch(*self._samples, later.turn)

    @cached_property
    def _samples(self) -> tuple[Samples, Samples]:
        return Samples(self.rest_sizes, FIRST_NBYTES), Samples(self.rest_sizes, SAMPLED_NBYTES)


def _address_of(data: bytes | memoryview) -> int:
    address: int = numpy.frombuffer(data, numpy.uint8).__array_interface__["data"][0]
    return address


def _kind_of(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return _EMPTY
    if tensor.device.type != "cpu":
        return _DEVICE
    return _HOST if _is_even(tensor) else _UNEVEN


def _is_even(tensor: torch.Tensor) -> bool:
    """Whether its memory holds its items as they are counted, and will for as long as it lies there."""
    # A conjugate is told from its original by a bit of the tensor, which may change with nothing else.
    return tensor.is_contiguous() and not tensor.is_complex() and not tensor.is_neg() and not tensor.is_inference()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its items in memory as they are counted; itself where they are so already.

    On devices too: torch conjugates and negates what a copy to the host brings there before it has arrived.
    """
    return tensor.detach().resolve_conj().resolve_neg().contiguous()
