"""What a node holds of its peers' shares: replicas built from its own copies, and what its ranks read to restore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from ktrain.abc.transport import PartialRead, Transport
from ktrain.base.clock import Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.replicas import Replicas, WantedReplicas
from ktrain.errors import CapacityError, UnavailableError
from ktrain.format.manifest import Identity
from ktrain.format.payload import CHUNK_NBYTES, copies_begin
from ktrain.snapshot.arena import KEPT_SLOTS, Slots, required_nbytes
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import divided
from tests.unit.checkpoint.builders import identity as identity_of
from tests.unit.checkpoint.cluster import NUM_SLOTS, Cluster, flip_at


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    made.takes = divided
    made.drains = False
    made.restore()
    yield made
    made.close()


def spoil_copies(cluster: Cluster, rank: int, step: int) -> None:
    """Flips a bit in the second chunk of the copies beside a rank's share, in its own node's volume."""
    volume = cluster.nodes[rank].volume
    (held,) = (held for held in volume.scan() if (held.rank, held.identity.step) == (rank, step))
    flip_at(volume.path / f"{held.slot}.safetensors", copies_begin(held.nbytes) + CHUNK_NBYTES + 7)


def identity(cluster: Cluster, step: int) -> Identity:
    return Identity(cluster.catalog.run_id, step, cluster.epoch, cluster.world_size)


def test_replica_event_says_what_was_the_nodes_own_and_what_crossed_the_wire(cluster: Cluster) -> None:
    cluster.save_and_settle(10)
    for said in cluster.said("replicated"):
        (payload, manifest), _ = divided(said["rank"], identity(cluster, 10))
        assert said["own_bytes"] == 2 * CHUNK_NBYTES, "the header and the rank's own value lie in the other chunks"
        assert said["nbytes"] == len(payload) - said["own_bytes"] + len(manifest.to_bytes())
        assert 0.0 <= said["wire_seconds"] <= said["seconds"]
    assert len(cluster.said("replicated")) == 2
    assert cluster.committed()["peer"] == 10


def test_bad_copies_that_a_replica_is_built_from_are_named_and_taken_out_of_use(cluster: Cluster) -> None:
    cluster.save(10)
    spoil_copies(cluster, 1, 10)
    cluster.turn(8)
    (bad,) = cluster.said("bad_copy")
    assert (bad["step"], bad["rank"], bad["tier"], bad["where"]) == (10, 1, "memory", "node-1")
    assert "copies beside its share" in bad["reason"]
    assert (bad["begin"], bad["end"]) == (CHUNK_NBYTES, 2 * CHUNK_NBYTES)
    assert cluster.nodes[1].volume.copies.find(identity(cluster, 10)) == ({}, {})
    assert cluster.committed()["peer"] == 10, "the replica was pulled where it could not be built"


# A node in the place of a lost one, whose ranks want all that there is


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes of two ranks each. Node 0 keeps replicas of node 2's ranks, and node 1's are foreign to it."""
    made = Cluster(tmp_path, num_nodes=3, per_node=2)
    made.takes = divided
    made.drains = False
    made.restore()
    made.save_and_settle(10)
    yield made
    made.close()


def lose_first_node(cluster: Cluster) -> None:
    sizes = {rank: len(divided(rank, identity(cluster, 10))[0][0]) for rank in range(6)}
    everything = {rank: (0, nbytes) for rank, nbytes in sizes.items()}
    cluster.wanted = {0: everything, 1: everything}
    cluster.lose_node(0)


def lent(cluster: Cluster) -> list[Path]:
    return sorted(cluster.nodes[0].volume.path.glob("read-*"))


def num_slots(cluster: Cluster, rank: int, node: int) -> int:
    return len(list(cluster.nodes[node].volume.path.glob(f"rank-{rank:05d}/slot-*.safetensors")))


def test_node_in_the_place_of_a_lost_one_reads_each_share_once_and_takes_no_slot_that_is_not_counted(
    three: Cluster,
) -> None:
    crossed: dict[str, int] = {}

    def count(node: str, begin: int, end: int) -> None:
        crossed[node] = crossed.get(node, 0) + end - begin

    lose_first_node(three)
    three.wire.before_piece = count
    assert three.restore() == 10
    wanted = sum(end for _, end in three.wanted[0].values())
    assert sum(worker.wire_nbytes for worker in three.workers) < 1.1 * wanted, "once for both ranks of the node"
    assert sum(crossed.values()) < 1.1 * wanted
    assert {held.rank for held in three.nodes[0].volume.scan()} == {0, 1, 4, 5}
    assert lent(three) == []
    for step in range(20, 80, 10):
        three.save_and_settle(step)
    own, kept, foreign = ([num_slots(three, rank, node=0) for rank in ranks] for ranks in ((0, 1), (4, 5), (2, 3)))
    assert own == [num_slots(three, rank, node=1) for rank in (2, 3)], "as on a node that was never lost"
    assert (kept, foreign) == ([KEPT_SLOTS] * 2, [0, 0])


def test_volume_of_a_node_in_the_place_of_a_lost_one_never_holds_more_than_was_counted(three: Cluster) -> None:
    share, beside = divided(0, identity(three, 10))
    nbytes = copies_begin(len(share[0])) + len(beside[0])
    own, kept = Slots(2, NUM_SLOTS, nbytes), Slots(2, KEPT_SLOTS, len(share[0]))
    counted = required_nbytes(own, kept, free_nbytes=1 << 40, held_nbytes=0)
    lose_first_node(three)
    three.begin()
    most_lent = most = 0
    for turn in range(100):
        three.turn()
        if turn % 8 == 0 and all(worker.restored is not None for worker in three.workers):
            three.save(20 + turn)
        files = [path for path in three.nodes[0].volume.path.rglob("*") if path.is_file()]
        most = max(most, sum(path.stat().st_blocks * 512 for path in files))
        most_lent = max(most_lent, sum(path.stat().st_size for path in lent(three)))
    assert most_lent == 2 * len(share[0]), "of both ranks of node 1"
    assert nbytes < most <= counted


