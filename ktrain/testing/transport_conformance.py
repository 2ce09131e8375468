"""What every Transport has to do, as a pytest class to inherit from.

Subclass it in a test file and give it a `wires` fixture: a `WirePair` whose receiver can reach its source.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ktrain import native
from ktrain.abc.transport import Part, PartialRead, Receipt, Transport
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.errors import (
    CapacityError,
    CorruptionError,
    DeadlineError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, copies_begin, lay_out
from ktrain.format.shard import Box, Role, Shard
from ktrain.snapshot.arena import Held, NodeVolume

_RANKS = 1 << 16


@dataclass(slots=True)
class WirePair:
    """Two nodes: `receiver` pulls into `kept` what `source_volume` holds. `run` is the id of their run."""

    receiver: Transport
    kept: NodeVolume
    source: Transport
    source_volume: NodeVolume
    run: str
    slots: int  # that the receiver may use per rank
    wait_s: float = field(default=30.0)

    def pull(self, rank: int, identity: Identity, protect: tuple[tuple[int, int], ...] = ()) -> Receipt:
        address = self.source.address()
        assert address is not None
        deadline = Deadline.after(self.wait_s)
        return self.receiver.pull(address, rank, identity, protect=protect, deadline=deadline)

    def read(self, wanted: PartialRead, wait_s: float | None = None) -> int:
        address = self.source.address()
        assert address is not None
        return self.receiver.read(address, wanted, deadline=Deadline.after(self.wait_s if wait_s is None else wait_s))


def seal_snapshot(volume: NodeVolume, rank: int, identity: Identity, nbytes: int) -> Held:
    """Seals a snapshot of one tensor with about `nbytes` of random bytes, the same for the same arguments."""
    shape = (max(0, nbytes - 4096),)
    layout = lay_out([Shard("blob", "uint8", shape, Box.whole(shape), Role.REPLICATED)])
    source = random.Random(f"{rank} {identity}")
    sizes = [min(1 << 20, shape[0] - at) for at in range(0, shape[0], 1 << 20)]
    payload = b"".join([layout.header, *map(source.randbytes, sizes)])
    writer = volume.acquire(rank, layout.nbytes, protect=(), limit=64)
    assert writer is not None
    chunks = native.copy_digest(writer.memory, payload, chunk_nbytes=CHUNK_NBYTES)
    return writer.seal(
        Manifest(
            identity=identity,
            rank=rank,
            plan_digest="0" * 16,
            nbytes=layout.nbytes,
            chunk_nbytes=CHUNK_NBYTES,
            chunks=tuple(chunks),
            entries=layout.entries,
            objects={},
            origin={},
        )
    )


def seal_copies(volume: NodeVolume, rank: int, copies: Manifest, payload: memoryview) -> Held:
    """Seals a payload as the copies beside a share of another rank, which has one value of its own."""
    layout = lay_out([Shard("own", "uint8", (1,), Box.whole((1,)), Role.RANK)])
    data = layout.header + b"\0"
    chunks = tuple(native.digest_chunks(data, chunk_nbytes=CHUNK_NBYTES))
    share = replace(copies, rank=rank, nbytes=len(data), chunks=chunks, entries=layout.entries, table=None)
    begin = copies_begin(len(data))
    writer = volume.acquire(rank, begin + len(payload), protect=(), limit=64)
    assert writer is not None
    with writer:
        writer.memory[: len(data)] = data
        writer.memory[begin:] = payload
        return writer.seal(share, replace(copies, rank=rank))


def flip_byte(volume: NodeVolume, held: Held, offset: int) -> None:
    """Changes one byte of a sealed payload behind everyone's back, as a bad memory cell would."""
    path = next(volume.path.rglob(f"*{held.rank:05d}/{held.slot.rpartition('/')[2]}*.safetensors"))
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def want_chunks(volume: NodeVolume, held: Held, spans: Sequence[tuple[int, int]], file: Path) -> PartialRead:
    """A read of runs of chunks `[first, last)` of a sealed snapshot into a new file."""
    with volume.open(held.rank, held.identity) as slot:
        manifest = slot.manifest
    size = manifest.chunk_nbytes
    parts = [
        Part(first * size, min(last * size, manifest.nbytes), manifest.chunks[first:last]) for first, last in spans
    ]
    wanted = PartialRead(held.rank, held.identity, size, parts, file)
    file.write_bytes(bytes(wanted.nbytes + 1))
    return wanted


def _identity(wires: WirePair, step: int, epoch: int = 1) -> Identity:
    return Identity(wires.run, step, epoch, world_size=_RANKS)


