"""Who runs which ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def assign_ranks(
    nodes: Sequence[str],
    workers_per_node: int,
    holdings: Mapping[str, Mapping[int, int]],
    *,
    num_blocks: int | None = None,
    last: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Gives every contiguous block of ranks to a node so that most snapshots are read from the node's own volume.

    `holdings` is node -> rank -> newest step held; only copies of a rank's newest held step count. Ties keep
    a node's block of the `last` attempt, before that block i at node i, so that an undisturbed job looks the same after
    every restart. With fewer blocks than nodes
    (default: as many) the nodes that hold least of them get none, and are not in the answer.
    """
    newest: dict[int, int] = {}
    for held in holdings.values():
        for rank, step in held.items():
            newest[rank] = max(step, newest.get(rank, -1))
    count = len(nodes) if num_blocks is None else num_blocks
    blocks = [tuple(range(index * workers_per_node, (index + 1) * workers_per_node)) for index in range(count)]

    def is_home(block_index: int, node_index: int) -> bool:
        if last and nodes[node_index] in last:
            return tuple(last[nodes[node_index]]) == blocks[block_index]
        return not last and node_index == block_index

    def gain(block_index: int, node_index: int) -> int:
        held = holdings.get(nodes[node_index], {})
        hits = sum(1 for rank in blocks[block_index] if rank in held and held[rank] == newest[rank])
        return hits * (count + 1) + (1 if is_home(block_index, node_index) else 0)

    chosen = _best_assignment([[gain(block, node) for node in range(len(nodes))] for block in range(count)])
    block_of = {node: block for block, node in enumerate(chosen)}
    return {nodes[index]: blocks[block_of[index]] for index in sorted(block_of)}


def _best_assignment(gains: Sequence[Sequence[int]]) -> list[int]:
    """Column per row with the greatest total gain (Hungarian method with potentials, Kuhn 1955; O(rows^2 columns)).

    There are at least as many columns as rows.
    """
    num_rows, num_columns = len(gains), len(gains[0])
    row_price = [0] * (num_rows + 1)
    column_price = [0] * (num_columns + 1)
    row_of = [0] * (num_columns + 1)  # column -> row, both from 1; column 0 holds the row being placed
    for row in range(1, num_rows + 1):
        row_of[0] = row
        column = 0
        slack = [10**12] * (num_columns + 1)
        previous = [0] * (num_columns + 1)
        used = [False] * (num_columns + 1)
        while row_of[column] != 0:
            used[column] = True
            current, delta, following = row_of[column], 10**12, 0
            for other in range(1, num_columns + 1):
                if used[other]:
                    continue
                reduced = -gains[current - 1][other - 1] - row_price[current] - column_price[other]
                if reduced < slack[other]:
                    slack[other], previous[other] = reduced, column
                if slack[other] < delta:
                    delta, following = slack[other], other
            for other in range(num_columns + 1):
                if used[other]:
                    row_price[row_of[other]] += delta
                    column_price[other] -= delta
                else:
                    slack[other] -= delta
            column = following
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    columns = [0] * num_rows
    for column in range(1, num_columns + 1):
        if row_of[column]:
            columns[row_of[column] - 1] = column - 1
    return columns