def test_what_a_node_lends_its_ranks_is_taken_back_before_anybody_goes_on(three: Cluster) -> None:
    lose_first_node(three)
    three.begin()
    seen = 0
    while any(worker.restored is None for worker in three.workers):
        three.turn()
        seen = max(seen, len(lent(three)))
        assert not lent(three) or all(worker.restored is None for worker in three.workers)
    assert lent(three) == []


def test_node_without_room_for_what_it_would_lend_reads_what_each_rank_wants(three: Cluster) -> None:
    lose_first_node(three)

    def full(*args: Any) -> None:
        raise CapacityError("the volume is full")

    three.nodes[0].keeper._carrier.replicas._lend = full  # type: ignore[method-assign, assignment]
    assert three.restore() == 10
    assert {held.rank for held in three.nodes[0].volume.scan()} == {0, 1, 4, 5}
    foreign = sum(end for rank, (_, end) in three.wanted[0].items() if rank in (2, 3))
    everything = sum(end for _, end in three.wanted[0].values())
    assert sum(worker.wire_nbytes for worker in three.workers) >= everything + foreign, "each rank for itself"


def test_one_rank_alone_on_its_node_is_lent_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("it reads what it wants straight into its tensors")

    monkeypatch.setattr(Replicas, "_lend", never)
    cluster = Cluster(tmp_path, num_nodes=3)
    cluster.takes = divided
    cluster.drains = False
    cluster.restore()
    cluster.save_and_settle(10)
    nbytes = len(divided(1, identity(cluster, 10))[0][0])
    cluster.wanted = {0: {rank: (0, nbytes) for rank in range(3)}}
    cluster.lose_node(0)
    assert cluster.restore() == 10
    assert {held.rank for held in cluster.nodes[0].volume.scan()} == {0, 2}
    cluster.close()


# How long a peer that is not there is waited for

TIMEOUTS = Timeouts(patience_s=8)
WAIT_S = TIMEOUTS.start_s / 2


class Wire:
    """A node's end of a wire that brings every part at once."""

    def __init__(self) -> None:
        self.is_up = True

    def address(self) -> str | None:
        return "here" if self.is_up else None

    def read(self, source: str, wanted: PartialRead, *, deadline: Deadline) -> int:
        return wanted.nbytes


class Reads:
    """What the ranks of a node read of peers, and the time that it takes."""

    def __init__(self) -> None:
        self.clock, self.wire = FakeClock(), Wire()
        self.replicas = Replicas(
            "node-0",
            lambda: None,
            cast("Transport", self.wire),
            emit=lambda kind, **fields: None,
            timeouts=TIMEOUTS,
            clock=self.clock,
        )

    def want(self, peers: Mapping[str, str], epoch: int = 1) -> None:
        self.replicas.want(WantedReplicas(peers=peers), FaultPoints([], epoch=epoch), epoch=epoch)

    def waited_s(self, owner: str = "node-1", within_s: float = 1000.0) -> float:
        """Of a read that finds no wire."""
        before_s = self.clock.monotonic()
        with pytest.raises(UnavailableError, match=f"peer {owner}: no wire"):
            self.read(owner, within_s)
        return self.clock.monotonic() - before_s

    def read(self, owner: str = "node-1", within_s: float = 1000.0) -> int:
        wanted = PartialRead(0, identity_of(10), CHUNK_NBYTES, [], Path())
        return self.replicas.read(wanted, owner, Deadline.after(within_s, self.clock))


def test_reads_of_an_absent_peer_wait_once_for_all_of_them() -> None:
    reads = Reads()
    reads.want({})
    assert [reads.waited_s() for _ in range(8)] == pytest.approx([WAIT_S] + [0.0] * 7)
    assert reads.waited_s("node-2") == pytest.approx(WAIT_S), "another peer may be about to come"
    reads.want({})
    assert reads.waited_s() == 0.0, "the same word again changes nothing"


def test_read_with_a_deadline_of_its_own_leaves_the_rest_of_the_wait_to_the_next() -> None:
    reads = Reads()
    reads.want({})
    assert reads.waited_s(within_s=WAIT_S / 4) == pytest.approx(WAIT_S / 4)
    assert reads.waited_s() == pytest.approx(WAIT_S * 3 / 4)


@pytest.mark.parametrize("change", ["the peer came and went", "another epoch"])
def test_absent_peer_is_waited_for_anew_after(change: str) -> None:
    reads = Reads()
    reads.want({})
    reads.waited_s()
    if change == "another epoch":
        reads.want({}, epoch=2)
    else:
        reads.want({"node-1": "there"})
        assert reads.read() == 0
        reads.want({})
    assert reads.waited_s() == pytest.approx(WAIT_S)


def test_reads_while_the_own_end_is_down_wait_once_though_the_peer_is_there() -> None:
    reads = Reads()
    reads.wire.is_up = False
    for waited_s in (WAIT_S, 0.0):
        reads.want({"node-1": "there"})
        assert reads.waited_s() == pytest.approx(waited_s)
    reads.wire.is_up = True
    assert reads.read() == 0