class TransportConformance:
    """Inherit and provide the fixture `wires`; every test uses a rank of its own, so these may be shared."""

    LARGE_NBYTES = 70_000_001  # more than two pieces, and a short last chunk

    @pytest.fixture
    def rank(self) -> int:
        return int(ids.random_id(2), 16)  # below _RANKS

    def test_pull_sealed_snapshot_lands_bit_for_bit(self, wires: WirePair, rank: int) -> None:
        identity = _identity(wires, 10)
        held = seal_snapshot(wires.source_volume, rank, identity, self.LARGE_NBYTES)
        receipt = wires.pull(rank, identity)
        assert (receipt.rank, receipt.identity, receipt.nbytes) == (rank, identity, held.nbytes)
        assert receipt.manifest_digest == held.manifest_digest
        assert receipt.wire_nbytes >= held.nbytes
        with wires.source_volume.open(rank, identity) as sent, wires.kept.open(rank, identity) as landed:
            assert landed.manifest == sent.manifest
            assert landed.memory == sent.memory

    def test_pull_tiny_snapshot_lands_bit_for_bit(self, wires: WirePair, rank: int) -> None:
        identity = _identity(wires, 10)
        seal_snapshot(wires.source_volume, rank, identity, 1)
        wires.pull(rank, identity)
        with wires.source_volume.open(rank, identity) as sent, wires.kept.open(rank, identity) as landed:
            assert landed.memory == sent.memory

    def test_pull_again_moves_nothing(self, wires: WirePair, rank: int) -> None:
        identity = _identity(wires, 10)
        seal_snapshot(wires.source_volume, rank, identity, 5000)
        first = wires.pull(rank, identity)
        second = wires.pull(rank, identity)
        assert second.wire_nbytes == 0
        assert second.manifest_digest == first.manifest_digest

    def test_pull_of_what_lies_beside_own_shares_crosses_in_part(self, wires: WirePair, rank: int) -> None:
        """A transport may leave own copies alone; what it says of them has to add up."""
        identity = _identity(wires, 10)
        held = seal_snapshot(wires.source_volume, rank, identity, 3 << 20)
        with wires.source_volume.open(rank, identity) as slot:
            seal_copies(wires.kept, rank ^ 1, slot.manifest, slot.memory)
        receipt = wires.pull(rank, identity)
        assert receipt.bad_own == ()
        assert receipt.own_nbytes == 0 or receipt.wire_nbytes < held.nbytes
        assert receipt.own_nbytes + receipt.wire_nbytes >= held.nbytes
        assert 0.0 <= receipt.wire_s <= receipt.seconds
        with wires.source_volume.open(rank, identity) as sent, wires.kept.open(rank, identity) as landed:
            assert landed.memory == sent.memory

    def test_release_lets_another_process_write_the_slots(self, wires: WirePair, rank: int) -> None:
        identity = _identity(wires, 10)
        held = seal_snapshot(wires.source_volume, rank, identity, 5000)
        wires.pull(rank, identity)
        wires.receiver.release(rank)
        with NodeVolume(wires.kept.path.parent.parent, node=wires.kept.node, run=wires.run) as other:
            assert [found.identity for found in other.scan() if found.rank == rank] == [identity]
            writer = other.acquire(rank, held.nbytes, protect=(), limit=1, over=(2, 0))
            assert writer is not None
            with writer:
                assert writer.slot == held.slot, "no other slot was made"
        wires.receiver.release(rank)  # of which it has none

    def test_pull_absent_snapshot_is_not_found(self, wires: WirePair, rank: int) -> None:
        with pytest.raises(NotFoundError):
            wires.pull(rank, _identity(wires, 10))

    def test_pull_other_epoch_is_not_found(self, wires: WirePair, rank: int) -> None:
        seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 5000)
        with pytest.raises(NotFoundError):
            wires.pull(rank, _identity(wires, 10, 2))

    def test_pull_flipped_byte_is_corruption_and_seals_nothing(self, wires: WirePair, rank: int) -> None:
        identity = _identity(wires, 10)
        held = seal_snapshot(wires.source_volume, rank, identity, 3 << 20)
        flip_byte(wires.source_volume, held, (2 << 20) + 77)
        with pytest.raises(CorruptionError, match=f"{2 << 20} to {(2 << 20) + CHUNK_NBYTES}"):
            wires.pull(rank, identity)
        assert [held for held in wires.kept.scan() if held.rank == rank] == []

    def test_pull_without_time_is_deadline_and_seals_nothing(self, wires: WirePair, rank: int) -> None:
        identity = _identity(wires, 10)
        seal_snapshot(wires.source_volume, rank, identity, 5000)
        address = wires.source.address()
        assert address is not None
        with pytest.raises(DeadlineError):
            wires.receiver.pull(address, rank, identity, protect=(), deadline=Deadline.after(0.0))
        assert [held for held in wires.kept.scan() if held.rank == rank] == []

    def test_pull_newer_steps_keeps_the_protected_one(self, wires: WirePair, rank: int) -> None:
        identities = [_identity(wires, step) for step in range(10, 20 + wires.slots)]
        for identity in identities:
            seal_snapshot(wires.source_volume, rank, identity, 5000)
            try:
                wires.pull(rank, identity, protect=((10, 1),))
            except CapacityError:
                break
        steps = {held.identity.step for held in wires.kept.scan() if held.rank == rank}
        assert 10 in steps
        assert len(steps) <= wires.slots

    def test_pull_all_slots_protected_is_capacity(self, wires: WirePair, rank: int) -> None:
        identities = [_identity(wires, step) for step in range(10, 11 + wires.slots)]
        protect = tuple((identity.step, identity.epoch) for identity in identities)
        for identity in identities[:-1]:
            seal_snapshot(wires.source_volume, rank, identity, 5000)
            wires.pull(rank, identity, protect=protect)
        seal_snapshot(wires.source_volume, rank, identities[-1], 5000)
        with pytest.raises(CapacityError):
            wires.pull(rank, identities[-1], protect=protect)

    def test_pull_unknown_source_is_a_ktrain_error(self, wires: WirePair, rank: int) -> None:
        address = wires.source.address()
        assert address is not None
        with pytest.raises(KtrainError):
            wires.receiver.pull(
                address + "-gone",
                rank,
                _identity(wires, 10),
                protect=(),
                deadline=Deadline.after(wires.wait_s),
            )

    def test_read_parts_arrive_bit_for_bit_and_take_no_slot(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), self.LARGE_NBYTES)
        num_chunks = -(-held.nbytes // CHUNK_NBYTES)
        spans = [(0, 1), (3, 5), (7, num_chunks - 1), (num_chunks - 1, num_chunks)]  # the last chunk is a short one
        wanted = want_chunks(wires.source_volume, held, spans, tmp_path / "parts")
        assert wires.read(wanted) == wanted.nbytes
        with wires.source_volume.open(rank, held.identity) as sent:
            expected = b"".join(sent.memory[part.begin : part.end] for part in wanted.parts)
        assert wanted.file.read_bytes() == expected + b"\0"
        assert [held for held in wires.kept.scan() if held.rank == rank] == []

    def test_read_again_brings_only_what_is_wanted(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 3 << 20)
        for index, chunk in enumerate((5, 2)):
            wanted = want_chunks(wires.source_volume, held, [(chunk, chunk + 1)], tmp_path / str(index))
            assert wires.read(wanted) == CHUNK_NBYTES

    def test_read_absent_snapshot_is_not_found(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 5000)
        wanted = want_chunks(wires.source_volume, held, [(0, 1)], tmp_path / "parts")
        wires.source_volume.discard(rank, held.identity, "the source has lost it")
        with pytest.raises(NotFoundError):
            wires.read(wanted)

    def test_read_flipped_byte_is_corruption(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 3 << 20)
        wanted = want_chunks(wires.source_volume, held, [(1, 2), (16, 18)], tmp_path / "parts")
        flip_byte(wires.source_volume, held, (2 << 20) + 77)
        with pytest.raises(CorruptionError, match=f"{2 << 20} to {(2 << 20) + CHUNK_NBYTES}"):
            wires.read(wanted)

    def test_read_past_a_flipped_byte_is_good(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 3 << 20)
        wanted = want_chunks(wires.source_volume, held, [(1, 2), (18, 20)], tmp_path / "parts")
        flip_byte(wires.source_volume, held, (2 << 20) + 77)
        assert wires.read(wanted) == wanted.nbytes

    def test_read_without_time_is_deadline(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 5000)
        with pytest.raises(DeadlineError):
            wires.read(want_chunks(wires.source_volume, held, [(0, 1)], tmp_path / "parts"), wait_s=0.0)

    def test_read_into_a_file_that_is_gone_is_unavailable(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 5000)
        wanted = want_chunks(wires.source_volume, held, [(0, 1)], tmp_path / "parts")
        wanted.file.unlink()
        with pytest.raises(UnavailableError):
            wires.read(wanted)

    def test_read_gives_its_lease_back(self, wires: WirePair, rank: int, tmp_path: Path) -> None:
        held = seal_snapshot(wires.source_volume, rank, _identity(wires, 10), 5000)
        wires.read(want_chunks(wires.source_volume, held, [(0, 1)], tmp_path / "parts"))
        seal_snapshot(wires.source_volume, rank, _identity(wires, 20), 5000)
        deadline = Deadline.after(wires.wait_s)
        while (writer := wires.source_volume.acquire(rank, held.nbytes, protect=(), limit=2)) is None:
            deadline.check("the lease of a read that has ended")  # it is given back without waiting
            deadline.clock.sleep(0.01)
        writer.abandon()
