"""The commit record: the one object whose presence makes a checkpoint, and the names of everything below RUN.

Invariant: a record is written last, under a name that nobody else ever writes; it names the proof of every
byte of the checkpoint, so that whoever holds a record needs to trust nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ktrain.base import contract
from ktrain.errors import ConfigError, CorruptionError
from ktrain.format import document
from ktrain.format.digest import join_digests
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import box_text
from ktrain.format.shard import Box, Role, Shard, missing_boxes

KIND = "ktrain.commit"

_WRITE_ID = re.compile(r"[0-9a-z]{1,64}")
_COMMIT = re.compile(
    rf"{contract.CHECKPOINTS_DIR}/step-(\d{{8,19}})/commit-(\d{{6,19}})-([0-9a-z]{{1,64}})\.json", re.ASCII
)
_SEGMENT = re.compile(r"[0-9A-Za-z_=-][0-9A-Za-z._=-]*")


class Gap(CorruptionError):
    """Manifests that are good each, but do not make a checkpoint together."""


@dataclass(frozen=True, slots=True)
class RankFiles:
    """One rank's two objects and their digests; names are relative to RUN."""

    rank: int
    payload: str
    nbytes: int
    payload_digest: str
    manifest: str
    manifest_nbytes: int
    manifest_digest: str


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A checkpoint: all ranks' snapshots of one identity.

    `time`: seconds since 1970, UTC, for people. `format`: the version in which it is written, and was read.
    """

    identity: Identity
    write_id: str
    plan_digest: str
    ranks: tuple[RankFiles, ...]
    time: float
    origin: dict[str, Any]
    format: int = document.FORMAT

    def to_bytes(self) -> bytes:
        """The record's object; equal records give equal bytes.

        Raises:
            ConfigError: `origin` is no plain JSON, or `format` is of a newer ktrain.
        """
        write = _WRITERS[document.check_version(KIND, self.format)]
        return document.seal(KIND, write(self), self.format)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> CommitRecord:
        """Reads and proves a commit record.

        Raises:
            CorruptionError: it is torn, changed, or says what cannot be.
            ConfigError: a newer ktrain wrote it.
        """
        members = document.unseal(KIND, data)
        return _READERS[members.version](members)


def _write_1(record: CommitRecord) -> dict[str, Any]:
    return {
        "identity": record.identity.to_json(),
        "write_id": record.write_id,
        "plan_digest": record.plan_digest,
        "ranks": [{name: getattr(files, name) for name in RankFiles.__slots__} for files in record.ranks],
        "time": record.time,
        "origin": record.origin,
    }


def _read_1(members: document.Members) -> CommitRecord:
    record = CommitRecord(
        identity=Identity.from_members(members.inner("identity")),
        write_id=members.text("write_id"),
        plan_digest=members.digest("plan_digest"),
        ranks=tuple(_rank_files(members, value) for value in members.array("ranks")),
        time=members.number("time"),
        origin=members.object("origin"),
        format=members.version,
    )
    members.finish()
    if _WRITE_ID.fullmatch(record.write_id) is None:
        raise members.corrupt(f"write_id: expected lower-case letters and digits, found {record.write_id[:80]!r}")
    ranks, world_size = [files.rank for files in record.ranks], record.identity.world_size
    if ranks != list(range(world_size)):
        raise members.corrupt(f"ranks: expected ranks 0 to {world_size - 1} in order, found {ranks[:20]}")
    return record


# By version (ADR 0016). A row is added for each new one, and never removed.
_WRITERS: dict[int, Callable[[CommitRecord], dict[str, Any]]] = {1: _write_1}
_READERS: dict[int, Callable[[document.Members], CommitRecord]] = {1: _read_1}


def commit_name(step: int, epoch: int, write_id: str) -> str:
    """`checkpoints/step-00000010/commit-000002-0a1b2c.json`."""
    return f"{step_folder(step)}/commit-{_epoch_and_id(epoch, write_id)}.json"


def payload_name(step: int, epoch: int, write_id: str, rank: int) -> str:
    """`checkpoints/step-00000010/data-000002-0a1b2c/rank-00003.safetensors`."""
    return f"{_rank_stem(step, epoch, write_id, rank)}.safetensors"


def manifest_name(step: int, epoch: int, write_id: str, rank: int) -> str:
    """`checkpoints/step-00000010/data-000002-0a1b2c/rank-00003.json`."""
    return f"{_rank_stem(step, epoch, write_id, rank)}.json"


def step_folder(step: int) -> str:
    """`checkpoints/step-00000010`."""
    return f"{contract.CHECKPOINTS_DIR}/{contract.step_dirname(step)}"


def parse_commit_name(name: str) -> tuple[int, int, str] | None:
    """Step, epoch and write id of a commit record's name; None for any other name."""
    match = _COMMIT.fullmatch(name)
    if match is None:
        return None
    step, epoch, write_id = int(match[1]), int(match[2]), match[3]
    return (step, epoch, write_id) if commit_name(step, epoch, write_id) == name else None


