"""Damage to what lies in a tier: the bytes of one copy are changed, cut, lost, or those of another snapshot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ktrain.base import contract
from ktrain.format.manifest import Identity
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.format.record import CommitRecord
from ktrain.tier.disk import payload_name
from tests.faults.job import NEWEST, OLDER, Alarm, Job, Resumed, Stopped
from tests.faults.model import Case
from tests.unit.checkpoint.builders import snapshot

OTHER_RUN = "cd" * 16
NEXT = 30  # the step that is saved while something goes wrong
Other = Callable[[Job, int, int], tuple[int, Identity]]
assert CHUNK_NBYTES > 8192, "a payload of the job is one chunk"


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes somewhere, behind the back of whoever wrote them."""

    get: Callable[[], bytes]
    put: Callable[[bytes], None]
    delete: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Copy:
    """One rank's snapshot in one place."""

    payload: Blob
    manifest: Blob


Replace = Callable[[Job, Copy, tuple[int, Identity]], None]


def copy_in(job: Job, tier: str, rank: int, step: int) -> Copy:
    """The copy of a rank's step in a tier; "peer" is the other node's memory."""
    if tier == contract.TIER_BUCKET:
        return Copy(*(_object(job, job.object_of(what, rank, step)) for what in ("payload", "manifest")))
    if tier == contract.TIER_DISK:
        identity = next(at for found, at in job.disk_of(rank).scan() if (found, at.step) == (rank, step))
        payload = job.disk_of(rank).path / payload_name(identity, rank)
        return Copy(_file(payload), _file(payload.with_suffix(".json")))
    payload = job.slot_of(rank if tier == contract.TIER_MEMORY else 1 - rank, rank, step)
    return Copy(_file(payload), _file(payload.with_name(f"{payload.stem}.manifest.json")))


def record_of(job: Job, step: int) -> Blob:
    return _object(job, job.object_of("record", 0, step))


def _object(job: Job, name: str) -> Blob:
    objects = job.bucket.objects
    return Blob(lambda: objects[name], lambda data: objects.update({name: data}), lambda: objects.pop(name) and None)


def _file(path: Path) -> Blob:
    return Blob(path.read_bytes, lambda data: _overwrite(path, data), path.unlink)


def _overwrite(path: Path, data: bytes) -> None:
    """In place, as damage comes; the time of the last change is another, however fast this was."""
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


# What can happen to bytes


def flip_bit(data: bytes) -> bytes:
    return _flip(data, len(data) - 3)


def flip_bit_in_header(data: bytes) -> bytes:
    return _flip(data, 12)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return data[:0]


def zero_block(data: bytes) -> bytes:
    size = min(128, len(data) // 2)
    return data[:-size] + bytes(size)


def flip_in_plan_digest(data: bytes) -> bytes:
    """One digit of the plan's digest is another: the least bit of a hexadecimal digit."""
    at = data.index(b'"plan_digest":"') + len(b'"plan_digest":"') + 15
    return _flip(data, at)


def put_another_plan(data: bytes) -> bytes:
    """A record that is whole in itself, of other plans than its ranks' manifests are."""
    return replace(CommitRecord.from_bytes(data), plan_digest="0123456789abcdef").to_bytes()


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "bit flip": flip_bit,
    "bit flip in the header": flip_bit_in_header,
    "truncation": truncate,
    "emptied file": empty,
    "zero block": zero_block,
}


# Whose bytes can stand there instead: of one rank at one step of the job

OTHERS: dict[str, Other] = {
    "stale shard (of an older step)": lambda job, rank, step: (rank, _identity(job, step - 10)),
    "shard of another rank": lambda job, rank, step: (1 - rank, _identity(job, step)),
    "shard of another attempt": lambda job, rank, step: (rank, _identity(job, step, epoch=7)),
    "shard of another run": lambda job, rank, step: (rank, _identity(job, step, run=OTHER_RUN)),
}


def _identity(job: Job, step: int, *, epoch: int = 1, run: str | None = None) -> Identity:
    return Identity(run or job.catalog.run_id, step, epoch, job.world_size)


def replace_payload(job: Job, copy: Copy, other: tuple[int, Identity]) -> None:
    """The payload alone is another's. (Where the values are the same by chance, one of them is changed.)"""
    payload, _ = snapshot(*other)
    copy.payload.put(payload if payload != copy.payload.get() else flip_bit(payload))


def replace_both(job: Job, copy: Copy, other: tuple[int, Identity]) -> None:
    """Payload and manifest are those of another snapshot, each whole and proven in itself."""
    payload, manifest = snapshot(*other)
    copy.payload.put(payload)
    copy.manifest.put(manifest.to_bytes())


# The cells: damage that a restart finds


