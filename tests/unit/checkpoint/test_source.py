"""Bringing a share of a snapshot from each tier: proven, placed, and from the next copy where one fails."""

from __future__ import annotations

import array
import ctypes
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from ktrain import native
from ktrain.base import contract
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.source import IN_FLIGHT_NBYTES
from ktrain.errors import CorruptionError, InternalError, NotFoundError, UnavailableError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import lay_out
from ktrain.format.shard import Box, Role, Shard
from ktrain.native import Runs
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from ktrain.testing.tier_conformance import soon
from tests.unit.checkpoint.shelves import CountingTier, Shelves, Snapshots, bucket_name, file_bucket, flipped, shelves

CHUNK = 4096
NBYTES = 100_000
MIB = 1 << 20
EMPTY = 0xEE
TIERS = (contract.TIER_MEMORY, contract.TIER_PEER, contract.TIER_DISK, contract.TIER_BUCKET)


def snapshot(seed: int, rank: int = 0, nbytes: int = NBYTES, chunk: int = CHUNK) -> tuple[Manifest, bytes]:
    layout = lay_out([Shard("model/weight", "uint8", (nbytes,), Box((0,), (nbytes,)), Role.SHARDED)])
    payload = layout.header + random.Random(seed + rank).randbytes(layout.nbytes - len(layout.header))
    chunks = tuple(native.digest_chunks(payload, chunk_nbytes=chunk))
    identity = Identity("ab", 10, 1, 4)
    return Manifest(identity, rank, "0" * 16, layout.nbytes, chunk, chunks, layout.entries, {}, {}), payload


class Place:
    """Memory of a restoring rank, and the runs that fill it: every second stretch of a payload."""

    def __init__(self, payload: bytes, begin: int = 4096, stretch: int = 10_000) -> None:
        self.begin, self.stretch, self.count = begin, stretch, (len(payload) - begin) // (2 * stretch)
        self.memory = numpy.full(self.count * stretch, EMPTY, dtype=numpy.uint8)
        offsets = range(begin, begin + self.count * 2 * stretch, 2 * stretch)
        addresses = [self.memory.ctypes.data + k * stretch for k in range(self.count)]
        columns = [addresses, [stretch] * self.count, list(offsets), *([value] * self.count for value in (1, 0, 0))]
        self.runs = Runs(*(array.array("Q", column) for column in columns))
        self.expected = b"".join(payload[at : at + stretch] for at in offsets)

    @property
    def is_filled(self) -> bool:
        return self.memory.tobytes() == self.expected


@pytest.fixture
def made(tmp_path: Path, seed: int) -> Iterator[tuple[Shelves, Snapshots]]:
    snapshots = {0: snapshot(seed)}
    with shelves(tmp_path, snapshots) as shelf:
        yield shelf, snapshots


