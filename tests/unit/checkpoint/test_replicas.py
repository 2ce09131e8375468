"""What a node's keeper does with the replicas of its peers' shares, in a job of two nodes that hold one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.format.manifest import Identity
from ktrain.format.payload import CHUNK_NBYTES, copies_begin
from tests.unit.checkpoint.builders import divided
from tests.unit.checkpoint.cluster import Cluster, flip_at


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
