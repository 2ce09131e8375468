"""What a run's directory says: its identity, its attempts, and the checkpoints that are committed in it.

Everything here is written once under a name of its own (no rename, no overwrite), so that it works alike on a local
directory and on an object store, and so that a zombie can only ever add what nobody takes. Imports neither torch nor
ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ktrain.abc.tier import Stored, Tier
from ktrain.base import contract, ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import formats
from ktrain.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.format import document
from ktrain.format import record as records
from ktrain.format.manifest import Manifest, bad_ranges_in
from ktrain.format.record import CommitRecord, RankFiles
from ktrain.tier.location import open_tier

_WIDEST_EPOCH = 999_999


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """What the run directory knows of one attempt; a part that was never written is None."""

    epoch: int
    start: dict[str, Any] | None = None
    restored: dict[str, Any] | None = None
    committed: dict[str, Any] | None = None  # the attempt's first commit in any tier
    durable: dict[str, Any] | None = None  # the attempt's first commit in the bucket
    undivided: dict[str, Any] | None = None  # from where on each node stored all that its ranks hold (ADR 0015)
    end: dict[str, Any] | None = None

    @property
    def restored_step(self) -> int | None:
        """The step this attempt continued from (0 for a fresh start); None when it never got that far."""
        return None if self.restored is None else int(self.restored["step"])


@dataclass(frozen=True, slots=True)
class Listing:
    """Committed checkpoints (newest last) and commit records that cannot be used, by name.

    Attributes:
        broken: (name, reason) of every record that cannot be used.
        lost: names among them that were written to their end: each stands for a checkpoint that was committed.
        newer: names among them that a newer ktrain wrote.
        stored: every object below the run's checkpoints, whoever wrote it.
    """

    commits: tuple[CommitRecord, ...]
    broken: tuple[tuple[str, str], ...] = field(default=())
    lost: tuple[str, ...] = field(default=())
    newer: tuple[str, ...] = field(default=())
    stored: tuple[Stored, ...] = field(default=(), compare=False, repr=False)


_PARTS = ("start", "restored", "committed", "durable", "undivided", "end")


def _parse_attempt(stored: Stored) -> tuple[int, str]:
    """Epoch and part of an attempt's record; (0, "") for any other object."""
    stem = stored.name.removeprefix(f"{contract.ATTEMPTS_DIR}/attempt-").removesuffix(".json")
    number, _, part = stem.partition("-")
    return (int(number), part) if number.isascii() and number.isdecimal() and part in _PARTS else (0, "")


def _attempt_name(epoch: int, part: str) -> str:
    return f"{contract.ATTEMPTS_DIR}/attempt-{epoch:06d}-{part}.json"


