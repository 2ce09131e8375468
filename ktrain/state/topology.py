"""Where this process stands among the ranks."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch.distributed as dist

from ktrain.base import settings
from ktrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """A rank, its world and its node. Ranks of a node are consecutive, as torch's launchers number them.

    `node_sizes` are the numbers of ranks of all nodes, in the order of their ranks; empty where they are not known, and
    then a node stores whatever its ranks hold by itself (ADR 0015).
    """

    rank: int
    world_size: int
    local_rank: int = 0
    local_world_size: int = 1
    node_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or not 0 <= self.local_rank < self.local_world_size:
            raise ConfigError(
                f"topology: rank {self.rank} of {self.world_size}, local rank {self.local_rank} of "
                f"{self.local_world_size} is not possible; "
                "check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )

    @classmethod
    def current(cls) -> Topology:
        """From the process group where one exists, else from the environment.

        A rank whose node is not known (a launcher that sets no LOCAL_RANK) counts as alone on its node: it
        stores a whole copy of what is replicated then, which costs memory but loses nothing.
        """
        found = settings.worker_settings()
        rank, world_size = found.rank, found.world_size
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        first = rank - found.local_rank
        if first < 0 or first + found.local_world_size > world_size or found.local_rank >= found.local_world_size:
            return cls(rank, world_size)
        return cls(rank, world_size, found.local_rank, found.local_world_size)

    @property
    def node_ranks(self) -> range:
        """All ranks of this rank's node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

    def with_nodes(self, node_sizes: Sequence[int]) -> Topology:
        """The same rank, told of all nodes; of none where this rank's own node is not one of them."""
        first = self.rank - self.local_rank
        starts = dict(zip(accumulate(node_sizes, initial=0), node_sizes, strict=False))
        fits = sum(node_sizes) == self.world_size and starts.get(first) == self.local_world_size
        return replace(self, node_sizes=tuple(node_sizes) if fits else ())

    def by_node(self, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Some ranks, sorted, by node, without nodes that have none; of this node alone where others are not known."""
        if not self.node_sizes:
            here = tuple(rank for rank in ranks if rank in self.node_ranks)
            return (here,) if here else ()
        ends = list(accumulate(self.node_sizes))
        return tuple(tuple(group) for _, group in groupby(ranks, key=lambda rank: bisect_right(ends, rank)))

    @property
    def copy_threads(self) -> int:
        """Threads for this rank's copies: its share of the node's processors, at most 8, where memory's rate ends."""
        return max(1, min(8, len(os.sched_getaffinity(0)) // self.local_world_size))
