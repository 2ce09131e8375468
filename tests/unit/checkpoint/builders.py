"""Small checkpoints in a store, and what the layers around the catalog need."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

from ktrain import native
from ktrain.abc.tier import Tier
from ktrain.base.clock import Clock, Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.drain import Drain
from ktrain.format import record as records
from ktrain.format.digest import join_digests
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, lay_out
from ktrain.format.record import CommitRecord, RankFiles
from ktrain.format.shard import Box, Role, Shard
from ktrain.testing.fake_clock import FakeClock

RUN = "ab" * 16
TIMEOUTS = Timeouts(patience_s=8)
QUIET = FaultPoints([], epoch=1)
NUM_FLOATS = 64


def identity(step: int, epoch: int = 1, world_size: int = 2) -> Identity:
    return Identity(RUN, step, epoch, world_size)


def deadline() -> Deadline:
    return Deadline.after(60.0)


def snapshot(rank: int, at: Identity) -> tuple[bytes, Manifest]:
    """A rank's part of one sharded tensor, every number of it the step."""
    shape = (at.world_size, NUM_FLOATS)
    shard = Shard("model.weight", "float32", shape, Box((rank, 0), (1, NUM_FLOATS)), Role.SHARDED)
    layout = lay_out([shard])
    payload = layout.header + struct.pack("<f", float(at.step)) * NUM_FLOATS
    chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES))
    plan = f"{rank:016x}"
    manifest = Manifest(at, rank, plan, len(payload), CHUNK_NBYTES, chunks, layout.entries, {}, {})
    return payload, manifest


def divided(rank: int, at: Identity) -> tuple[tuple[bytes, Manifest], tuple[bytes, Manifest]]:
    """What a rank saves of a tensor that all ranks hold: three chunks as its share, and as copies those of all others.

    The share ends with a value of the rank's own.
    """
    shape = (at.world_size, 3 * CHUNK_NBYTES)
    boxes = [Box((row, 0), (1, shape[1])) for row in range(at.world_size)]
    shards = [Shard("model.weight", "uint8", shape, box, Role.REPLICATED) for box in boxes]
    own = Shard("model.own", "uint8", (1000,), Box.whole((1000,)), Role.RANK)
    beside = [shard for row, shard in enumerate(shards) if row != rank]
    return _random([shards[rank], own], rank, at), _random(beside, rank, at)


def _random(shards: Sequence[Shard], rank: int, at: Identity) -> tuple[bytes, Manifest]:
    """A payload of bytes, the same for a row and a step wherever they are stored."""
    layout = lay_out(shards)
    seeds = [f"{rank} {at}" if shard.role is Role.RANK else f"{shard.box} {at}" for shard in shards]
    data = [random.Random(seed).randbytes(shard.box.numel) for seed, shard in zip(seeds, shards, strict=True)]
    payload = b"".join([layout.header, *data])
    chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES))
    return payload, Manifest(at, rank, f"{rank:016x}", len(payload), CHUNK_NBYTES, chunks, layout.entries, {}, {})


def catalog(tier: Tier, clock: Clock | None = None) -> RunCatalog:
    return RunCatalog(tier, RUN, timeouts=TIMEOUTS, clock=clock or FakeClock())


def upload(tier: Tier, at: Identity, write_id: str = "0a1b") -> Drain:
    """What the ranks of a drain leave in the store, before anything is committed."""
    drain = Drain(at, started_s=0.0, write_id=write_id)
    for rank in range(at.world_size):
        _put_rank(tier, drain, *snapshot(rank, at))
    return drain


def _put_rank(tier: Tier, drain: Drain, payload: bytes, manifest: Manifest) -> None:
    at, data = (drain.identity.step, drain.identity.epoch, drain.write_id, manifest.rank), manifest.to_bytes()
    files = RankFiles(
        manifest.rank,
        records.payload_name(*at),
        len(payload),
        manifest.payload_digest(),
        records.manifest_name(*at),
        len(data),
        manifest.digest(),
    )
    tier.write(files.payload, payload, deadline=deadline())
    tier.write(files.manifest, data, deadline=deadline())
    report = {name: getattr(files, name) for name in RankFiles.__slots__}
    said = {"write_id": drain.write_id, "rank": manifest.rank, "files": report, "plan_digest": manifest.plan_digest}
    drain.take("instance-0", said, 0.0)


def record_of(drain: Drain) -> CommitRecord:
    ranks = tuple(drain.files[rank] for rank in sorted(drain.files))
    digests = join_digests([drain.plan_digests[files.rank] for files in ranks])
    return CommitRecord(drain.identity, drain.write_id, digests, ranks, 1.5, {})


def put_checkpoint(tier: Tier, at: Identity, write_id: str = "0a1b") -> CommitRecord:
    """A committed checkpoint."""
    commit = record_of(upload(tier, at, write_id))
    tier.write(records.commit_name(at.step, at.epoch, write_id), commit.to_bytes(), deadline=deadline())
    return commit


def put_tensors(
    tier: Tier, at: Identity, ranks: Sequence[Sequence[tuple[Shard, bytes]]], objects: dict[str, Any] | None = None
) -> CommitRecord:
    """A committed checkpoint of these shards, by rank."""
    drain = Drain(at, started_s=0.0, write_id="0a1b")
    for rank, shards in enumerate(ranks):
        layout = lay_out([shard for shard, _ in shards])
        data = {(shard.name, shard.box): values for shard, values in shards}
        payload = layout.header + b"".join(data[entry.shard.name, entry.shard.box] for entry in layout.entries)
        chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES))
        manifest = Manifest(
            at, rank, f"{rank:016x}", len(payload), CHUNK_NBYTES, chunks, layout.entries, objects or {}, {}
        )
        _put_rank(tier, drain, payload, manifest)
    commit = record_of(drain)
    tier.write(commit_name(commit), commit.to_bytes(), deadline=deadline())
    return commit


def commit_name(commit: CommitRecord) -> str:
    return records.commit_name(commit.identity.step, commit.identity.epoch, commit.write_id)


def flip(data: bytes, at: int = -1) -> bytes:
    """The bytes with one bit changed; in the middle unless `at` says where."""
    spoilt = bytearray(data)
    spoilt[len(spoilt) // 2 if at < 0 else at] ^= 1
    return bytes(spoilt)


class Log:
    """Takes events as (kind, fields)."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.said.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for said, fields in self.said if said == kind]
