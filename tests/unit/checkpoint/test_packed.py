"""Manifests of all ranks on their way to a node: exact, and little more than their digests."""

from __future__ import annotations

import random

import pytest

from ktrain.checkpoint.packed import pack, unpack
from ktrain.errors import CorruptionError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, lay_out
from ktrain.format.shard import Box, Role, Shard
from tests.unit.checkpoint.builders import RUN, identity, snapshot

WORLD = 16
WIDTH = 1024


def shards(rank: int) -> list[Shard]:
    """What a rank of a fully sharded job stores: its rows of weights and of the optimizer's moments."""
    rows = WIDTH // WORLD
    box = Box((rank * rows, 0), (rows, WIDTH))
    layers = [f"layers.{layer}.{name}.weight" for layer in range(24) for name in ("q", "k", "v", "o", "up", "down")]
    names = [
        f"{part}{layer}{key}" for layer in layers for part, key in (("model/", ""), ("opt/", "/m"), ("opt/", "/v"))
    ]
    return [Shard(name, "float32", (WIDTH, WIDTH), box, Role.SHARDED) for name in names]


def manifest(rank: int, generator: random.Random) -> Manifest:
    layout = lay_out(shards(rank))
    chunks = tuple(generator.getrandbits(64) for _ in range(-(-layout.nbytes // CHUNK_NBYTES)))
    at = Identity(RUN, 10, 1, WORLD)
    return Manifest(at, rank, f"{rank:016x}", layout.nbytes, CHUNK_NBYTES, chunks, layout.entries, {}, {"node": "n"})


def test_pack_of_a_sharded_job_has_little_more_than_the_digests(seed: int) -> None:
    generator = random.Random(seed)
    made = {rank: manifest(rank, generator) for rank in range(WORLD)}
    texts = {rank: one.to_bytes().decode() for rank, one in made.items()}
    packed = pack(texts)
    assert unpack(packed) == texts
    digests_nbytes = sum(8 * len(one.chunks) for one in made.values())
    num_tensors = sum(len(one.entries) for one in made.values())
    # Written as text, digests take some more; what is left of a tensor is a few bytes of over a hundred.
    assert len(packed) < 1.6 * digests_nbytes + 20 * num_tensors
    assert len(packed) < sum(map(len, texts.values())) / 2


def test_pack_gives_back_manifests_that_prove_themselves() -> None:
    at = identity(10, world_size=3)
    texts = {rank: snapshot(rank, at)[1].to_bytes().decode() for rank in range(3)}
    found = {rank: Manifest.from_bytes(text.encode()) for rank, text in unpack(pack(texts)).items()}
    assert [found[rank].rank for rank in range(3)] == [0, 1, 2]
    assert unpack(pack({})) == {}


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:-8], lambda text: "#" + text[1:], lambda text: "", lambda text: "AAAA"]
)
def test_unpack_of_what_is_torn_or_changed_is_refused(spoil: object) -> None:
    packed = pack({0: "a" * 1000})
    with pytest.raises(CorruptionError, match="manifests of all ranks"):
        unpack(spoil(packed))  # type: ignore[operator]
