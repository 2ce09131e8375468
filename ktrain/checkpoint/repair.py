"""Making a damaged checkpoint of the bucket whole again from good copies: plan, execute, verify.

Invariant: nothing is replaced and nothing is removed. What is repaired is written under a name of its own, read back to
its last byte, and only then committed by a record of its own (ADR 0003).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ktrain.abc.tier import Buffer, Tier
from ktrain.base import contract, ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog, verify_commit
from ktrain.checkpoint.commit import require_untouched
from ktrain.checkpoint.lineage import on_line
from ktrain.checkpoint.reading import verify_read
from ktrain.checkpoint.removal import Seen
from ktrain.errors import CorruptionError, KtrainError
from ktrain.format import record as records
from ktrain.format.digest import join_digests
from ktrain.format.manifest import Identity, Manifest, bad_ranges
from ktrain.format.record import CommitRecord, RankFiles
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.volumes import list_volumes
from ktrain.tier.disk import NodeDisk, payload_name

_READ_NBYTES = 64 << 20

Opened = tuple[Manifest, Buffer]


@dataclass(frozen=True, slots=True)
class Spare:
    """A place where a rank's snapshot may lie. `open` gives manifest and payload, neither of them proven."""

    where: str
    open: Callable[[], AbstractContextManager[Opened]]


@dataclass(frozen=True, slots=True)
class Places:
    """Where copies are looked for besides the bucket: volumes of this machine, and the disk tier's directory."""

    volume_root: Path
    disk_root: Path | None
    timeouts: Timeouts


@dataclass(slots=True)
class Damage:
    """A checkpoint of the line of which no record is whole.

    Attributes:
        reasons: what is wrong, in words.
        known: rank -> digest of its manifest, from a record that can be read.
        chosen: rank -> a place that gave a proven copy.
        missing: rank -> why no place did.
    """

    step: int
    epoch: int
    commits: list[CommitRecord] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)  # write ids of records that cannot be read
    reasons: list[str] = field(default_factory=list)
    known: dict[int, str] = field(default_factory=dict)
    chosen: dict[int, Spare] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)
    manifests: dict[int, Manifest] = field(default_factory=dict)

    def can_be_repaired(self) -> bool:
        return bool(self.chosen) and not self.missing


def find_damage(catalog: RunCatalog, seen: Seen, timeouts: Timeouts, step: int | None = None) -> list[Damage]:
    """Checkpoints of the line that are not whole in any of their records; reads every byte of the bucket's.

    What is collected meanwhile is no damage.
    """
    found: dict[tuple[int, int], Damage] = {}
    whole: set[tuple[int, int]] = set()
    for name, reason in seen.listing.broken:
        named = records.parse_commit_name(name)
        if named is not None and name not in seen.listing.newer:
            damage = found.setdefault(named[:2], Damage(*named[:2]))
            damage.torn.append(named[2])
            damage.reasons.append(f"{name}: {reason}")
    for commit in seen.listing.commits:
        key = (commit.identity.step, commit.identity.epoch)
        if step not in (None, key[0]):
            continue
        findings, _ = verify_read(catalog, commit, timeouts=timeouts)
        if findings is None:
            continue
        if not findings:
            whole.add(key)
        damage = found.setdefault(key, Damage(*key))
        damage.commits.append(commit)
        damage.known |= {files.rank: files.manifest_digest for files in commit.ranks}
        damage.reasons += [f"{finding.name}: {finding.reason}" for finding in findings]
    return [
        found[key]
        for key in sorted(found)
        if key not in whole
        and step in (None, key[0])
        and on_line(Identity(catalog.run_id, *key, world_size=1), seen.attempts)
    ]


def choose_spares(catalog: RunCatalog, damage: Damage, places: Places) -> None:
    """Finds for each rank a copy that proves good; says of the others why there is none."""
    world_size = len(damage.known)
    rank = 0
    while rank < (world_size or 1):
        reasons = []
        for spare in _spares(catalog, damage, rank, places):
            try:
                with spare.open() as (manifest, payload):
                    _require_good(damage, catalog.run_id, rank, manifest, payload)
            except (KtrainError, OSError) as error:
                reasons.append(f"{spare.where}: {error}")
                continue
            damage.chosen[rank], damage.manifests[rank] = spare, manifest
            world_size = manifest.identity.world_size
            break
        else:
            damage.missing[rank] = "; ".join(reasons) or "no copy is here"
        rank += 1
    if damage.can_be_repaired():
        try:
            records.check_coverage([damage.manifests[rank] for rank in sorted(damage.manifests)])
        except CorruptionError as error:
            damage.missing[0] = str(error)


def _require_good(damage: Damage, run_id: str, rank: int, manifest: Manifest, payload: Buffer) -> None:
    identity = manifest.identity
    if (identity.run, identity.step, identity.epoch, manifest.rank) != (run_id, damage.step, damage.epoch, rank):
        raise CorruptionError(f"it is of rank {manifest.rank}, {identity}")
    if damage.known and manifest.digest() != damage.known.get(rank):
        raise CorruptionError("its manifest is not the one that was committed")
    bad = bad_ranges(manifest, payload)
    if bad:
        raise CorruptionError(f"bytes {bad[0][0]} to {bad[0][1]} differ from the digest made at the snapshot")