def cases() -> Iterator[Case]:
    for tier in contract.TIERS:
        for name, change in BYTES.items():
            for what in ("payload", "manifest"):
                yield _at_restart(f"{name} in a {what}", tier, _changing(tier, what, change), what)
        for what in ("payload", "manifest"):
            yield _at_restart(f"lost {what}", tier, _losing(tier, what), what, is_lost=True)
        plan = _changing(tier, "manifest", flip_in_plan_digest)
        yield _at_restart("bit flip in the plan's digest", tier, plan, "manifest")
        for name, other in OTHERS.items():
            alone = _replacing(tier, replace_payload, other)
            yield _at_restart(name, tier, alone, "payload", point="the payload alone")
            yield _whole_replaced(name, tier, _replacing(tier, replace_both, other))
    for name, change in BYTES.items():
        yield _record(f"{name} in a record", change)
    yield _record("plan of another save in a record", put_another_plan)
    yield Case(
        fault="lost record",
        tier="bucket",
        phase="restore",
        point="the newest record was deleted by hand",
        play=lambda job: (job.lose_all(), record_of(job, NEWEST).delete()) and None,
        end=Resumed(OLDER, ("bucket", "bucket")),
        gap="a checkpoint without its record is one that was never committed, or was collected; nothing else tells",
    )
    yield from _in_every_tier()
    yield from _while_it_runs()


NEXT_TIER = {"memory": "peer", "peer": "bucket", "disk": "bucket"}
OTHER_RANK = {"memory": "memory", "peer": "memory", "disk": "disk"}  # where rank 1, untouched, reads its part


def _lose_what_is_nearer(job: Job, tier: str) -> None:
    """Until the tier is the nearest one that holds rank 0's part."""
    if tier == "peer":
        job.lose_node(0)
    elif tier == "disk":
        job.reboot()
    elif tier == "bucket":
        job.lose_all()


def _then(tier: str, damage: Callable[[Job, Copy], None]) -> Callable[[Job], None]:
    def play(job: Job) -> None:
        _lose_what_is_nearer(job, tier)
        damage(job, copy_in(job, tier, 0, NEWEST))

    return play


def _changing(tier: str, what: str, change: Callable[[bytes], bytes]) -> Callable[[Job], None]:
    def damage(job: Job, copy: Copy) -> None:
        blob: Blob = getattr(copy, what)
        blob.put(change(blob.get()))

    return _then(tier, damage)


def _losing(tier: str, what: str) -> Callable[[Job], None]:
    return _then(tier, lambda job, copy: getattr(copy, what).delete())


def _replacing(tier: str, replace: Replace, other: Other) -> Callable[[Job], None]:
    return _then(tier, lambda job, copy: replace(job, copy, other(job, 0, NEWEST)))


def _end(tier: str) -> Resumed:
    if tier == "bucket":
        return Resumed(OLDER, ("bucket", "bucket"))
    return Resumed(NEWEST, (NEXT_TIER[tier], OTHER_RANK[tier]))


def _at_restart(
    fault: str, tier: str, play: Callable[[Job], None], what: str, *, is_lost: bool = False, point: str = ""
) -> Case:
    """The copy is refused, and the next one used."""
    seen: frozenset[Alarm] = frozenset({("bad_copy", tier, 0, NEWEST)})
    how = ""
    if tier in ("memory", "peer") and (what == "manifest" or fault.startswith(("truncation", "emptied", "lost"))):
        seen = frozenset({("bad_copy", "memory", 0, None)})  # by the node where it lies, which names the slot
    if what == "manifest" and is_lost and tier != "bucket":
        seen, how = frozenset(), "a payload without its manifest is no snapshot"
    point = point or f"the newest copy of rank 0, before a restart that needs the {tier} tier"
    return Case(fault, tier, "restore", point, play, _end(tier), seen, how, has_disk=tier == "disk")


def _whole_replaced(fault: str, tier: str, play: Callable[[Job], None]) -> Case:
    """Payload and manifest are whole and proven, and not what the place is for."""
    is_own = fault.startswith(("stale", "shard of another attempt"))  # a volume holds any step of the run
    seen: frozenset[Alarm] = frozenset({("bad_copy", tier, 0, NEWEST)})
    how = ""
    if tier in ("memory", "peer"):
        seen = frozenset() if is_own else frozenset({("bad_copy", "memory", 0, None)})
        how = "a proven copy of another identity does not join" if is_own else ""
    return Case(fault, tier, "restore", "payload and manifest", play, _end(tier), seen, how, has_disk=tier == "disk")


def _record(fault: str, change: Callable[[bytes], bytes]) -> Case:
    def play(job: Job) -> None:
        job.lose_all()
        record = record_of(job, NEWEST)
        record.put(change(record.get()))

    seen: frozenset[Alarm] = frozenset({("bad_copy", "bucket", None, NEWEST)})
    return Case(fault, "bucket", "restore", "the newest record", play, Resumed(OLDER, ("bucket", "bucket")), seen)


