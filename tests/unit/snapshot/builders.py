"""Small snapshots for tests of the memory tier."""

from __future__ import annotations

import struct
from pathlib import Path

from ktrain import native
from ktrain.format.manifest import Identity, Manifest, verify_payload
from ktrain.format.payload import CHUNK_NBYTES, lay_out
from ktrain.format.shard import Box, Role, Shard
from ktrain.snapshot.arena import Held, NodeVolume

RUN = "0123456789abcdef"
NODE = "node-0"
NUM_FLOATS = 300


def volume_at(root: Path, **options: object) -> NodeVolume:
    return NodeVolume(root, node=NODE, run=RUN, **options)  # type: ignore[arg-type]


def identity(step: int, epoch: int = 1, *, run: str = RUN) -> Identity:
    return Identity(run=run, step=step, epoch=epoch, world_size=8)


def snapshot(rank: int, at: Identity, *, num_floats: int = NUM_FLOATS) -> tuple[bytes, Manifest]:
    """A payload whose every number is the step, and its manifest."""
    shape = (num_floats,)
    layout = lay_out([Shard("model.weight", "float32", shape, Box.whole(shape), Role.SHARDED)])
    payload = layout.header + struct.pack("<f", float(at.step)) * num_floats
    chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES))
    manifest = Manifest(
        identity=at,
        rank=rank,
        plan_digest="0" * 16,
        nbytes=len(payload),
        chunk_nbytes=CHUNK_NBYTES,
        chunks=chunks,
        entries=layout.entries,
        objects={},
        origin={},
    )
    return payload, manifest


def try_save(
    volume: NodeVolume,
    step: int,
    epoch: int = 1,
    *,
    rank: int = 3,
    limit: int = 3,
    protect: tuple[tuple[int, int], ...] = (),
    num_floats: int = NUM_FLOATS,
) -> Held | None:
    """Saves one snapshot; None where the volume has no free slot."""
    payload, manifest = snapshot(rank, identity(step, epoch), num_floats=num_floats)
    writer = volume.acquire(rank, len(payload), protect=protect, limit=limit)
    if writer is None:
        return None
    writer.memory[:] = payload
    return writer.seal(manifest)


def save(volume: NodeVolume, step: int, epoch: int = 1, **options: object) -> Held:
    held = try_save(volume, step, epoch, **options)  # type: ignore[arg-type]
    assert held is not None, "no free slot"
    return held


def steps(volume: NodeVolume, rank: int = 3) -> list[tuple[int, int]]:
    """(step, epoch) of what is held, each proven by its digests."""
    found = []
    for held in volume.scan():
        if held.rank == rank:
            with volume.open(rank, held.identity) as reader:
                verify_payload(reader.manifest, reader.memory)
            found.append((held.identity.step, held.identity.epoch))
    return found
