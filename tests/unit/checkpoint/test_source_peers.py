"""Parts of a snapshot that lies in another node's memory: what crosses, what is held meanwhile, what goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ktrain.abc.transport import PartialRead
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.readers import PEER_READ_NBYTES
from ktrain.checkpoint.source import NearestSource
from ktrain.errors import CapacityError, DeadlineError, UnavailableError
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.scratch import Scratch
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.local_transport import LocalTransport, LocalWire
from ktrain.testing.tier_conformance import soon
from tests.unit.checkpoint.shelves import Shelves, Snapshots, flipped, shelves
from tests.unit.checkpoint.test_source import CHUNK, NBYTES, Place, snapshot

PEER = "node-peer"


@dataclass
class Peers:
    """A reader's node whose peer holds rank 0's snapshot, and the bucket as the next copy."""

    shelf: Shelves
    snapshots: Snapshots
    wire: LocalWire
    far: NodeVolume
    receiver: LocalTransport

    def __post_init__(self) -> None:
        self.reads: list[PartialRead] = []
        self.most_files = 0
        manifest = self.snapshots[0][0]
        self.copy = Copy(contract.TIER_PEER, PEER, 0, manifest.identity)
        self.shelf.pull = self.pull
        self.shelf.read = self.read
        self.hold(self.snapshots[0][1])

    def hold(self, payload: bytes) -> None:
        manifest = self.snapshots[0][0]
        writer = self.far.acquire(0, len(payload), protect=(), limit=2)
        assert writer is not None
        with writer:
            writer.memory[:] = payload
            writer.seal(manifest)

    def pull(self, copy: Copy) -> int:
        address = f"local:{copy.place}"
        return self.receiver.pull(address, copy.rank, copy.identity, protect=(), deadline=soon()).wire_nbytes

    def read(self, copy: Copy, wanted: PartialRead, deadline: Deadline) -> int:
        self.reads.append(wanted)
        self.most_files = max(self.most_files, len(list(self.shelf.volume.path.glob("read-*"))))
        return self.receiver.read(f"local:{copy.place}", wanted, deadline=deadline)

    def source(self, *next_copies: Copy) -> NearestSource:
        return self.shelf.source(self.snapshots, {0: [self.copy, *next_copies]})

    def in_bucket(self) -> Copy:
        return self.shelf.put(contract.TIER_BUCKET, self.snapshots)[0]

    def held_here(self) -> list[int]:
        return [held.rank for held in self.shelf.volume.scan()]


def made_peers(folder: Path, snapshots: Snapshots) -> Iterator[Peers]:
    wire = LocalWire()
    with shelves(folder, snapshots) as shelf:
        run = snapshots[0][0].identity.run
        with NodeVolume(folder / "far", node=PEER, run=run) as far:
            ends = LocalTransport(wire, far), LocalTransport(wire, shelf.volume)
            yield Peers(shelf, snapshots, wire, far, ends[1])
            for end in ends:
                end.close()


@pytest.fixture
def peers(tmp_path: Path, seed: int) -> Iterator[Peers]:
    yield from made_peers(tmp_path, {0: snapshot(seed)})


def test_source_that_wants_a_part_of_a_peers_snapshot_brings_that_and_takes_no_slot(peers: Peers) -> None:
    payload = peers.snapshots[0][1]
    place = Place(payload)
    source = peers.source()
    source.fetch({0: [(20_000, 20_010)]}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    assert bytes(source.view(0, 20_000, 20_010)) == payload[20_000:20_010]
    assert source.tiers == {0: contract.TIER_PEER}
    assert source.tally.wire_nbytes == source.tally.nbytes < 2 * source.tally.wanted_nbytes  # chunks are large here
    assert peers.held_here() == []
    source.close()
    assert list(peers.shelf.volume.path.glob("read-*")) == []


def test_source_reading_parts_of_usual_size_stays_below_a_tenth_in_vain(tmp_path: Path, seed: int) -> None:
    chunk = 128 << 10
    for peers in made_peers(tmp_path, {0: snapshot(seed, nbytes=40 << 20, chunk=chunk)}):
        place = Place(peers.snapshots[0][1], begin=70_000, stretch=2_700_000)
        source = peers.source()
        source.fetch({}, into={0: place.runs}, deadline=soon())
        assert place.is_filled
        assert source.tally.wire_nbytes <= 1.1 * source.tally.wanted_nbytes
        source.close()


def test_source_reads_parts_in_files_of_bounded_size_which_are_used_again(tmp_path: Path, seed: int) -> None:
    for peers in made_peers(tmp_path, {0: snapshot(seed, nbytes=10 * PEER_READ_NBYTES, chunk=1 << 20)}):
        place = Place(peers.snapshots[0][1], begin=1 << 20, stretch=1 << 20)
        source = peers.source()
        source.fetch({}, into={0: place.runs}, deadline=soon())
        assert place.is_filled
        assert len(peers.reads) > 1
        assert all(wanted.nbytes <= PEER_READ_NBYTES for wanted in peers.reads)
        assert peers.most_files <= 8
        source.close()


def test_source_that_wants_most_of_a_peers_snapshot_pulls_it_and_holds_a_replica(peers: Peers) -> None:
    payload = peers.snapshots[0][1]
    source = peers.source()
    source.fetch({0: [(0, len(payload) - CHUNK)]}, deadline=soon())
    assert bytes(source.view(0, 5, 50)) == payload[5:50]
    assert peers.held_here() == [0] and peers.reads == []
    source.close()


def test_source_whose_own_snapshot_a_peer_holds_pulls_it_where_half_is_wanted(peers: Peers) -> None:
    peers.shelf.own = 0
    source = peers.source()
    source.fetch({0: [(0, len(peers.snapshots[0][1]) // 2 + 1)]}, deadline=soon())
    assert peers.held_here() == [0] and peers.reads == []
    source.close()


def lend(peers: Peers, payload: bytes) -> None:
    """The node has a file for the snapshot, and no slot."""
    peers.shelf.lent = peers.shelf.folder / "lent"
    peers.shelf.lent.write_bytes(payload)
    peers.shelf.pull = lambda copy: len(payload)


def test_source_that_is_lent_the_whole_snapshot_reads_it_and_lets_it_go_at_once(peers: Peers) -> None:
    payload = peers.snapshots[0][1]
    lend(peers, payload)
    source = peers.source()
    source.fetch({0: [(0, len(payload) - CHUNK)]}, deadline=soon())
    assert str(peers.shelf.lent) not in Path("/proc/self/maps").read_text(), "its room is needed before anybody trains"
    assert bytes(source.view(0, 5, 50)) == payload[5:50]
    assert source.tiers == {0: contract.TIER_PEER}
    assert (source.tally.wire_nbytes, peers.reads) == (len(payload), [])
    source.close()


def test_source_that_is_lent_a_bad_chunk_names_it_and_takes_the_next_copy(peers: Peers) -> None:
    payload = peers.snapshots[0][1]
    lend(peers, flipped(payload, 45_000))
    source = peers.source(peers.in_bucket())
    source.fetch({0: [(0, len(payload))]}, deadline=soon())
    assert bytes(source.view(0, 0, len(payload))) == payload
    (failure,) = source.failures
    assert failure.corrupt and (failure.begin, failure.end) == (40_960, 45_056)
    source.close()


def test_source_whose_loan_was_taken_back_reads_the_whole_snapshot_in_parts(peers: Peers) -> None:
    payload = peers.snapshots[0][1]
    lend(peers, payload)
    assert peers.shelf.lent is not None
    peers.shelf.lent.unlink()
    source = peers.source()
    source.fetch({0: [(0, len(payload))]}, deadline=soon())
    assert bytes(source.view(0, 0, len(payload))) == payload
    assert peers.reads and source.failures == []
    source.close()


def test_source_without_a_free_slot_reads_the_whole_snapshot_in_parts(peers: Peers) -> None:
    def no_slot(copy: Copy) -> int:
        raise CapacityError("all slots are protected")

    peers.shelf.pull = no_slot
    payload = peers.snapshots[0][1]
    source = peers.source()
    source.fetch({0: [(0, len(payload))]}, deadline=soon())
    assert bytes(source.view(0, 0, len(payload))) == payload
    assert source.tiers == {0: contract.TIER_PEER}
    assert peers.held_here() == []
    source.close()


def test_source_whose_peer_dies_in_the_middle_takes_the_next_copy(tmp_path: Path, seed: int) -> None:
    for peers in made_peers(tmp_path, {0: snapshot(seed, nbytes=3 * PEER_READ_NBYTES, chunk=1 << 20)}):
        place = Place(peers.snapshots[0][1], begin=1 << 20, stretch=1 << 20)
        bucket = peers.in_bucket()
        begun: list[int] = []

        def die(node: str, begin: int, end: int, peers: Peers = peers, begun: list[int] = begun) -> None:
            begun.append(begin)
            if len(begun) > 1:
                peers.wire.cut.add(node)

        peers.wire.before_piece = die
        source = peers.source(bucket)
        source.fetch({}, into={0: place.runs}, deadline=soon())
        assert place.is_filled
        assert source.tiers == {0: contract.TIER_BUCKET}
        assert [failure.corrupt for failure in source.failures] == [False]
        source.close()


def test_source_with_a_piece_that_arrives_bad_once_asks_again(peers: Peers) -> None:
    arrived: list[int] = []

    def spoil(data: bytes) -> bytes:
        arrived.append(len(data))
        return flipped(data, 7) if len(arrived) == 1 else data

    peers.wire.on_piece = spoil
    place = Place(peers.snapshots[0][1])
    source = peers.source()
    source.fetch({}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    assert source.tally.wire_nbytes == sum(arrived) == 2 * source.tally.nbytes
    assert source.failures == []
    source.close()


def test_source_whose_peer_has_a_bad_chunk_names_it_and_takes_the_next_copy(peers: Peers) -> None:
    payload = peers.snapshots[0][1]
    peers.far.discard(0, peers.copy.identity, "replaced by the test")
    peers.hold(flipped(payload, 45_000))
    place = Place(payload)
    source = peers.source(peers.in_bucket())
    source.fetch({}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    (failure,) = source.failures
    assert failure.corrupt and failure.copy == peers.copy
    assert "bytes 40960 to 45056" in failure.reason
    source.close()


def test_source_whose_wire_says_well_of_bad_bytes_finds_them_itself(peers: Peers) -> None:
    def lying(copy: Copy, wanted: PartialRead, deadline: Deadline) -> int:
        return wanted.nbytes  # nothing was written

    peers.shelf.read = lying
    place = Place(peers.snapshots[0][1])
    source = peers.source(peers.in_bucket())
    source.fetch({}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    assert [failure.corrupt for failure in source.failures] == [True]
    source.close()


def test_source_whose_peer_lost_the_snapshot_blames_nobody(peers: Peers) -> None:
    peers.far.discard(0, peers.copy.identity, "it is gone")
    place = Place(peers.snapshots[0][1])
    source = peers.source(peers.in_bucket())
    source.fetch({}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    assert [failure.corrupt for failure in source.failures] == [False]
    source.close()


def test_source_whose_peer_is_late_takes_the_next_copy_and_lets_the_file_go(peers: Peers) -> None:
    kept: list[PartialRead] = []

    def late(copy: Copy, wanted: PartialRead, deadline: Deadline) -> int:
        kept.append(wanted)
        raise DeadlineError("read: nothing within 20 s")

    peers.shelf.read = late
    payload = peers.snapshots[0][1]
    source = peers.source(peers.in_bucket())
    source.fetch({0: [(0, 10)]}, deadline=soon())
    assert bytes(source.view(0, 0, 10)) == payload[:10]
    assert not kept[0].file.exists()  # a late write meets nobody's memory
    assert [failure.corrupt for failure in source.failures] == [False]
    source.close()


def test_source_without_any_copy_left_says_why(peers: Peers) -> None:
    peers.wire.cut.add(PEER)
    with pytest.raises(UnavailableError, match=f"peer {PEER}.*cannot be reached"):
        peers.source().fetch({0: [(0, 10)]}, deadline=soon())


def test_read_of_parts_out_of_time_in_the_middle_is_deadline(peers: Peers) -> None:
    clock = FakeClock()
    peers.wire.before_piece = lambda node, begin, end: clock.advance(30.0)
    payload = peers.snapshots[0][1]
    source = peers.source(peers.in_bucket())
    peers.shelf.read = lambda copy, wanted, deadline: peers.read(copy, wanted, Deadline.after(10.0, clock))
    peers.wire.on_piece = lambda data: flipped(data, 0)  # it has to be asked for again, and there is no time left
    source.fetch({0: [(0, NBYTES // 2)]}, deadline=soon())
    assert bytes(source.view(0, 0, 9)) == payload[:9]
    assert [failure.corrupt for failure in source.failures] == [False]
    assert "out of time" in source.failures[0].reason
    source.close()


_MAKER = """
import sys
from pathlib import Path
from ktrain.snapshot.scratch import Scratch
file = Scratch(Path(sys.argv[1]), 4096).take()
print(file.path, flush=True)
sys.stdin.read()
"""


def test_scratch_file_of_a_dead_reader_is_removed_by_the_next_one_and_a_living_ones_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MAKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        path = Path(child.stdout.readline().strip())
        Scratch(tmp_path, 4096)
        assert path.exists()
        os.kill(child.pid, signal.SIGKILL)
        child.wait(30.0)
        Scratch(tmp_path, 4096)
        assert not path.exists()