def _in_every_tier() -> Iterator[Case]:
    """No good copy is left anywhere."""

    def spoil(job: Job, what: str, tiers: Sequence[str]) -> None:
        for tier in tiers:
            for step in (OLDER, NEWEST):
                blob: Blob = getattr(copy_in(job, tier, 0, step), what)
                blob.put(flip_bit(blob.get()))

    def memory_and_bucket(job: Job) -> None:
        spoil(job, "payload", ("memory", "peer", "bucket"))

    def bucket(job: Job) -> None:
        job.lose_all()
        spoil(job, "manifest", ("bucket",))

    def records(job: Job) -> None:
        job.lose_all()
        for step in (OLDER, NEWEST):
            record = record_of(job, step)
            record.put(flip_bit(record.get()))

    steps = (OLDER, NEWEST)
    tiers = ("memory", "peer", "bucket")
    yield Case(
        fault="bit flip in a payload",
        tier="all",
        phase="restore",
        point="every copy of rank 0",
        play=memory_and_bucket,
        end=Stopped("corruption"),
        seen=frozenset(("bad_copy", tier, 0, step) for tier in tiers for step in steps),
        words=("[20, 10]", "step 20 rank 0 in memory node-0", "in bucket", "nothing was deleted"),
    )
    yield Case(
        fault="bit flip in a manifest",
        tier="all",
        phase="restore",
        point="every copy of rank 0 that is left",
        play=bucket,
        end=Stopped("corruption"),
        seen=frozenset(("bad_copy", "bucket", 0, step) for step in steps),
        words=("[20, 10]", "bad: step 20 rank 0 in bucket", "nothing was deleted"),
    )
    yield Case(
        fault="bit flip in a record",
        tier="all",
        phase="restore",
        point="every record, after all nodes were lost",
        play=records,
        end=Stopped("corruption"),
        seen=frozenset(("bad_copy", "bucket", None, step) for step in steps),
        words=("no commit record can be read", "nothing was deleted"),
    )


# Damage while the job runs, found by who reads the slot next


def _while_it_runs() -> Iterator[Case]:
    """A slot that was good when it was sealed, and is bad when it is replicated or drained; and the wire between."""
    bad_slot: Alarm = ("bad_copy", "memory", 0, NEXT)
    failed: Alarm = ("tier_failed", "bucket", None, NEXT)  # no copy is left that could be drained

    def before(phase: str, change: Callable[[bytes], bytes]) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.drains = phase == "replicate"
            job.save(NEXT)
            if phase == "drain":
                job.turn(4)  # the peers have it
            payload = copy_in(job, "memory", 0, NEXT).payload
            payload.put(change(payload.get()))
            job.drains = True
            job.turn(8)

        return play

    for name, change in (("bit flip", flip_bit), ("zero block", zero_block)):
        yield Case(
            fault=f"{name} in a payload",
            tier="memory",
            phase="replicate",
            point="the slot, before a peer pulls it",
            play=before("replicate", change),
            end=Resumed(NEWEST, ("memory", "memory")),
            seen=frozenset({bad_slot, failed, ("bad_copy", "peer", 0, NEXT)}),
        )
        yield Case(
            fault=f"{name} in a payload",
            tier="memory",
            phase="drain",
            point="the slot, after a peer has it",
            play=before("drain", change),
            end=Resumed(NEXT, ("peer", "memory")),
            seen=frozenset({bad_slot}),  # the peer drains its replica
        )
    yield Case(
        fault="truncation in a payload",
        tier="memory",
        phase="drain",
        point="the slot, after a peer has it",
        play=before("drain", truncate),
        end=Resumed(NEXT, ("peer", "memory")),
        seen=frozenset({("bad_copy", "memory", 0, None)}),
    )
    yield from _on_the_wire()


def _on_the_wire() -> Iterator[Case]:
    def spoiling(times: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            left = [times]

            def arrive(data: bytes) -> bytes:
                left[0] -= 1
                return flip_bit(data) if left[0] >= 0 else data

            job.wire.on_piece = arrive
            job.save(NEXT)
            job.turn(30)
            job.lose_node(0)

        return play

    end = Resumed(NEXT, ("peer", "memory"))
    once = "the piece is pulled once more"
    yield Case("bit flip on the wire", "peer", "replicate", "a piece, once", spoiling(1), end, how=once)
    seen: frozenset[Alarm] = frozenset({("bad_copy", "peer", 0, NEXT)})
    yield Case("bit flip on the wire", "peer", "replicate", "a piece, twice", spoiling(2), end, seen)