def rebuild(catalog: RunCatalog, damage: Damage, *, clock: Clock = SYSTEM_CLOCK) -> CommitRecord:
    """Writes the chosen copies and commits them; every byte is read back before the record is written.

    Raises:
        CorruptionError, UnavailableError, DeadlineError, CapacityError: it is not committed; nothing else changed.
    """
    write_id = ids.random_id()
    ranks = tuple(_store(catalog, rank, damage.chosen[rank], write_id) for rank in sorted(damage.chosen))
    metrics = next((commit.origin["metrics"] for commit in damage.commits if "metrics" in commit.origin), None)
    commit = CommitRecord(
        identity=damage.manifests[0].identity,
        write_id=write_id,
        plan_digest=join_digests([damage.manifests[files.rank].plan_digest for files in ranks]),
        ranks=ranks,
        time=min((commit.time for commit in damage.commits), default=clock.wall()),
        origin={
            **({} if metrics is None else {"metrics": metrics}),
            "repaired_from": {str(rank): spare.where for rank, spare in sorted(damage.chosen.items())},
        },
        format=catalog.format,
    )
    for finding in verify_commit(catalog, commit):
        raise CorruptionError(f"{finding.name}: {finding.reason}; nothing is committed")
    catalog.write_commit(commit)
    require_untouched(catalog, commit)
    return commit


def _store(catalog: RunCatalog, rank: int, spare: Spare, write_id: str) -> RankFiles:
    with spare.open() as (manifest, payload):
        at = (manifest.identity.step, manifest.identity.epoch, write_id, rank)
        name, text = records.payload_name(*at), manifest.to_bytes()
        catalog.tier.write(name, payload, deadline=catalog.transfer_deadline(manifest.nbytes))
        catalog.tier.write(records.manifest_name(*at), text, deadline=catalog.transfer_deadline(len(text)))
        return RankFiles(
            rank=rank,
            payload=name,
            nbytes=manifest.nbytes,
            payload_digest=manifest.payload_digest(),
            manifest=records.manifest_name(*at),
            manifest_nbytes=len(text),
            manifest_digest=manifest.digest(),
        )


# Where copies may lie


def _spares(catalog: RunCatalog, damage: Damage, rank: int, places: Places) -> Iterator[Spare]:
    """Places to look at, those of this machine first: a bucket's bytes cost more."""
    yield from _in_volumes(catalog.run_id, damage, rank, places)
    yield from _on_disk(catalog.run_id, damage, rank, places)
    for write_id in [*(commit.write_id for commit in damage.commits), *damage.torn]:
        at = (damage.step, damage.epoch, write_id, rank)
        names = records.manifest_name(*at), records.payload_name(*at)
        yield Spare(f"{contract.TIER_BUCKET} {write_id}", _opener(catalog, catalog.tier, *names))


def _in_volumes(run_id: str, damage: Damage, rank: int, places: Places) -> Iterator[Spare]:
    for info in list_volumes(places.volume_root):
        for held in info.held if info.run == run_id else ():
            if (held.rank, held.identity.step, held.identity.epoch) == (rank, damage.step, damage.epoch):
                yield Spare(
                    f"{contract.TIER_MEMORY} {info.node}",
                    _volume_opener(places.volume_root, info.node, run_id, rank, held.identity),
                )


def _volume_opener(
    root: Path, node: str, run_id: str, rank: int, identity: Identity
) -> Callable[[], AbstractContextManager[Opened]]:
    @contextmanager
    def opened() -> Iterator[Opened]:
        volume = NodeVolume(root, node=node, run=run_id)
        try:
            with volume.open(rank, identity) as slot:
                yield slot.manifest, slot.memory
        finally:
            volume.close()

    return opened


def _on_disk(run_id: str, damage: Damage, rank: int, places: Places) -> Iterator[Spare]:
    root = places.disk_root
    for folder in sorted((root / run_id).iterdir()) if root is not None and (root / run_id).is_dir() else ():
        with _disk(folder, places) as disk:
            held = disk.scan()
        for holder, identity in held:
            if (holder, identity.step, identity.epoch) == (rank, damage.step, damage.epoch):
                yield Spare(f"{contract.TIER_DISK} {folder.name}", _disk_opener(folder, rank, identity, places))


@contextmanager
def _disk(folder: Path, places: Places) -> Iterator[NodeDisk]:
    disk = NodeDisk(folder.parent.parent, run=folder.parent.name, node=folder.name, timeouts=places.timeouts)
    try:
        yield disk
    finally:
        disk.close()


def _disk_opener(
    folder: Path, rank: int, identity: Identity, places: Places
) -> Callable[[], AbstractContextManager[Opened]]:
    @contextmanager
    def opened() -> Iterator[Opened]:
        with _disk(folder, places) as disk:
            manifest = disk.manifest(rank, identity)
            deadline = Deadline.after(places.timeouts.storage_s + manifest.nbytes / 1e6)
            yield manifest, disk.tier.read(payload_name(identity, rank), deadline=deadline)

    return opened


def _opener(
    catalog: RunCatalog, tier: Tier, manifest_name: str, name: str
) -> Callable[[], AbstractContextManager[Opened]]:
    @contextmanager
    def opened() -> Iterator[Opened]:
        manifest = Manifest.from_bytes(tier.read(manifest_name, deadline=catalog.transfer_deadline(0)))
        payload = bytearray(manifest.nbytes)
        for begin in range(0, manifest.nbytes, _READ_NBYTES):
            end = min(begin + _READ_NBYTES, manifest.nbytes)
            payload[begin:end] = tier.read_range(name, begin, end, deadline=catalog.transfer_deadline(end - begin))
        yield manifest, payload

    return opened