@pytest.mark.parametrize("tier", TIERS)
def test_source_brings_runs_and_views_from_every_tier(made: tuple[Shelves, Snapshots], tier: str) -> None:
    shelf, snapshots = made
    payload = snapshots[0][1]
    place = Place(payload)
    source = shelf.source(snapshots, {0: [shelf.put(tier, snapshots)[0]]})
    views = [(0, 300), (9_000, 20_000), (90_000, len(payload))]
    source.fetch({0: views}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    for begin, end in [*views, (9_500, 9_501), (12_000, 17_000)]:
        assert bytes(source.view(0, begin, end)) == payload[begin:end]
    assert source.tiers == {0: tier}
    assert source.tally.wanted_nbytes == len(place.expected) + sum(end - begin for begin, end in views)
    assert source.tally.nbytes >= source.tally.wanted_nbytes
    source.close()


@pytest.mark.parametrize("tier", TIERS)
def test_source_with_a_bad_chunk_writes_none_of_it_and_names_it(made: tuple[Shelves, Snapshots], tier: str) -> None:
    shelf, snapshots = made
    place = Place(snapshots[0][1])
    copies = shelf.put(tier, snapshots, bad_at=45_000)
    with pytest.raises(CorruptionError, match="bytes 40960 to 45056 differ"):
        shelf.source(snapshots, {0: [copies[0]]}).fetch({}, into={0: place.runs}, deadline=soon())
    (failure,) = shelf.failures
    assert failure.corrupt and (failure.begin, failure.end) == (40_960, 45_056)
    for at, (found, good) in enumerate(zip(place.memory.tolist(), place.expected, strict=True)):
        offset = place.begin + at // place.stretch * 2 * place.stretch + at % place.stretch
        if 40_960 <= offset < 45_056:
            assert found == EMPTY
        else:
            assert found in (good, EMPTY)


@pytest.mark.parametrize("tier", TIERS)
def test_source_takes_the_next_copy_where_one_is_bad_in_the_middle(made: tuple[Shelves, Snapshots], tier: str) -> None:
    shelf, snapshots = made
    payload = snapshots[0][1]
    place = Place(payload)
    (bad,) = shelf.put(tier, snapshots, bad_at=45_000).values()
    next_tier = contract.TIER_DISK if tier == contract.TIER_BUCKET else contract.TIER_BUCKET
    (good,) = shelf.put(next_tier, snapshots).values()
    source = shelf.source(snapshots, {0: [bad, good]})
    source.fetch({0: [(50_000, 60_000)]}, into={0: place.runs}, deadline=soon())
    assert place.is_filled
    assert bytes(source.view(0, 50_000, 60_000)) == payload[50_000:60_000]
    assert source.tiers == {0: next_tier}
    assert [failure.copy for failure in source.failures] == [bad]
    source.close()


def test_source_with_another_snapshots_manifest_refuses_the_slot(made: tuple[Shelves, Snapshots], seed: int) -> None:
    shelf, snapshots = made
    (copy,) = shelf.put(contract.TIER_MEMORY, {0: snapshot(seed + 1)}).values()
    with pytest.raises(CorruptionError, match="not the one that was agreed on"):
        shelf.source(snapshots, {0: [copy]}).fetch({0: [(0, 10)]}, deadline=soon())


@pytest.mark.parametrize("on_disk", [False, True])
def test_source_with_a_short_object_names_where_it_ends(tmp_path: Path, seed: int, on_disk: bool) -> None:
    snapshots = {0: snapshot(seed)}
    manifest, payload = snapshots[0]
    bucket = file_bucket(tmp_path) if on_disk else FakeBucket()
    with shelves(tmp_path, snapshots, bucket) as shelf:
        copies = shelf.put(contract.TIER_BUCKET, snapshots)
        bucket.write(bucket_name(manifest), payload[:70_000], deadline=soon())
        with pytest.raises(CorruptionError, match="found 70000 bytes"):
            shelf.source(snapshots, {0: [copies[0]]}).fetch({0: [(60_000, 80_000)]}, deadline=soon())
        assert shelf.failures[0].corrupt


def test_source_with_a_read_that_gives_fewer_bytes_names_the_range(tmp_path: Path, seed: int) -> None:
    snapshots = {0: snapshot(seed)}
    bucket = FaultyTier(FakeBucket(), TierFault("read_range", Fault.TRUNCATE))
    with shelves(tmp_path, snapshots, bucket) as shelf:
        copies = shelf.put(contract.TIER_BUCKET, snapshots)
        with pytest.raises(CorruptionError, match="it ends at"):
            shelf.source(snapshots, {0: [copies[0]]}).fetch({0: [(8_192, 16_384)]}, deadline=soon())
        (failure,) = shelf.failures
        assert failure.corrupt and (failure.begin, failure.end) == (12_288, 16_384)


def test_source_with_a_read_that_hangs_takes_the_next_copy_at_its_deadline(tmp_path: Path, seed: int) -> None:
    snapshots = {0: snapshot(seed)}
    payload = snapshots[0][1]
    bucket = FaultyTier(FakeBucket(), TierFault("read_range", Fault.HANG))
    with shelves(tmp_path, snapshots, bucket) as shelf:
        shelf.call_s = 0.2
        copies = [shelf.put(tier, snapshots)[0] for tier in (contract.TIER_BUCKET, contract.TIER_DISK)]
        source = shelf.source(snapshots, {0: copies})
        source.fetch({0: [(0, len(payload))]}, deadline=soon())
        assert bytes(source.view(0, 0, len(payload))) == payload
        (failure,) = source.failures
        assert not failure.corrupt and "no answer within" in failure.reason
        source.close()


@pytest.mark.parametrize("error", [UnavailableError, NotFoundError])
def test_source_whose_peer_lets_its_lease_go_takes_the_next_copy_and_blames_nobody(
    made: tuple[Shelves, Snapshots], error: type[Exception]
) -> None:
    shelf, snapshots = made

    def pull(copy: Copy) -> int:
        raise error("pull: lease 1234 has ended")

    shelf.pull = pull
    copies = [shelf.put(tier, snapshots)[0] for tier in (contract.TIER_PEER, contract.TIER_BUCKET)]
    source = shelf.source(snapshots, {0: copies})
    source.fetch({0: [(0, len(snapshots[0][1]))]}, deadline=soon())
    assert source.tiers == {0: contract.TIER_BUCKET}
    assert [failure.corrupt for failure in source.failures] == [False]
    source.close()


def test_source_whose_bucket_lacks_what_its_commit_names_says_that_the_copy_is_bad(
    made: tuple[Shelves, Snapshots],
) -> None:
    shelf, snapshots = made
    copy = Copy(contract.TIER_BUCKET, "0a1b", 0, snapshots[0][0].identity)
    with pytest.raises(CorruptionError):
        shelf.source(snapshots, {0: [copy]}).fetch({0: [(0, 10)]}, deadline=soon())
    assert shelf.failures[0].corrupt


def test_source_keeps_a_slot_leased_until_it_is_closed(made: tuple[Shelves, Snapshots]) -> None:
    shelf, snapshots = made
    manifest, payload = snapshots[0]
    source = shelf.source(snapshots, {0: [shelf.put(contract.TIER_MEMORY, snapshots)[0]]})
    source.fetch({0: [(0, 10)]}, deadline=soon())
    shelf.put(contract.TIER_MEMORY, {0: (replace(manifest, identity=Identity("ab", 20, 1, 4)), payload)})

    assert shelf.volume.acquire(0, manifest.nbytes, protect=(), limit=2) is None
    source.close()
    writer = shelf.volume.acquire(0, manifest.nbytes, protect=(), limit=2)
    assert writer is not None
    with writer:
        pass  # given back unsealed


def test_source_brings_many_ranks_with_many_reads_at_once_within_the_budget(tmp_path: Path, seed: int) -> None:
    snapshots = {rank: snapshot(seed, rank, 20 * MIB, 128 << 10) for rank in range(4)}
    bucket = CountingTier(FakeBucket())
    with shelves(tmp_path, snapshots, bucket) as shelf:
        copies = shelf.put(contract.TIER_BUCKET, snapshots)
        source = shelf.source(snapshots, {rank: [copies[rank]] for rank in copies})
        places = {rank: Place(payload, stretch=100_000) for rank, (_, payload) in snapshots.items()}
        source.fetch({}, into={rank: place.runs for rank, place in places.items()}, deadline=soon())
        assert all(place.is_filled for place in places.values())
        largest = max(end - begin for _, begin, end in bucket.reads)
        assert largest * bucket.most_at_once <= IN_FLIGHT_NBYTES
        assert source.tally.num_reads == len(bucket.reads)
        assert source.tally.nbytes == bucket.nbytes
        source.close()


def test_source_refuses_one_rank_and_brings_the_others_once(tmp_path: Path, seed: int) -> None:
    snapshots = {rank: snapshot(seed, rank) for rank in range(3)}
    bucket = CountingTier(FakeBucket())
    with shelves(tmp_path, snapshots, bucket) as shelf:
        copies = shelf.put(contract.TIER_BUCKET, snapshots)
        manifest, payload = snapshots[1]
        bucket.write(bucket_name(manifest), flipped(payload, 45_000), deadline=soon())
        second = shelf.put(contract.TIER_DISK, {1: snapshots[1]})
        source = shelf.source(snapshots, {0: [copies[0]], 1: [copies[1], second[1]], 2: [copies[2]]})
        source.fetch({rank: [(0, 50_000)] for rank in range(3)}, deadline=soon())
        assert source.tiers == {0: "bucket", 1: "disk", 2: "bucket"}
        for rank, (_, expected) in snapshots.items():
            assert bytes(source.view(rank, 0, 50_000)) == expected[:50_000]
        assert len(bucket.reads) == 3
        source.close()


def test_source_refuses_a_copy_once_however_many_of_its_reads_are_bad(tmp_path: Path, seed: int) -> None:
    snapshots = {0: snapshot(seed, 0, 40 * MIB, 128 << 10)}
    manifest, payload = snapshots[0]
    bucket = file_bucket(tmp_path)
    with shelves(tmp_path, snapshots, bucket) as shelf:
        wrong = payload
        for at in (MIB, 12 * MIB, 39 * MIB):
            wrong = flipped(wrong, at)
        bad = shelf.put(contract.TIER_BUCKET, {0: (manifest, wrong)})[0]
        good = shelf.put(contract.TIER_DISK, snapshots)[0]
        source = shelf.source(snapshots, {0: [bad, good]})
        place = Place(payload, stretch=100_000)
        source.fetch({}, into={0: place.runs}, deadline=soon())
        assert len(bucket.reads) > 1 and place.is_filled
        assert [failure.copy for failure in source.failures] == [bad]
        source.close()


def test_source_keeps_what_it_gave_until_closed(made: tuple[Shelves, Snapshots]) -> None:
    shelf, snapshots = made
    payload = snapshots[0][1]
    source = shelf.source(snapshots, {0: [shelf.put(contract.TIER_BUCKET, snapshots)[0]]})
    source.fetch({0: [(5_000, 14_000)]}, deadline=soon())
    address = numpy.frombuffer(source.view(0, 5_000, 14_000), dtype=numpy.uint8).ctypes.data
    assert ctypes.string_at(address, 9_000) == payload[5_000:14_000]  # the view itself is gone by now
    source.close()


@pytest.mark.parametrize("tier", [contract.TIER_MEMORY, contract.TIER_BUCKET])
@pytest.mark.parametrize(("begin", "end"), [(0, 4_000), (5_000, 30_000), (60_000, 60_001)])
def test_source_lends_nothing_that_was_not_asked_for(
    made: tuple[Shelves, Snapshots], tier: str, begin: int, end: int
) -> None:
    shelf, snapshots = made
    source = shelf.source(snapshots, {0: [shelf.put(tier, snapshots)[0]]})
    source.fetch({0: [(5_000, 14_000), (90_000, 91_000)]}, deadline=soon())
    with pytest.raises(InternalError, match="not proven"):
        source.view(0, begin, end)
    source.close()


def test_source_of_many_small_pieces_asks_the_bucket_few_times(tmp_path: Path, seed: int) -> None:
    snapshots = {0: snapshot(seed, 0, 8 * MIB)}
    bucket = CountingTier(FakeBucket())
    with shelves(tmp_path, snapshots, bucket) as shelf:
        place = Place(snapshots[0][1], stretch=2_000)
        source = shelf.source(snapshots, {0: [shelf.put(contract.TIER_BUCKET, snapshots)[0]]})
        source.fetch({}, into={0: place.runs}, deadline=soon())
        assert place.count > 2_000 and place.is_filled
        assert len(bucket.reads) == 1
        source.close()
