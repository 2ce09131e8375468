"""One rank's share of a DCP save: its payload in host memory, and its two objects in the store.

Invariant: what the planner promised of an item, its dtype and its box, is what lies in the payload.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

import ktrain
from ktrain import native
from ktrain.base.urls import public_url
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.dcp_attempt import Save, Word
from ktrain.checkpoint.dcp_memory import keep_copy
from ktrain.errors import ConfigError
from ktrain.format import record as records
from ktrain.format.digest import digest_text
from ktrain.format.dtype import is_dtype, item_nbytes
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, Entry, Layout, lay_out
from ktrain.format.record import RankFiles
from ktrain.format.shard import Box, Role, Shard
from ktrain.state.tensors import dtype_name

PART = "dcp"  # the part, and its kind, that a DCP save has in its manifests


@dataclass(slots=True)
class Payload:
    """A rank's payload in host memory; `memory` is given back by `release`."""

    layout: Layout
    memory: memoryview
    chunks: tuple[int, ...]
    bytes_names: list[str]

    def release(self) -> None:
        self.memory = memoryview(b"")


@dataclass(slots=True)
class Written:
    """What one rank has written of a save, or is writing."""

    word: Word
    save: Save
    payload: Payload
    keep_in_memory: int
    payload_name: str = field(init=False)

    def __post_init__(self) -> None:
        self.payload_name = records.payload_name(self.save.step, self.word.epoch, self._write_id, self.word.rank)

    @property
    def _write_id(self) -> str:
        return self.save.write_id(self.word)

    def write_manifest(self, catalog: RunCatalog, about: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest; returns what the coordinator needs to know of this rank."""
        word, layout, step = self.word, self.payload.layout, self.save.step
        manifest = Manifest(
            identity=Identity(word.run, step, word.epoch, word.world_size),
            rank=word.rank,
            plan_digest=_plan_digest(layout),
            nbytes=layout.nbytes,
            chunk_nbytes=CHUNK_NBYTES,
            chunks=self.payload.chunks,
            entries=layout.entries,
            objects={PART: {"kind": PART, "bytes": self.payload.bytes_names, **about}},
            origin={"ktrain": ktrain.__version__, "torch": torch.__version__},
            format=catalog.format,
        )
        if self.keep_in_memory:
            keep_copy(public_url(word.url), manifest, self.payload.memory, num_kept=self.keep_in_memory)
            self.payload.release()
        data, digest = manifest.to_bytes(), manifest.digest()
        name = records.manifest_name(step, word.epoch, self._write_id, word.rank)
        catalog.tier.write(name, data, deadline=catalog.transfer_deadline(len(data)))
        files = RankFiles(
            word.rank, self.payload_name, layout.nbytes, manifest.payload_digest(), name, len(data), digest
        )
        return {"write_id": self._write_id, "files": asdict(files), "plan_digest": manifest.plan_digest}


def capture(plan: SavePlan, planner: SavePlanner, version: int) -> Payload:
    """Copies what a rank's plan names into one payload of the run's format `version`, and digests it."""
    opaque = {
        item.index.fqn: _bytes_of(planner.resolve_data(item), item.index.fqn)
        for item in plan.items
        if item.type is WriteItemType.BYTE_IO
    }
    pairs = [(_shard_of(item, opaque), item) for item in plan.items]
    pairs.sort(key=lambda pair: -item_nbytes(pair[0].dtype))  # the order of a payload
    layout = lay_out([shard for shard, _ in pairs], version=version)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    memory = buffer.numpy().data
    memory[: len(layout.header)] = layout.header
    for entry, (_, item) in zip(layout.entries, pairs, strict=True):
        if item.type is WriteItemType.BYTE_IO:
            memory[entry.begin : entry.end] = opaque[item.index.fqn]
        else:
            _copy(entry, planner.resolve_data(item), buffer[entry.begin : entry.end])
    chunks = native.digest_chunks(memory, chunk_nbytes=CHUNK_NBYTES, num_threads=_num_threads())
    return Payload(layout, memory, tuple(chunks), sorted(opaque))


def _shard_of(item: WriteItem, opaque: Mapping[str, bytes]) -> Shard:
    about, fqn = item.tensor_data, item.index.fqn
    if item.type is WriteItemType.BYTE_IO:
        shape = (len(opaque[fqn]),)
        return Shard(fqn, "uint8", shape, Box.whole(shape), Role.REPLICATED)
    if about is None:
        raise ConfigError(f"tensor {fqn!r}: the planner names neither its shape nor its dtype; correct the planner")
    dtype = dtype_name(about.properties.dtype)
    if not is_dtype(dtype):
        raise ConfigError(f"tensor {fqn!r} cannot be stored: its dtype is {about.properties.dtype}; convert it first")
    box = Box(tuple(map(int, about.chunk.offsets)), tuple(map(int, about.chunk.sizes)))
    role = Role.SHARDED if item.type is WriteItemType.SHARD else Role.REPLICATED
    return Shard(fqn, dtype, tuple(map(int, about.size)), box, role)


def _bytes_of(value: Any, fqn: str) -> bytes:
    if not isinstance(value, io.BytesIO):
        raise ConfigError(f"{fqn!r}: the planner promised bytes, it gave {type(value).__name__}; correct the planner")
    return value.getvalue()


def _copy(entry: Entry, tensor: Any, target: torch.Tensor) -> None:
    """Copies a tensor, on whatever device and however strided, into its bytes of the payload."""
    shard = entry.shard
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"tensor {shard.name!r}: the planner gave {type(tensor).__name__}; correct the planner")
    found = dtype_name(tensor.dtype), tuple(tensor.shape), tensor.layout
    if found != (shard.dtype, shard.box.lengths, torch.strided):
        raise ConfigError(
            f"tensor {shard.name!r}: the planner promised {shard.dtype} {shard.box.lengths}, it gave {found[0]} "
            f"{found[1]} ({found[2]}); correct the planner"
        )
    if not shard.box.numel:
        return
    memory = memory_of(tensor)
    if memory is not None:
        target.numpy().data[:] = memory
    else:
        with torch.no_grad():
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def memory_of(tensor: torch.Tensor) -> memoryview | None:
    """The bytes of a tensor that lies in host memory row by row, else None.

    For plain copies: torch starts its threads for each one, which costs more than the copy where cores are busy.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return None
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat.data)


def _num_threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))


def _plan_digest(layout: Layout) -> str:
    shards = [entry.shard for entry in layout.entries]
    rows = [[s.name, s.dtype, s.global_shape, s.box.offsets, s.box.lengths, s.role] for s in shards]
    return digest_text(json.dumps(rows, separators=(",", ":")).encode())