def check_plan(commit: CommitRecord, plan_digests: Sequence[str]) -> None:
    """Proves that a record is of the plans by which its ranks saved; theirs are given in its order of ranks.

    Raises:
        CorruptionError: the record and the manifests contradict each other.
    """
    found = join_digests(plan_digests)
    if found != commit.plan_digest:
        raise _gap(commit.identity, f"expected the plan {commit.plan_digest}, found {found} in its ranks' manifests")


def check_coverage(manifests: Sequence[Manifest]) -> None:
    """Proves that manifests make a checkpoint: one identity, every rank once, every tensor whole.

    Raises:
        Gap: something is missing or does not fit; says what.
    """
    if not manifests:
        raise Gap("checkpoint: expected the manifests of all ranks, found none; take another step")
    identity = manifests[0].identity
    for manifest in manifests:
        if manifest.identity != identity:
            raise _gap(identity, f"rank {manifest.rank} has {manifest.identity}")
    ranks = [manifest.rank for manifest in manifests]
    lacking = sorted(set(range(identity.world_size)) - set(ranks))
    if lacking or len(ranks) != identity.world_size:
        raise _gap(
            identity,
            f"expected each of {identity.world_size} ranks once, found {len(ranks)}, lacking {lacking[:20]}",
        )
    known: _Missing = {}
    for shards in _by_tensor(manifests).values():
        _check_tensor(identity, shards, known)


def _by_tensor(manifests: Sequence[Manifest]) -> dict[tuple[str, int], list[Shard]]:
    """The shards that must join, by name; of what is each rank's own, by rank as well."""
    groups: dict[tuple[str, int], list[Shard]] = {}
    for manifest in manifests:
        for entry in manifest.entries:
            rank = manifest.rank if entry.shard.role is Role.RANK else -1
            groups.setdefault((entry.shard.name, rank), []).append(entry.shard)
    return groups


# What boxes lack of a shape. The layers of a model are cut alike: most tensors are answered by another.
_Missing: TypeAlias = dict[tuple[tuple[int, ...], tuple[Box, ...]], list[Box]]


def _check_tensor(identity: Identity, shards: list[Shard], known: _Missing) -> None:
    first = shards[0]
    expected = (first.dtype, first.global_shape, first.role)
    for shard in shards:
        if (shard.dtype, shard.global_shape, shard.role) != expected:
            raise _gap(
                identity,
                f"tensor {first.name!r}: expected {first.role} {first.dtype} {first.global_shape} on every "
                f"rank, found {shard.role} {shard.dtype} {shard.global_shape}",
            )
    case = (first.global_shape, tuple(shard.box for shard in shards))
    missing = known.get(case)
    if missing is None:
        missing = known[case] = missing_boxes(*case)
    if missing:
        lost = Shard(first.name, first.dtype, first.global_shape, missing[0], first.role)
        num = sum(box.numel for box in missing)
        raise _gap(
            identity,
            f"tensor {first.name!r} of shape {first.global_shape}: no rank holds {num} items, among them "
            f"{box_text(lost)}",
        )


def _gap(identity: Identity, problem: str) -> Gap:
    return Gap(f"checkpoint {identity}: {problem}; take another step")


def _rank_stem(step: int, epoch: int, write_id: str, rank: int) -> str:
    return f"{step_folder(step)}/data-{_epoch_and_id(epoch, write_id)}/{contract.rank_dirname(rank)}"


def _epoch_and_id(epoch: int, write_id: str) -> str:
    if _WRITE_ID.fullmatch(write_id) is None:
        raise ConfigError(
            f"write id: expected lower-case letters and digits, found {write_id[:80]!r}; use ids.random_id"
        )
    return f"{epoch:06d}-{write_id}"


def _rank_files(members: document.Members, value: Any) -> RankFiles:
    if not isinstance(value, dict):
        raise members.corrupt(f"ranks: expected objects, found {str(value)[:40]!r}")
    row = document.Members(f"{members.what} ranks", value)
    files = RankFiles(
        rank=row.integer("rank"),
        payload=_name(row, "payload"),
        nbytes=row.integer("nbytes"),
        payload_digest=row.digest("payload_digest"),
        manifest=_name(row, "manifest"),
        manifest_nbytes=row.integer("manifest_nbytes"),
        manifest_digest=row.digest("manifest_digest"),
    )
    row.finish()
    return files


def _name(members: document.Members, field: str) -> str:
    """A name below RUN's checkpoints: a record must not lead a reader anywhere else."""
    name = members.text(field)
    parts = name.split("/")
    if parts[0] != contract.CHECKPOINTS_DIR or len(name) > 1024 or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise members.corrupt(f"{field}: expected a name below {contract.CHECKPOINTS_DIR}/, found {name[:80]!r}")
    return name
