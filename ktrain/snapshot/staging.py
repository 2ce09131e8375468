"""Device or host to slot: the bytes of a SavePlan and their digests."""

from __future__ import annotations

import numpy
import torch

from ktrain import device, native
from ktrain.errors import ConfigError
from ktrain.format.payload import CHUNK_NBYTES, Entry
from ktrain.native import Segment
from ktrain.state.plan import Item, SavePlan


def stage(plan: SavePlan, memory: memoryview, *, num_threads: int = 1) -> tuple[int, ...]:
    """Writes the plan's payload into a slot and returns the digests of its chunks, header included.

    Returns when every byte is in the slot, also those of devices; then the tensors may change. Host tensors
    are copied and digested in one pass over memory.

    Raises:
        ConfigError: the slot has not the payload's size.
    """
    if memory.nbytes != plan.layout.nbytes:
        raise ConfigError(f"stage: the payload has {plan.layout.nbytes} bytes, the slot {memory.nbytes}")
    header = numpy.frombuffer(plan.layout.header, dtype=numpy.uint8)
    segments = [Segment(header.ctypes.data, header.nbytes, 0)]
    kept: list[torch.Tensor] = []  # temporaries that segments point into
    devices: set[torch.device] = set()
    for item, entry in zip(plan.items, plan.layout.entries, strict=True):
        if entry.begin == entry.end:
            continue
        if item.tensor.device.type == "cpu":
            kept.append(_plain(item.tensor))
            segments.append(Segment(kept[-1].data_ptr(), entry.end - entry.begin, entry.begin))
        else:
            _start_copy(item, entry, memory)
            devices.add(item.tensor.device)
    for used in devices:
        device.synchronize(used)
    return tuple(native.gather_digest(memory, segments, chunk_nbytes=CHUNK_NBYTES, num_threads=num_threads))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its items in memory as they are counted; itself where they are so already."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def _start_copy(item: Item, entry: Entry, memory: memoryview) -> None:
    """Copies from a device without waiting, where the slot is pinned; `stage` waits for the device."""
    shape = item.shard.box.lengths
    view = torch.frombuffer(memory, dtype=item.tensor.dtype, count=item.tensor.numel(), offset=entry.begin).reshape(
        shape
    )
    view.copy_(item.tensor, non_blocking=True)
