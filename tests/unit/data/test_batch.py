from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.data.batch import lay_out_batch, share_out
from ktrain.errors import ConfigError


@given(world=st.integers(1, 9), micro=st.integers(1, 9), passes=st.integers(1, 9))
def test_layout_parts_of_all_ranks_are_the_batch_in_its_order(world: int, micro: int, passes: int) -> None:
    batch = np.arange(world * micro * passes)
    layout = lay_out_batch(len(batch), world_size=world, micro_batch=micro)
    assert layout.accumulation == passes
    cut = [layout.parts(batch, rank) for rank in range(world)]
    rebuilt = np.concatenate([cut[rank][index] for index in range(passes) for rank in range(world)])
    assert rebuilt.tolist() == batch.tolist()


def test_layout_without_micro_batch_is_one_pass() -> None:
    layout = lay_out_batch(12, world_size=4)
    assert (layout.micro_batch, layout.accumulation, layout.global_batch) == (3, 1, 12)


def test_layout_world_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"world sizes that fit: 4 or 6; global batches that fit: 10 or 15"):
        lay_out_batch(12, world_size=5)


def test_layout_micro_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"global batches that fit: 10 or 20;.*micro-batches that fit: 3 or 6"):
        lay_out_batch(12, world_size=2, micro_batch=5)


def test_layout_more_ranks_than_samples_names_a_world_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"world sizes that fit: 12; global batches that fit: 16"):
        lay_out_batch(12, world_size=16)


@pytest.mark.parametrize(("batch", "world", "micro"), [(0, 1, None), (8, 0, None), (8, 1, 0), (-8, 1, None)])
def test_layout_sizes_below_one_are_refused(batch: int, world: int, micro: int | None) -> None:
    with pytest.raises(ConfigError, match=">= 1"):
        lay_out_batch(batch, world_size=world, micro_batch=micro)


@given(length=st.integers(0, 100), world=st.integers(1, 6), micro=st.integers(1, 7))
def test_share_out_any_length_gives_each_sample_once_and_equal_passes(length: int, world: int, micro: int) -> None:
    shares = [share_out(length, world_size=world, rank=rank, micro_batch=micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(index for share in shares for part in share for index in part) == list(range(length))
    assert all(len(part) <= micro for share in shares for part in share)