class RunCatalog:
    """The records of one run. Calls block on storage under deadlines; safe from any thread."""

    def __init__(
        self,
        tier: Tier,
        run_id: str,
        *,
        timeouts: Timeouts,
        clock: Clock = SYSTEM_CLOCK,
        format: int = document.FORMAT,
    ) -> None:
        self.tier = tier
        self.run_id = run_id
        self.format = format  # the version that the run's writers write
        self._timeouts = timeouts
        self._clock = clock

    @classmethod
    def open(cls, url: str, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK, create: bool = True) -> RunCatalog:
        """Opens the run at `url`; with `create` a run that is not there yet is made.

        Raises:
            NotFoundError: there is no run and `create` is false.
            ConfigError: the URL cannot be used or is of a newer format.
            UnavailableError: the store could not be asked.
        """
        tier = open_tier(url, timeouts=timeouts)
        try:
            return cls._open(tier, timeouts=timeouts, clock=clock, create=create)
        except BaseException:
            tier.close()
            raise

    @classmethod
    def _open(cls, tier: Tier, *, timeouts: Timeouts, clock: Clock, create: bool) -> RunCatalog:
        deadline = Deadline.after(timeouts.storage_s, clock)
        try:
            found = _parse_run(tier, tier.read(contract.RUN_FILE, deadline=deadline))
        except NotFoundError:
            if not create:
                raise NotFoundError(
                    f"run {tier.url}: there is no run here; check the name or start one with `ktrain launch`"
                ) from None
            fresh = {"format": document.FORMAT, "id": ids.random_id(16), "created": clock.wall()}
            try:
                tier.create(
                    contract.RUN_FILE, json.dumps(fresh).encode(), deadline=Deadline.after(timeouts.storage_s, clock)
                )
            except ConflictError:
                pass  # somebody else made it first; theirs counts
            try:
                data = tier.read(contract.RUN_FILE, deadline=Deadline.after(timeouts.storage_s, clock))
            except NotFoundError as error:
                raise ConfigError(f"run {tier.url}: it cannot be made there ({error}); name another place") from None
            found = _parse_run(tier, data)
        run_id, began_with = found
        version = formats.run_format(tier, began_with, timeouts=timeouts, clock=clock)
        return cls(tier, run_id, timeouts=timeouts, clock=clock, format=version)

    def _deadline(self) -> Deadline:
        return Deadline.after(self._timeouts.storage_s, self._clock)

    def transfer_deadline(self, nbytes: int) -> Deadline:
        """A deadline for moving `nbytes`: one call's patience plus the time at 1 MB/s."""
        return Deadline.after(self._timeouts.storage_s + nbytes / 1e6, self._clock)

    # Attempts

    def next_epoch(self, start: dict[str, Any]) -> int:
        """Allocates the next epoch by creating its start record; `start` says who and how."""
        epoch = max((attempt.epoch for attempt in self.attempts()), default=0) + 1
        while epoch <= _WIDEST_EPOCH:
            write_id = ids.random_id()
            data = json.dumps({**start, "write_id": write_id, "time": self._clock.wall()}).encode()
            name = _attempt_name(epoch, "start")
            try:
                self.tier.create(name, data, deadline=self._deadline())
            except ConflictError:
                if self._wrote(name, write_id):  # the reply of our own create was lost and it was tried again below us
                    return epoch
                epoch += 1
                continue
            if self._wrote(name, write_id):
                return epoch
            epoch += 1
        raise ConflictError(f"run {self.tier.url}: no epoch is left below {_WIDEST_EPOCH}; start a new run")

    def _wrote(self, name: str, write_id: str) -> bool:
        try:
            return bool(json.loads(self.tier.read(name, deadline=self._deadline())).get("write_id") == write_id)
        except ValueError:
            return False

    def record(self, epoch: int, part: str, fields: dict[str, Any]) -> None:
        """Adds a part ("restored", "committed", "durable", "undivided", "end") to an attempt's records."""
        assert part in _PARTS[1:], part
        data = json.dumps({**fields, "time": self._clock.wall()}).encode()
        self.tier.write(_attempt_name(epoch, part), data, deadline=self._deadline())

    def newest_epoch(self) -> int:
        """The newest attempt's epoch, from the names alone; 0 before there is one."""
        found = self.tier.list(f"{contract.ATTEMPTS_DIR}/", deadline=self._deadline())
        return max((epoch for epoch, _ in map(_parse_attempt, found)), default=0)

    def attempts(self) -> list[AttemptRecord]:
        """All attempts, oldest first. A part that is torn counts as not written."""
        parts: dict[int, dict[str, Any]] = {}
        for stored in self.tier.list(f"{contract.ATTEMPTS_DIR}/", deadline=self._deadline()):
            epoch, part = _parse_attempt(stored)
            if not epoch:
                continue
            try:
                value = json.loads(self.tier.read(stored.name, deadline=self._deadline()))
            except (ValueError, NotFoundError):
                value = None
            whole = isinstance(value, dict) and (part != "restored" or isinstance(value.get("step"), int))
            parts.setdefault(epoch, {})[part] = value if whole else None
        return [AttemptRecord(epoch=epoch, **parts[epoch]) for epoch in sorted(parts)]

    # Checkpoints

    def listing(self) -> Listing:
        """Every commit record under the run, read and checked; payloads are not touched."""
        commits: list[CommitRecord] = []
        broken: list[tuple[str, str]] = []
        lost: list[str] = []
        newer: list[str] = []
        found = self.tier.list(f"{contract.CHECKPOINTS_DIR}/", deadline=self._deadline())
        for stored in found:
            if records.parse_commit_name(stored.name) is None:
                continue
            try:
                data = self.tier.read(stored.name, deadline=self._deadline())
            except NotFoundError:
                self._require_unlisted(stored.name)
                continue  # collected between the listing and the read
            try:
                commits.append(self._parse_commit(stored.name, data))
            except (CorruptionError, ConfigError) as error:
                broken.append((stored.name, str(error)))
                if data.endswith(b'"}\n'):
                    lost.append(stored.name)
                if isinstance(error, ConfigError):
                    newer.append(stored.name)
        commits.sort(key=lambda commit: (commit.identity.step, commit.identity.epoch))
        return Listing(tuple(commits), tuple(broken), tuple(lost), tuple(newer), tuple(found))

    def _require_unlisted(self, name: str) -> None:
        """Raises UnavailableError where the store lists what it says it has not: one of its answers is wrong."""
        folder = name.rpartition("/")[0]
        if any(stored.name == name for stored in self.tier.list(folder, deadline=self._deadline())):
            raise UnavailableError(
                f"run {self.tier.url}: {name} is listed, and not found when it is read; the store contradicts itself"
            )

    def _parse_commit(self, name: str, data: bytes) -> CommitRecord:
        commit = CommitRecord.from_bytes(data)
        identity = commit.identity
        if records.parse_commit_name(name) != (identity.step, identity.epoch, commit.write_id):
            raise CorruptionError(f"{name}: the record inside is of step {identity.step} epoch {identity.epoch}")
        if identity.run != self.run_id:
            raise CorruptionError(f"{name}: it belongs to run {identity.run}, this is run {self.run_id}")
        return commit

    def read_commit(self, name: str) -> CommitRecord:
        """The commit record of this name.

        Raises:
            NotFoundError, CorruptionError: there is none, or none that counts.
        """
        return self._parse_commit(name, self.tier.read(name, deadline=self._deadline()))

    def read_manifest(self, commit: CommitRecord, files: RankFiles) -> Manifest:
        """The manifest of one rank, proven against the commit record.

        Raises:
            CorruptionError: it is not the manifest that was committed.
        """
        manifest = Manifest.from_bytes(self.tier.read(files.manifest, deadline=self._deadline()))
        same = manifest.identity == commit.identity and manifest.rank == files.rank
        if not same or manifest.digest() != files.manifest_digest:
            raise CorruptionError(
                f"{files.manifest}: expected the manifest of rank {files.rank}, {commit.identity} with digest "
                f"{files.manifest_digest}, found rank {manifest.rank}, {manifest.identity}, digest {manifest.digest()}"
            )
        return manifest

    def write_commit(self, commit: CommitRecord) -> None:
        """Makes a checkpoint exist. A reply that was lost is settled by reading back.

        Raises:
            UnavailableError, DeadlineError: it cannot be told whether the record is there; it does not count.
        """
        name = records.commit_name(commit.identity.step, commit.identity.epoch, commit.write_id)
        data = commit.to_bytes()
        failure: KtrainError | None = None
        try:
            self.tier.write(name, data, deadline=self._deadline())
        except KtrainError as error:
            failure = error
        try:
            found = self.tier.read(name, deadline=self._deadline())
        except KtrainError as error:
            raise (failure or error) from None
        if found != data:
            raise failure or CorruptionError(
                f"{name}: read back {len(found)} bytes that differ from the {len(data)} written"
            )


