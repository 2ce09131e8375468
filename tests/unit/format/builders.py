"""Small checkpoints with known bytes, and a second implementation of the digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ktrain import native
from ktrain.format import digest, record
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, Layout, lay_out
from ktrain.format.record import CommitRecord, RankFiles
from ktrain.format.shard import Box, Role, Shard

RUN = "0123456789abcdef" * 2
_POLYNOMIAL = 0x9A6C9329AC4BC9B5  # CRC-64/NVME, reflected


def oracle_crc64(data: bytes) -> int:
    """CRC-64/NVME, bit by bit."""
    value = 2**64 - 1
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
    return value ^ (2**64 - 1)


@dataclass(frozen=True, slots=True)
class Snapshot:
    manifest: Manifest
    payload: bytes


def shard(
    name: str,
    shape: Sequence[int],
    *,
    dtype: str = "float32",
    box: Box | None = None,
    role: Role = Role.SHARDED,
) -> Shard:
    return Shard(name, dtype, tuple(shape), box or Box.whole(shape), role)


def fill(layout: Layout, salt: int = 0) -> bytes:
    """The payload with counting bytes as data."""
    num = layout.nbytes - len(layout.header)
    return layout.header + bytes((salt + k * 7) % 251 for k in range(num))


def snapshot(
    shards: Sequence[Shard],
    *,
    rank: int = 0,
    world_size: int = 1,
    chunk_nbytes: int = CHUNK_NBYTES,
    objects: dict[str, Any] | None = None,
) -> Snapshot:
    layout = lay_out(shards)
    payload = fill(layout, rank)
    manifest = Manifest(
        identity=Identity(RUN, 10, 2, world_size),
        rank=rank,
        plan_digest=digest.digest_text(layout.header),
        nbytes=layout.nbytes,
        chunk_nbytes=chunk_nbytes,
        chunks=tuple(native.digest_chunks(payload, chunk_nbytes=chunk_nbytes)),
        entries=layout.entries,
        objects=objects or {},
        origin={"ktrain": "0.1.0"},
    )
    return Snapshot(manifest, payload)


def with_identity(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, identity=replace(manifest.identity, **changes))


def checkpoint() -> dict[str, bytes]:
    """A whole checkpoint of two ranks, by name: the worked example of docs/format.md and the golden files."""
    snapshots = []
    for rank in range(2):
        objects = {"optimizer": {"lr": 0.5, "betas": {"$": "tuple", "v": [0.9, 0.999]}}} if rank == 0 else {}
        shards = [
            shard("model/weight", (4, 2), box=Box((2 * rank, 0), (2, 2))),
            shard("model/mask", (3,), dtype="bool", role=Role.RANK),
            shard("model/phase", (2,), dtype="complex64", role=Role.RANK),
        ]
        if rank == 0:
            shards.append(shard("model/bias", (2,), dtype="bfloat16", role=Role.REPLICATED))
        else:
            shards.append(shard("model/weight", (4, 2), box=Box((0, 1), (1, 1))))
        # The golden files are from the time of larger chunks; a reader takes the size from the manifest.
        snapshots.append(snapshot(shards, rank=rank, world_size=2, chunk_nbytes=1 << 20, objects=objects))
    files: dict[str, bytes] = {}
    ranks = []
    for each in snapshots:
        rank = each.manifest.rank
        manifest = each.manifest.to_bytes()
        payload_name = record.payload_name(10, 2, "0a1b2c", rank)
        manifest_name = record.manifest_name(10, 2, "0a1b2c", rank)
        files |= {payload_name: each.payload, manifest_name: manifest}
        ranks.append(
            RankFiles(
                rank=rank,
                payload=payload_name,
                nbytes=len(each.payload),
                payload_digest=each.manifest.payload_digest(),
                manifest=manifest_name,
                manifest_nbytes=len(manifest),
                manifest_digest=digest.digest_text(manifest),
            )
        )
    commit = CommitRecord(
        identity=snapshots[0].manifest.identity,
        write_id="0a1b2c",
        plan_digest=digest.join_digests([each.manifest.plan_digest for each in snapshots]),
        ranks=tuple(ranks),
        time=1767225600.5,
        origin={"ktrain": "0.1.0"},
    )
    files[record.commit_name(10, 2, "0a1b2c")] = commit.to_bytes()
    return files
