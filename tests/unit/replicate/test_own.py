"""Replicas that a node builds from what it holds itself, and the little that crosses the wire for them (ADR 0025)."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ktrain.abc.source import copies_beside
from ktrain.abc.transport import Receipt
from ktrain.base.clock import Deadline
from ktrain.errors import CorruptionError, UnavailableError
from ktrain.format.manifest import Manifest, verify_payload
from ktrain.format.payload import CHUNK_NBYTES, copies_begin
from ktrain.snapshot.arena import NodeVolume
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.local_transport import LocalTransport, LocalWire
from tests.unit.state.meshes import distribute, fake_rank, mesh_of
from tests.unit.state.worlds import Holder, Taken, snapshot_and_copies

FULL = torch.arange(2000 * 1000, dtype=torch.float32).reshape(2000, 1000)  # 8 MB
RUN = "0123"  # of the snapshots that `worlds` takes

# Name: the mesh, how the tensor lies on it, and how many ranks a node has.
WORLDS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...], int]] = {
    "copies-on-2-nodes": ((2,), (Replicate(),), 1),
    "copies-on-3-nodes": ((3,), (Replicate(),), 1),
    "copies-3x2": ((6,), (Replicate(),), 2),
    "copy-on-each-node": ((2, 2), (Replicate(), Shard(0)), 2),
    "columns-on-each-of-3-nodes": ((3, 2), (Replicate(), Shard(1)), 2),
}


class Job:
    """Nodes whose ranks have sealed their shares and copies of one step."""

    def __init__(self, folder: Path, name: str, *, divided: bool = True) -> None:
        mesh, placements, per_node = WORLDS[name]
        size = torch.Size(mesh).numel()
        self.per_node = per_node
        self.wire = LocalWire()
        self.nodes = [
            LocalTransport(self.wire, NodeVolume(folder / f"{index}", node=f"node-{index}", run=RUN))
            for index in range(size // per_node)
        ]
        self.shares: dict[int, Taken] = {}
        for rank in range(size):
            topology = Topology(rank, size, rank % per_node, per_node)
            with fake_rank(rank, size):
                own = torch.full((1000,), float(rank))  # of this rank alone
                state = TrainState({"part": Holder({"w": distribute(FULL, mesh_of(mesh), placements), "own": own})})
                told = topology.with_nodes([per_node] * len(self.nodes)) if divided else topology
                self.shares[rank], copies = snapshot_and_copies(state, told)
            self.seal(self.volume(rank // per_node), self.shares[rank], copies)
        self.identity = self.shares[0][0].identity

    @staticmethod
    def seal(volume: NodeVolume, share: Taken, copies: Taken | None) -> None:
        manifest, data = share
        begin = copies_begin(len(data))
        nbytes = len(data) if copies is None else begin + len(copies[1])
        writer = volume.acquire(manifest.rank, nbytes, protect=(), limit=2)
        assert writer is not None
        with writer:
            writer.memory[: len(data)] = data
            if copies is not None:
                writer.memory[begin:] = copies[1]
            writer.seal(manifest, None if copies is None else copies[0])

    def volume(self, node: int) -> NodeVolume:
        return self.nodes[node]._volume

    def pull(self, rank: int, to: int) -> Receipt:
        """A replica of the rank's share to a node."""
        source = f"local:node-{rank // self.per_node}"
        return self.nodes[to].pull(source, rank, self.identity, protect=(), deadline=Deadline.after(30.0))

    def is_held(self, rank: int, node: int) -> bool:
        """Whether the node has the share, bit for bit."""
        if rank not in {held.rank for held in self.volume(node).scan()}:
            return False
        with self.volume(node).open(rank, self.identity) as slot:
            verify_payload(slot.manifest, slot.memory)
            return slot.manifest == self.shares[rank][0] and slot.memory == self.shares[rank][1]

    def drop(self, rank: int, node: int) -> None:
        """Removes what a node has of a rank, behind everyone's back."""
        volume = self.volume(node)
        shutil.rmtree(volume.path / f"rank-{rank:05d}", ignore_errors=True)
        volume.release(rank)

    def spoil_copies(self, rank: int, at: int) -> None:
        """Flips a bit of the copies beside a rank's share."""
        volume = self.volume(rank // self.per_node)
        begin = copies_begin(self.shares[rank][0].nbytes)
        (path,) = volume.path.glob(f"rank-{rank:05d}/slot-*.safetensors")
        flip(path, begin + at)

    def close(self) -> None:
        for node in self.nodes:
            volume = node._volume
            node.close()
            volume.close()


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1]))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, "copies-on-2-nodes")
    yield made
    made.close()


@pytest.mark.parametrize("name", WORLDS)
def test_replica_of_what_the_node_holds_too_is_its_own_bytes_but_for_the_edges(name: str, tmp_path: Path) -> None:
    job = Job(tmp_path, name)
    for rank, node in itertools.product(job.shares, range(len(job.nodes))):
        if rank // job.per_node == node:
            continue
        share = job.shares[rank][0]
        receipt = job.pull(rank, node)
        assert job.is_held(rank, node)
        assert receipt.bad_own == ()
        assert receipt.nbytes - receipt.own_nbytes <= 3 * CHUNK_NBYTES, "header, own values, and the last chunk"
        assert receipt.wire_nbytes == receipt.nbytes - receipt.own_nbytes + len(share.to_bytes())
    job.close()


