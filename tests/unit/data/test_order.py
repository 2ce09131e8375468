from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.data.order import SampleOrder, Shuffle, biject, permutation
from ktrain.errors import ConfigError

KEY = hashlib.sha256(b"test").digest()


@given(
    seed=st.integers(0, 2**40),
    length=st.integers(1, 200),
    batch=st.integers(1, 300),
    epochs=st.integers(1, 3),
)
def test_order_over_epochs_uses_every_sample_exactly_once_each(seed: int, length: int, batch: int, epochs: int) -> None:
    order = SampleOrder(seed, length, batch)
    num_steps = -(-length * epochs // batch)
    stream = np.concatenate([order.indices(step) for step in range(num_steps)])
    for epoch in range(epochs):
        used = stream[epoch * length : (epoch + 1) * length]
        assert sorted(used.tolist()) == list(range(length))


@given(length=st.integers(1, 5000), salt=st.integers(0, 2**32))
def test_bijection_any_length_is_a_permutation(length: int, salt: int) -> None:
    key = hashlib.sha256(str(salt).encode()).digest()
    found = biject(np.arange(length), length, key)
    assert sorted(found.tolist()) == list(range(length))


def test_bijection_part_of_range_equals_part_of_whole() -> None:
    whole = biject(np.arange(1000), 1000, KEY)
    assert biject(np.arange(990, 1000), 1000, KEY).tolist() == whole[990:].tolist()


@pytest.mark.parametrize(
    "shuffled", [permutation(4096, KEY), biject(np.arange(4096), 4096, KEY)], ids=["table", "feistel"]
)
def test_shuffle_neighbours_are_spread_out(shuffled: np.ndarray) -> None:
    # A uniform permutation of n ids has a mean step of n / 3 and about one fixed point.
    step = np.abs(np.diff(shuffled.astype(np.int64))).mean()
    assert 4096 / 3 * 0.9 < step < 4096 / 3 * 1.1
    assert (shuffled == np.arange(4096)).sum() < 8


def test_order_of_another_epoch_or_seed_differs() -> None:
    order = SampleOrder(seed=1, length=100, global_batch=100)
    first = order.indices(0).tolist()
    assert first != order.indices(1).tolist()
    assert first != SampleOrder(seed=2, length=100, global_batch=100).indices(0).tolist()


def test_order_stored_by_older_versions_is_the_same_for_ever() -> None:
    # Golden: another result would make every run that exists repeat and skip samples.
    assert SampleOrder(17, 10, 4).indices(0).tolist() == GOLDEN_TABLE
    assert biject(np.arange(8), 1000, KEY).tolist() == GOLDEN_FEISTEL


def test_shuffle_long_data_needs_no_table() -> None:
    order = SampleOrder(seed=0, length=3_000_000_000, global_batch=64)
    assert order.shuffle is Shuffle.BIJECTION
    found = order.indices(40_000_000)
    assert len(set(found.tolist())) == 64
    assert found.max() > 2**31 and found.min() >= 0


def test_order_state_given_back_is_the_step() -> None:
    order = SampleOrder(3, 50, 8)
    state = order.state(6)
    assert all(type(value) is int for value in state.values())
    assert order.step_of(state) == 6


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", SampleOrder(4, 50, 8)),
        ("length", SampleOrder(3, 51, 8)),
        ("global_batch", SampleOrder(3, 50, 4)),
    ],
)
def test_order_state_of_another_order_is_refused_by_name(name: str, other: SampleOrder) -> None:
    with pytest.raises(ConfigError, match=f"{name}: "):
        SampleOrder(3, 50, 8).step_of(other.state(6))


@pytest.mark.parametrize(("length", "batch"), [(0, 1), (1, 0)])
def test_order_without_samples_or_batch_is_refused(length: int, batch: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 sample"):
        SampleOrder(0, length, batch)


def test_order_module_imports_no_torch() -> None:
    program = "import sys, ktrain.data.order, ktrain.data.batch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


GOLDEN_TABLE = [0, 8, 2, 7]
GOLDEN_FEISTEL = [5, 380, 432, 656, 477, 543, 792, 514]
