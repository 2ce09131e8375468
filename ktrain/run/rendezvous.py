"""Who runs which ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def assign_ranks(
    nodes: Sequence[str], workers_per_node: int, holdings: Mapping[str, Mapping[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Gives every node a contiguous block of ranks so that most snapshots are read from the node's own volume.

    `holdings` is node -> rank -> newest step held; only copies of a rank's newest held step count. Ties keep
    block i at node i, so that an undisturbed job looks the same after every restart.
    """
    newest: dict[int, int] = {}
    for held in holdings.values():
        for rank, step in held.items():
            newest[rank] = max(step, newest.get(rank, -1))
    count = len(nodes)
    blocks = [tuple(range(index * workers_per_node, (index + 1) * workers_per_node)) for index in range(count)]

    def gain(node_index: int, block_index: int) -> int:
        held = holdings.get(nodes[node_index], {})
        hits = sum(1 for rank in blocks[block_index] if rank in held and held[rank] == newest[rank])
        return hits * (count + 1) + (1 if node_index == block_index else 0)

    chosen = _best_assignment([[gain(node, block) for block in range(count)] for node in range(count)])
    return {node: blocks[chosen[index]] for index, node in enumerate(nodes)}


def _best_assignment(gains: Sequence[Sequence[int]]) -> list[int]:
    """Column per row with the greatest total gain (Hungarian method with potentials, Kuhn 1955; O(n^3))."""
    size = len(gains)
    row_price = [0] * (size + 1)
    column_price = [0] * (size + 1)
    row_of = [0] * (size + 1)  # column -> row, both from 1; column 0 holds the row being placed
    for row in range(1, size + 1):
        row_of[0] = row
        column = 0
        slack = [10**12] * (size + 1)
        previous = [0] * (size + 1)
        used = [False] * (size + 1)
        while row_of[column] != 0:
            used[column] = True
            current, delta, following = row_of[column], 10**12, 0
            for other in range(1, size + 1):
                if used[other]:
                    continue
                reduced = -gains[current - 1][other - 1] - row_price[current] - column_price[other]
                if reduced < slack[other]:
                    slack[other], previous[other] = reduced, column
                if slack[other] < delta:
                    delta, following = slack[other], other
            for other in range(size + 1):
                if used[other]:
                    row_price[row_of[other]] += delta
                    column_price[other] -= delta
                else:
                    slack[other] -= delta
            column = following
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    columns = [0] * size
    for column in range(1, size + 1):
        columns[row_of[column] - 1] = column - 1
    return columns