def test_replica_where_every_node_stores_all_is_built_from_shares(tmp_path: Path) -> None:
    job = Job(tmp_path, "copies-on-2-nodes", divided=False)
    assert job.volume(1).copies.ranks() == []
    receipt = job.pull(0, 1)
    assert job.is_held(0, 1)
    assert receipt.nbytes - receipt.own_nbytes <= 3 * CHUNK_NBYTES
    job.close()


def test_replica_without_own_copies_is_pulled_whole(job: Job) -> None:
    job.volume(1).copies.discard(1, job.identity)
    receipt = job.pull(0, 1)
    assert job.is_held(0, 1)
    assert (receipt.own_nbytes, receipt.bad_own) == (0, ())
    assert receipt.wire_nbytes >= receipt.nbytes


def test_replica_with_a_damaged_manifest_of_own_copies_is_pulled_whole(job: Job) -> None:
    (path,) = job.volume(1).path.rglob("*.copies.json")
    path.write_bytes(path.read_bytes()[:-30])
    receipt = job.pull(0, 1)
    assert job.is_held(0, 1)
    assert receipt.own_nbytes == 0


def test_own_copy_bad_in_one_chunk_is_named_and_that_chunk_pulled(job: Job) -> None:
    good = job.pull(0, 1).own_nbytes
    job.drop(0, node=1)
    job.spoil_copies(1, at=1 << 20)
    receipt = job.pull(0, 1)
    assert job.is_held(0, 1)
    # The copies have another header, so that their chunks lie across those of the share.
    assert good - 2 * CHUNK_NBYTES <= receipt.own_nbytes < good
    (bad,) = receipt.bad_own
    assert (bad.rank, bad.end - bad.begin) == (copies_beside(1), CHUNK_NBYTES)
    assert bad.begin <= 1 << 20 < bad.end


def test_own_copy_that_proves_but_holds_other_values_is_not_taken_and_not_bad(job: Job) -> None:
    apart = FULL.clone()
    apart[10] += 1.0
    with fake_rank(1, 2):
        value = {"w": distribute(apart, mesh_of((2,)), [Replicate()]), "own": torch.ones(1000)}
        share, copies = snapshot_and_copies(TrainState({"part": Holder(value)}), Topology(1, 2).with_nodes((1, 1)))
    job.drop(1, node=1)
    job.seal(job.volume(1), share, copies)
    receipt = job.pull(0, 1)
    assert job.is_held(0, 1)
    assert receipt.bad_own == ()
    assert 0 < receipt.own_nbytes < receipt.nbytes


def test_own_slot_removed_while_a_replica_is_built_changes_nothing(job: Job) -> None:
    job.wire.before_piece = lambda node, begin, end: job.drop(1, node=1)
    assert job.pull(0, 1).own_nbytes > 0
    assert job.is_held(0, 1)
    job.drop(0, node=1)
    assert job.pull(0, 1).own_nbytes == 0, "there is nothing left to build from"
    assert job.is_held(0, 1)


def test_peer_lost_while_the_rest_crosses_seals_nothing_and_is_tried_again(job: Job) -> None:
    def lose(node: str, begin: int, end: int) -> None:
        raise UnavailableError(f"{node}: it died")

    job.wire.before_piece = lose
    with pytest.raises(UnavailableError):
        job.pull(0, 1)
    assert not job.is_held(0, 1)
    job.wire.before_piece = LocalWire().before_piece
    job.pull(0, 1)
    assert job.is_held(0, 1)


def test_chunk_bad_here_and_at_the_peer_is_corruption_and_seals_nothing(job: Job) -> None:
    (path,) = job.volume(0).path.glob("rank-00000/slot-*.safetensors")
    at = 2 << 20
    flip(path, at)
    entry = next(entry for entry in job.shares[0][0].entries if entry.shard.name.endswith("w"))
    theirs = next(e for e in copies_of(job, 1).entries if e.shard.name == entry.shard.name)
    job.spoil_copies(1, theirs.begin + at - entry.begin)
    begin = at // CHUNK_NBYTES * CHUNK_NBYTES
    with pytest.raises(CorruptionError, match=f"rank 0, step 7.*{begin} to {begin + CHUNK_NBYTES}"):
        job.pull(0, 1)
    assert not job.is_held(0, 1)


def test_chunk_bad_at_the_peer_alone_is_not_asked_for(job: Job) -> None:
    (path,) = job.volume(0).path.glob("rank-00000/slot-*.safetensors")
    flip(path, 2 << 20)
    job.pull(0, 1)
    assert job.is_held(0, 1), "a good replica of a copy that went bad"


def copies_of(job: Job, rank: int) -> Manifest:
    return job.volume(rank // job.per_node).copies.find(job.identity)[0][rank]
