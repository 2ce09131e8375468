"""Which samples make up which global batch: a pure function of seed, data length, global batch and step.

The samples of all epochs form one endless stream: epoch 0 in its own shuffled order, then epoch 1 in its
own, and so on. Batch `step` (counted from 0) is the stream's positions `[step * global_batch, (step + 1) *
global_batch)`. A batch may therefore run across the border of two epochs: nothing is dropped, nothing is
padded, and every sample is used exactly once per epoch. World size, rank and micro-batch do not enter, so
the order is the same on any layout.

The shuffles rest on nothing that may change between library versions: SHA-256 for keys, and either the raw
stream of a Philox bit generator (whose stability NumPy promises; that of `Generator.permutation` it does
not) or integer arithmetic of our own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ktrain.errors import ConfigError

Indices = npt.NDArray[np.int64]

# A stored shuffle of more samples costs too much: 200 M random ids took 40 s and 1.6 GB (Nov 2026, 2 cores).
_TABLE_LIMIT = 10_000_000
_NUM_ROUNDS = 8


class Shuffle(IntEnum):
    """How an epoch is permuted; the value is stored, so meanings never change."""

    TABLE = 1  # sample ids sorted by random keys; one table per epoch
    BIJECTION = 2  # a keyed Feistel network: any position on its own, no table


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The order of samples over the whole of training."""

    seed: int
    length: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"samples: expected a data set with at least 1 sample, found {self.length}")
        if self.global_batch < 1:
            raise ConfigError(f"samples: expected a global batch of at least 1 sample, found {self.global_batch}")

    @property
    def shuffle(self) -> Shuffle:
        """The kind of permutation, from the length alone."""
        return Shuffle.TABLE if self.length < _TABLE_LIMIT else Shuffle.BIJECTION

    def epoch(self, step: int) -> int:
        """The epoch of the first sample of batch `step`."""
        return step * self.global_batch // self.length

    def indices(self, step: int) -> Indices:
        """Sample ids of global batch `step` (from 0), shape [global_batch]."""
        assert step >= 0, step
        begin, end = step * self.global_batch, (step + 1) * self.global_batch
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.length)
            count = min(end - begin, self.length - offset)
            parts.append(self._within_epoch(epoch, offset, count))
            begin += count
        return np.concatenate(parts)

    def _within_epoch(self, epoch: int, offset: int, count: int) -> Indices:
        if self.shuffle is Shuffle.TABLE:
            table = _table(self.seed, self.length, epoch)
            return table[offset : offset + count].astype(np.int64)
        return biject(np.arange(offset, offset + count), self.length, _key(self.seed, self.length, epoch))

    def state(self, step: int) -> dict[str, int]:
        """What a checkpoint keeps: integers only. `step` is the number of batches already used."""
        return {
            "seed": self.seed,
            "length": self.length,
            "global_batch": self.global_batch,
            "shuffle": int(self.shuffle),
            "step": step,
        }

    def step_of(self, state: dict[str, Any]) -> int:
        """The number of batches already used, from a stored state.

        Raises:
            ConfigError: the state is of another order; going on would repeat or skip samples.
        """
        mine = self.state(0)
        if set(state) != set(mine):
            raise ConfigError(f"data position: expected the fields {sorted(mine)}, found {sorted(state)}")
        changed = [
            f"{name}: {state[name]} -> {mine[name]}" for name in mine if name != "step" and state[name] != mine[name]
        ]
        if changed:
            raise ConfigError(
                "data position: the run was made with another sample order (" + ", ".join(changed) + "); "
                "restore the old values, or start another run"
            )
        return int(state["step"])


def _key(seed: int, length: int, epoch: int) -> bytes:
    return hashlib.sha256(f"ktrain sample order 1: {seed} {length} {epoch}".encode()).digest()


@lru_cache(maxsize=2)  # a batch across the border needs two epochs; more would only cost memory
def _table(seed: int, length: int, epoch: int) -> npt.NDArray[np.uint32]:
    return permutation(length, _key(seed, length, epoch))


def permutation(length: int, key: bytes) -> npt.NDArray[np.uint32]:
    """All ids below `length` in a random order; `key` has 32 bytes."""
    generator = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8").astype(np.uint64))
    keys = generator.random_raw(length)
    return np.argsort(keys, kind="stable").astype(np.uint32)


def biject(positions: npt.NDArray[Any], length: int, key: bytes) -> Indices:
    """Ids of the given positions under a keyed permutation of `range(length)`; no table, any positions alone.

    A balanced Feistel network over the next even power of two, with cycle walking back into the range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). At most about four rounds of walking
    on average.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    round_keys = np.frombuffer(hashlib.shake_256(key).digest(8 * _NUM_ROUNDS), dtype="<u8").astype(np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= np.uint64(length)
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], half_bits: int, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
