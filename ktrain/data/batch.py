"""How a global batch is cut: `global batch = accumulation x world size x micro-batch`.

Sample j of the batch belongs to accumulation pass `j // (world_size * micro_batch)`, and within the pass to
rank `j % (world_size * micro_batch) // micro_batch`. Only the cut depends on the layout, never which
samples are in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktrain.data.order import Indices
from ktrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The cut of one global batch over ranks and passes; make it with `lay_out_batch`."""

    world_size: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro_batch * self.accumulation

    def parts(self, indices: Indices, rank: int) -> list[Indices]:
        """This rank's micro-batches, in the order of accumulation; `indices` is the global batch."""
        cut = indices.reshape(self.accumulation, self.world_size, self.micro_batch)
        return list(cut[:, rank])


def lay_out_batch(global_batch: int, *, world_size: int, micro_batch: int | None = None) -> BatchLayout:
    """The layout of a global batch; without `micro_batch` each rank takes its share in one pass.

    Raises:
        ConfigError: the batch does not divide; the message names the nearest sizes that do.
    """
    for name, value in (
        ("global_batch", global_batch),
        ("world_size", world_size),
        ("micro_batch", micro_batch),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"batch layout: expected {name} >= 1, found {value}")
    per_pass = world_size * (micro_batch or 1)
    if global_batch % per_pass:
        raise ConfigError(_refusal(global_batch, world_size, micro_batch))
    if micro_batch is None:
        return BatchLayout(world_size, global_batch // world_size, 1)
    return BatchLayout(world_size, micro_batch, global_batch // per_pass)


def _refusal(global_batch: int, world_size: int, micro_batch: int | None) -> str:
    per_pass = world_size * (micro_batch or 1)
    below = global_batch // per_pass * per_pass
    batches = _either(*(value for value in (below, below + per_pass) if value > 0))
    text = f"batch layout: a global batch of {global_batch} samples does not divide into {world_size} ranks"
    if micro_batch is None:
        worlds = _nearest(global_batch, world_size)
        return f"{text}; world sizes that fit: {worlds}; global batches that fit: {batches}"
    text += f" with micro-batches of {micro_batch}; global batches that fit: {batches}"
    if global_batch % micro_batch == 0:
        text += f"; world sizes that fit: {_nearest(global_batch // micro_batch, world_size)}"
    if global_batch % world_size == 0:
        text += f"; micro-batches that fit: {_nearest(global_batch // world_size, micro_batch)}"
    return text


def _nearest(total: int, wanted: int) -> str:
    """The divisors of `total` just below and just above `wanted`, which divides it not."""
    below = next((value for value in range(min(wanted, total), 0, -1) if total % value == 0), None)
    above = next((value for value in range(wanted, total + 1) if total % value == 0), None)
    return _either(*(value for value in (below, above) if value is not None))


def _either(*values: int) -> str:
    return " or ".join(str(value) for value in dict.fromkeys(values))


def share_out(length: int, *, world_size: int, rank: int, micro_batch: int) -> list[range]:
    """This rank's batches in one pass over `length` samples in their own order, each sample exactly once.

    Every rank gets the same number of batches, because a sharded forward pass needs all ranks; the last one
    may be short, or empty where the samples do not suffice.
    """
    per_pass = world_size * micro_batch
    batches = []
    for begin in range(0, length, per_pass):
        first = min(length, begin + rank * micro_batch)
        batches.append(range(first, min(length, first + micro_batch)))
    return batches
