"""Two checkpoints compared: what the comparison says is what comparing the whole tensors says."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.checkpoint.compare import Difference, Side, compare
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.format.shard import Box, Role, Shard
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.faulty_tier import FaultyTier
from tests.unit.checkpoint.builders import catalog, flip, identity, put_tensors

Named = tuple[str, tuple[int, ...], bytes]  # name, shape, one byte for each item


def whole(name: str, shape: tuple[int, ...], data: bytes, *, role: Role = Role.SHARDED, dtype: str = "uint8") -> Any:
    return Shard(name, dtype, shape, Box.whole(shape), role), data


def cut(name: str, shape: tuple[int, ...], data: bytes, dim: int, num: int) -> list[Any]:
    """The tensor in `num` boxes along a dimension, uneven where it must be; empty ones are left out."""
    bounds = [shape[dim] * part // num for part in range(num + 1)]
    pieces = []
    for begin, end in itertools.pairwise(bounds):
        box = Box(
            tuple(begin if at == dim else 0 for at in range(len(shape))),
            tuple(end - begin if at == dim else size for at, size in enumerate(shape)),
        )
        inside = itertools.product(*(range(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True)))
        pieces.append(
            (Shard(name, "uint8", shape, box, Role.SHARDED), bytes(data[_at(shape, item)] for item in inside))
        )
    return pieces


def _at(shape: tuple[int, ...], item: tuple[int, ...]) -> int:
    index = 0
    for size, here in zip(shape, item, strict=True):
        index = index * size + here
    return index


def sides(*ranks_of: list[list[Any]], objects: tuple[dict[str, Any], ...] = ({}, {})) -> tuple[Side, Side, FaultyTier]:
    tier = FaultyTier(FakeBucket())
    made = [
        Side(catalog(tier), put_tensors(tier, identity(step, 1, len(ranks)), ranks, about))
        for step, ranks, about in zip((10, 20), ranks_of, objects, strict=True)
    ]
    tier.calls.clear()
    return made[0], made[1], tier


def compared(*ranks_of: list[list[Any]]) -> Difference:
    a, b, _ = sides(*ranks_of)
    return compare(a, b)


@given(st.data())
def test_compare_any_two_layouts_finds_exactly_the_tensors_that_differ(data: st.DataObject) -> None:
    tensors = data.draw(st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4))
    values = random.Random(data.draw(st.integers(0, 1000)))
    ranks: tuple[list[list[Any]], list[list[Any]]] = ([[] for _ in range(2)], [[] for _ in range(3)])
    different = []
    for number, shape in enumerate(tensors):
        name, count = f"model/t{number}", 1
        for size in shape:
            count *= size
        first = values.randbytes(count)
        second = flip(first, values.randrange(count)) if data.draw(st.booleans()) else first
        different += [name] if first != second else []
        for side, content in zip(ranks, (first, second), strict=True):
            if not shape:
                side[data.draw(st.integers(0, len(side) - 1))].append(whole(name, shape, content))
                continue
            pieces = cut(name, shape, content, data.draw(st.integers(0, len(shape) - 1)), len(side))
            for rank, piece in zip(data.draw(st.permutations(range(len(side)))), pieces, strict=True):
                if piece[0].box.numel:
                    side[rank].append(piece)
    found = compared(*ranks)
    assert found.differing == different and found.unproven == {} and found.added == found.removed == []
    assert len(found.equal) == len(tensors) - len(different)


def test_compare_same_bytes_reads_no_payload() -> None:
    ranks = [[whole("model/a", (1000,), bytes(1000)), whole("model/b", (3, 3), b"123456789")]]
    a, b, tier = sides(ranks, ranks)
    found = compare(a, b)
    assert found.is_empty() and found.equal == ["model/a", "model/b"]
    assert not [call for call in tier.calls if call[0] == "read_range"] and found.nbytes_read == 0


def test_compare_chunk_within_one_tensor_decides_without_reading() -> None:
    nbytes = 3 * CHUNK_NBYTES
    first = bytes(nbytes)
    a, b, tier = sides([[whole("model/big", (nbytes,), first)]], [[whole("model/big", (nbytes,), flip(first))]])
    assert compare(a, b).differing == ["model/big"]
    assert not [call for call in tier.calls if call[0] == "read_range"]


def test_compare_tensors_that_share_a_chunk_are_told_apart() -> None:
    first = [[whole("model/a", (8,), b"12345678"), whole("model/b", (8,), b"abcdefgh")]]
    second = [[whole("model/a", (8,), b"12345678"), whole("model/b", (8,), b"abcdefgx")]]
    found = compared(first, second)
    assert (found.equal, found.differing) == (["model/a"], ["model/b"])


def test_compare_names_what_is_added_removed_and_of_another_form() -> None:
    first = [[whole("model/a", (4,), b"1234"), whole("model/b", (4,), b"1234"), whole("model/c", (4,), b"1234")]]
    second = [
        [
            whole("model/a", (2, 2), b"1234"),
            whole("model/b", (4,), b"1234", dtype="int8"),
            whole("model/d", (4,), b"1234"),
        ]
    ]
    found = compared(first, second)
    assert [row["name"] for row in found.removed] == ["model/c"] and [row["name"] for row in found.added] == ["model/d"]
    assert [row["name"] for row in found.changed] == ["model/a", "model/b"]
    assert found.changed[1]["b"]["dtype"] == "int8"


def test_compare_values_of_each_rank_are_compared_rank_by_rank() -> None:
    first = [[whole("rng/x", (2,), b"ab", role=Role.RANK)], [whole("rng/x", (2,), b"cd", role=Role.RANK)]]
    second = [[whole("rng/x", (2,), b"ab", role=Role.RANK)], [whole("rng/x", (2,), b"cx", role=Role.RANK)]]
    found = compared(first, second)
    assert (found.equal, found.differing) == (["rng/x of rank 0"], ["rng/x of rank 1"])


def test_compare_values_that_are_no_tensors_are_named_by_part() -> None:
    ranks = [[whole("model/a", (4,), b"1234")]]
    a, b, _ = sides(ranks, ranks, objects=({"optimizer": {"lr": 0.1}, "x": 1}, {"optimizer": {"lr": 0.2}, "x": 1}))
    found = compare(a, b)
    assert found.objects == ["optimizer"] and not found.is_empty()


@pytest.mark.parametrize("side", [10, 20])
def test_compare_bytes_that_are_not_proven_are_neither_equal_nor_different(side: int) -> None:
    a, b, tier = sides([[whole("model/a", (8,), b"12345678")]], [[whole("model/a", (8,), b"1234567x")]])
    inner = tier._inner
    (name,) = [name for name in inner.objects if f"step-{side:08d}" in name and name.endswith("safetensors")]
    inner.objects[name] = flip(inner.objects[name], len(inner.objects[name]) - 2)
    found = compare(a, b)
    assert found.differing == found.equal == [] and "do not match their digests" in found.unproven["model/a"]
