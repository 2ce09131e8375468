"""Even shares of what several ranks hold, without a word between them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktrain.format.shard import Box, missing_boxes
from ktrain.state.shares import Block, find_place, share_out

PAGE = 4096
lengths = st.lists(st.integers(0, 300), max_size=4).map(tuple)
blocks = st.lists(st.builds(Block, lengths, st.sampled_from([1, 2, 4, 10, 14, 16])), max_size=12)
num_shares = st.integers(1, 8)
# Sizes of the tensors of real models: a huge embedding, wide matrices, vectors, in any number.
vectors = st.tuples(st.integers(1, 2**14))
matrices = st.tuples(st.sampled_from([1, 2, 3, 64, 4096, 11008, 128256]), st.sampled_from([128, 1024, 4096, 8192]))
experts = st.tuples(st.integers(1, 8), st.sampled_from([512, 4096]), st.sampled_from([1024, 14336]))
models = st.lists(st.builds(Block, st.one_of(vectors, matrices, experts), st.sampled_from([4, 10, 16])), min_size=1)


def shares_of(found: list[Block], num: int) -> list[list[list[Box]]]:
    return [share_out(found, num, share) for share in range(num)]


def nbytes_of(found: list[Block], share: list[list[Box]]) -> int:
    return sum(box.numel * block.item_nbytes for block, boxes in zip(found, share, strict=True) for box in boxes)


@given(blocks, num_shares)
def test_shares_are_disjoint_and_make_up_everything(found: list[Block], num: int) -> None:
    shares = shares_of(found, num)
    for index, block in enumerate(found):
        boxes = [box for share in shares for box in share[index]]
        assert all(box.is_inside(block.lengths) for box in boxes)
        assert sum(box.numel for box in boxes) == block.numel
        assert missing_boxes(block.lengths, boxes) == []
        assert boxes  # also what has no items is stored, by one


def check_even(found: list[Block], num: int) -> None:
    total = sum(block.numel * block.item_nbytes for block in found)
    item = max(block.item_nbytes for block in found)
    for share in shares_of(found, num):
        assert abs(nbytes_of(found, share) - total / num) <= max(0.02 * total / num, PAGE) + item


@given(models, num_shares)
@example([Block((2, 2**30), 4)], 7)  # one row is more than a share
@example([Block((128256, 8192), 10), *[Block((4096,), 10)] * 64], 8)
def test_share_is_at_most_a_fiftieth_or_a_page_from_the_mean(found: list[Block], num: int) -> None:
    check_even(found, num)


@given(st.lists(st.integers(1, 2**34).map(lambda numel: Block((numel,), 2)), min_size=1, max_size=60), num_shares)
def test_share_of_any_sizes_is_at_most_a_fiftieth_or_a_page_from_the_mean(found: list[Block], num: int) -> None:
    check_even(found, num)


def llama(hidden: int, inner: int, keys: int, num_layers: int) -> list[Block]:
    """Untied tables of 128256 rows; bfloat16 parameters with float32 masters and two moments."""
    wide = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer = [*wide, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    table = (128256, hidden)
    return [Block(shape, 14) for shape in [table, *layer * num_layers, (hidden,), table]]


def gpt(hidden: int, num_layers: int) -> list[Block]:
    wide = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    layer = [*wide, (3 * hidden,), (4 * hidden,), (hidden,), (hidden,)]
    return [Block(shape, 12) for shape in [(50257, hidden), (1024, hidden), *layer * num_layers, (hidden,)]]


@pytest.mark.parametrize("num", [2, 4, 8])
@pytest.mark.parametrize(
    "found",
    [llama(4096, 14336, 1024, 32), llama(2048, 8192, 512, 16), gpt(768, 12), [Block((8, 14336, 4096), 10)] * 6],
    ids=["llama-8b", "llama-1b", "gpt2", "experts"],
)
def test_share_of_a_real_model_is_even(found: list[Block], num: int) -> None:
    check_even(found, num)


@given(models, num_shares)
def test_shares_divide_at_most_one_block_for_each_cut(found: list[Block], num: int) -> None:
    shares = shares_of(found, num)
    divided = [i for i in range(len(found)) if sum(bool(share[i]) for share in shares) > 1]
    assert len(divided) <= num - 1
    order = [i for share in shares for i, boxes in enumerate(share) if boxes]
    assert all(a <= b for a, b in pairwise(order))  # neighbours stay together


@given(models, num_shares)
def test_part_of_a_block_with_small_rows_is_one_box_of_whole_rows(found: list[Block], num: int) -> None:
    total = sum(block.numel * block.item_nbytes for block in found)
    for share in shares_of(found, num):
        for block, boxes in zip(found, share, strict=True):
            row = math.prod(block.lengths[1:])
            if row * block.item_nbytes <= 0.02 * total / num - 1:
                assert len(boxes) <= 1
                assert all(box.lengths[1:] == block.lengths[1:] for box in boxes)


def test_tensor_of_two_huge_rows_is_divided_within_its_rows() -> None:
    assert shares_of([Block((2, 3 * 2**20), 4)], 3) == [
        [[Box((0, 0), (1, 2 * 2**20))]],
        [[Box((0, 2 * 2**20), (1, 2**20)), Box((1, 0), (1, 2**20))]],
        [[Box((1, 2**20), (1, 2 * 2**20))]],
    ]


def test_leading_dimensions_of_one_item_are_divided_in_the_next() -> None:
    boxes = [share[0] for share in shares_of([Block((1, 4096, 512), 4)], 2)]
    assert boxes == [[Box((0, 0, 0), (1, 2048, 512))], [Box((0, 2048, 0), (1, 2048, 512))]]


def by_node(num_nodes: int, per_node: int) -> list[list[int]]:
    return [[node * per_node + at for at in range(per_node)] for node in range(num_nodes)]


@given(blocks, st.integers(1, 6), st.integers(1, 5))
def test_each_node_has_everything_once_and_the_job_once_as_shares(found: list[Block], num: int, per_node: int) -> None:
    nodes = by_node(num, per_node)
    shares = []
    for node in nodes:
        here = []
        for rank in node:
            place = find_place(nodes, rank)
            share = share_out(found, place.num_shares, place.share)
            before = share_out(found, place.num_shares, place.begin, place.share - place.begin)
            after = share_out(found, place.num_shares, place.share + 1, place.end - place.share - 1)
            here += [share, before, after]
            shares.append(share)
        assert_everything_once(found, here)
    assert_everything_once(found, shares)


def assert_everything_once(found: list[Block], parts: list[list[list[Box]]]) -> None:
    for index, block in enumerate(found):
        boxes = [box for part in parts for box in part[index]]
        assert sum(box.numel for box in boxes) == block.numel
        assert missing_boxes(block.lengths, boxes) == []
        assert boxes


@given(models, st.integers(1, 32), st.integers(1, 8))
@example(llama(4096, 14336, 1024, 32), 128, 8)
def test_share_of_the_job_is_at_most_a_fiftieth_or_a_page_from_the_mean(
    found: list[Block], num: int, per_node: int
) -> None:
    assert {find_place(by_node(num, per_node), rank).share for rank in range(num * per_node)} == set(
        range(num * per_node)
    )
    check_even(found, num * per_node)
