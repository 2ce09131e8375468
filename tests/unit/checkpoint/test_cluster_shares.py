"""Ranks whose shares do not make a whole: never committed in the bucket, said once, and stored whole from then on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain import native
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, lay_out
from ktrain.format.shard import Box, Role, Shard
from tests.unit.checkpoint import cluster as clusters
from tests.unit.checkpoint.builders import snapshot as whole
from tests.unit.checkpoint.cluster import Cluster

NOTICE = "every node stores all"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def first_half(rank: int, at: Identity) -> tuple[bytes, Manifest]:
    """The same half of a tensor, whichever rank saves: both take themselves for the first."""
    layout = lay_out([Shard("w", "uint8", (2 * 4096,), Box((0,), (4096,)), Role.REPLICATED)])
    payload = layout.header + bytes(4096)
    chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES))
    digest = "0" * 16
    return payload, Manifest(at, rank, digest, len(payload), CHUNK_NBYTES, chunks, layout.entries, {}, {})


def notices(cluster: Cluster) -> list[str]:
    return [event.fields["message"] for event in cluster.events if NOTICE in event.fields.get("message", "")]


def told(cluster: Cluster) -> list[list[int]]:
    return [worker.answer["node_sizes"] for worker in cluster.workers]


def test_ranks_are_told_the_nodes_of_the_attempt(cluster: Cluster) -> None:
    cluster.restore()
    assert told(cluster) == [[1, 1], [1, 1]]


def test_shares_with_a_gap_are_not_committed_and_every_node_stores_all_from_then_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.restore()
    monkeypatch.setattr(clusters, "snapshot", first_half)
    cluster.save(10)
    cluster.turn(12)
    assert "bucket" not in cluster.committed()
    assert len(notices(cluster)) == 1
    assert told(cluster) == [[], []]
    monkeypatch.setattr(clusters, "snapshot", whole)  # as ranks do once they are told
    cluster.save(20)
    cluster.turn(60)
    assert cluster.committed()["bucket"] == 20
    assert len(notices(cluster)) == 1


def test_next_attempt_and_next_head_know_of_the_gap_and_the_one_after_tries_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.restore()
    monkeypatch.setattr(clusters, "snapshot", first_half)
    cluster.save(10)
    cluster.turn(12)
    monkeypatch.setattr(clusters, "snapshot", whole)
    cluster.head.coordinator = cluster.new_coordinator()
    cluster.coordinator.adopt_attempt(cluster.epoch, cluster.assignment)
    cluster.turn(3)
    assert told(cluster) == [[], []], "a head that took over knows"
    cluster.save(20)
    cluster.turn(60)
    assert cluster.committed()["bucket"] == 20

    cluster.restore()
    assert told(cluster) == [[], []]
    cluster.restore()
    assert told(cluster) == [[1, 1], [1, 1]]