def _parse_run(tier: Tier, data: bytes) -> tuple[str, int]:
    """The run's id, and the format version that it began with."""
    try:
        value = json.loads(data)
        version, run_id = int(value["format"]), str(value["id"])
        if version < 1:
            raise ValueError(f"format {version}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"run {tier.url}: {contract.RUN_FILE} is damaged ({error}); restore it from a copy"
        ) from error
    return run_id, version


# Verification of committed checkpoints


@dataclass(frozen=True, slots=True)
class Finding:
    """One file of a checkpoint that is not proven; `begin` and `end` are the bad byte range where it is known."""

    step: int
    epoch: int
    rank: int | None
    name: str
    reason: str
    begin: int | None = None
    end: int | None = None


def verify_commit(catalog: RunCatalog, commit: CommitRecord) -> Iterator[Finding]:
    """Reads every byte of a committed checkpoint and yields what does not match its proof."""
    identity = commit.identity
    manifests: list[Manifest] = []
    for files in commit.ranks:
        where: dict[str, Any] = {"step": identity.step, "epoch": identity.epoch, "rank": files.rank}
        try:
            manifest = catalog.read_manifest(commit, files)
        except (CorruptionError, ConfigError, NotFoundError) as error:
            yield Finding(name=files.manifest, reason=str(error), **where)
            continue
        manifests.append(manifest)
        yield from (Finding(name=files.payload, **where, **bad) for bad in _bad_payload(catalog, files, manifest))
    if len(manifests) == len(commit.ranks):
        try:
            records.check_plan(commit, [manifest.plan_digest for manifest in manifests])
            records.check_coverage(manifests)
        except CorruptionError as error:
            yield Finding(identity.step, identity.epoch, None, commit_path(commit), str(error))


def commit_path(commit: CommitRecord) -> str:
    """Name of the commit record under the run."""
    return records.commit_name(commit.identity.step, commit.identity.epoch, commit.write_id)


def _bad_payload(catalog: RunCatalog, files: RankFiles, manifest: Manifest) -> Iterator[dict[str, Any]]:
    stride = 64 * manifest.chunk_nbytes
    for begin in range(0, manifest.nbytes, stride):
        end = min(begin + stride, manifest.nbytes)
        try:
            data = catalog.tier.read_range(files.payload, begin, end, deadline=catalog.transfer_deadline(end - begin))
        except NotFoundError as error:
            yield {"reason": str(error)}
            return
        except CorruptionError as error:  # it is shorter than its manifest says
            yield {"reason": str(error), "begin": begin, "end": manifest.nbytes}
            return
        for low, high in bad_ranges_in(manifest, data, begin):
            yield {"reason": "bytes differ from the digest made at the snapshot", "begin": low, "end": high}
