from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError
from ktrain.replicate.placement import kept_for, ring

NODES = st.lists(st.text("ab0123-", min_size=1, max_size=6), unique=True, min_size=1, max_size=12)


@given(NODES, st.integers(0, 4))
def test_ring_any_nodes_keepers_are_distinct_and_never_the_owner(nodes: list[str], copies: int) -> None:
    placement = ring(nodes, copies)
    assert set(placement) == set(nodes)
    for owner, keepers in placement.items():
        assert len(set(keepers)) == len(keepers) == min(copies, len(nodes) - 1)
        assert owner not in keepers
        assert set(keepers) <= set(nodes)


@given(NODES, st.integers(0, 4))
def test_ring_any_nodes_load_is_balanced(nodes: list[str], copies: int) -> None:
    placement = ring(nodes, copies)
    assert {len(kept_for(placement, node)) for node in nodes} == {min(copies, len(nodes) - 1)}


@given(NODES, st.integers(0, 4), st.randoms(use_true_random=False))
def test_ring_other_order_of_names_gives_the_same_placement(nodes: list[str], copies: int, random) -> None:
    shuffled = list(nodes)
    random.shuffle(shuffled)
    assert ring(shuffled, copies) == ring(nodes, copies)


def test_ring_one_node_has_no_keepers() -> None:
    assert ring(["node-0"]) == {"node-0": ()}


def test_ring_ten_nodes_follow_their_numbers() -> None:
    placement = ring([f"node-{index}" for index in range(11)])
    assert placement["node-9"] == ("node-10",)
    assert placement["node-10"] == ("node-0",)


def test_ring_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        ring(["a", "a"])


def test_ring_negative_copies_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        ring(["a", "b"], copies=-1)
