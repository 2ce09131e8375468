"""Who runs which ranks."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from ktrain.run.rendezvous import assign_ranks

NODES = ("node-0", "node-1", "node-2")


def local_hits(assignment: dict[str, tuple[int, ...]], holdings: dict[str, dict[int, int]]) -> int:
    newest: dict[int, int] = {}
    for held in holdings.values():
        for rank, step in held.items():
            newest[rank] = max(newest.get(rank, -1), step)
    return sum(
        1
        for node, ranks in assignment.items()
        for rank in ranks
        if holdings.get(node, {}).get(rank) == newest.get(rank, -2)
    )


def test_assign_ranks_nothing_held_keeps_the_order_of_nodes() -> None:
    assert assign_ranks(NODES, 2, {}) == {"node-0": (0, 1), "node-1": (2, 3), "node-2": (4, 5)}


def test_assign_ranks_node_gets_the_block_it_holds() -> None:
    holdings = {"node-0": {4: 10, 5: 10}, "node-1": {0: 10, 1: 10}, "node-2": {2: 10, 3: 10}}
    assert assign_ranks(NODES, 2, holdings) == {"node-0": (4, 5), "node-1": (0, 1), "node-2": (2, 3)}


def test_assign_ranks_old_copies_do_not_count() -> None:
    holdings = {"node-0": {0: 10}, "node-1": {0: 20}}
    assert assign_ranks(NODES[:2], 1, holdings) == {"node-0": (1,), "node-1": (0,)}


def test_assign_ranks_survivor_with_everything_keeps_its_place() -> None:
    everything = dict.fromkeys(range(6), 10)
    assert assign_ranks(NODES, 2, {"node-1": everything})["node-1"] == (2, 3)


@given(st.dictionaries(st.sampled_from(NODES), st.dictionaries(st.integers(0, 5), st.integers(0, 3))))
def test_assign_ranks_any_holdings_is_the_best_of_all_assignments(holdings: dict[str, dict[int, int]]) -> None:
    found = assign_ranks(NODES, 2, holdings)

    blocks = [(0, 1), (2, 3), (4, 5)]
    assert sorted(found.values()) == blocks
    best = max(local_hits(dict(zip(NODES, order, strict=True)), holdings) for order in permutations(blocks))
    assert local_hits(found, holdings) == best
