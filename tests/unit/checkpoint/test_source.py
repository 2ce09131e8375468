"""Reading a payload in pieces: proven, and whole also across the borders of reads."""

from __future__ import annotations

import ctypes
import gc
import random
import sys

import numpy
import pytest

from ktrain import native
from ktrain.base.clock import Deadline
from ktrain.checkpoint.source import BadCopy, TierReader
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import lay_out
from ktrain.format.shard import Box, Role, Shard
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.tier_conformance import soon

CHUNK = 4096


def stored(nbytes: int, seed: int) -> tuple[FakeBucket, Manifest, bytes]:
    layout = lay_out([Shard("model/weight", "uint8", (nbytes,), Box((0,), (nbytes,)), Role.SHARDED)])
    payload = layout.header + random.Random(seed).randbytes(layout.nbytes - len(layout.header))
    manifest = Manifest(
        identity=Identity("ab", 10, 1, 1),
        rank=0,
        plan_digest="0" * 16,
        nbytes=layout.nbytes,
        chunk_nbytes=CHUNK,
        chunks=tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK)),
        entries=layout.entries,
        objects={},
        origin={},
    )
    bucket = FakeBucket()
    bucket.write("payload", payload, deadline=soon())
    return bucket, manifest, payload


def reader(bucket: FakeBucket, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> TierReader:
    monkeypatch.setattr(TierReader, "_READ_NBYTES", 2 * CHUNK)
    return TierReader(bucket, "payload", manifest, lambda nbytes: Deadline.after(5.0))


def test_tier_reader_gives_the_bytes_within_and_across_reads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, manifest, payload = stored(50_000, seed)
    opened = reader(bucket, manifest, monkeypatch)
    ranges = [(100, 300), (9_000, 20_000), (20_000, 20_000), (40_000, manifest.nbytes)]
    opened.fetch(ranges, soon())
    for begin, end in [*ranges, (9_000, 9_001), (8_192, 8_192 + CHUNK), (12_000, 17_000)]:
        assert bytes(opened.view(begin, end)) == payload[begin:end]


def test_tier_reader_keeps_what_it_gave_until_closed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, manifest, payload = stored(50_000, seed)
    opened = reader(bucket, manifest, monkeypatch)
    opened.fetch([(0, manifest.nbytes)], soon())
    view = opened.view(5_000, 14_000)
    address = numpy.frombuffer(view, dtype=numpy.uint8).ctypes.data
    before = sys.getrefcount(view.obj)
    del view
    gc.collect()
    assert before > 2  # the reader holds the bytes too, not the caller's view alone
    assert ctypes.string_at(address, 9_000) == payload[5_000:14_000]


def test_tier_reader_without_a_fetch_gives_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, manifest, _ = stored(50_000, seed)
    opened = reader(bucket, manifest, monkeypatch)
    opened.fetch([(0, 100)], soon())
    with pytest.raises(AssertionError, match="were not fetched"):
        opened.view(0, 30_000)


def test_tier_reader_with_a_flipped_bit_names_the_range(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, manifest, payload = stored(50_000, seed)
    wrong = bytearray(payload)
    wrong[21_000] ^= 4
    bucket.write("payload", bytes(wrong), deadline=soon())
    with pytest.raises(BadCopy) as caught:
        reader(bucket, manifest, monkeypatch).fetch([(0, manifest.nbytes)], soon())
    assert (caught.value.begin, caught.value.end) == (20_480, 24_576)
