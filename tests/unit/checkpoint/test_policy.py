from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.checkpoint.policy import Every, Keep, Policies, as_keep, superseded
from ktrain.errors import ConfigError


@pytest.mark.parametrize("values", [{"memory": 0}, {"memory": -3}, {"bucket": -1}])
def test_every_impossible_is_refused_with_the_numbers(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected memory >= 1, bucket >= 0 and disk >= 0"):
        Every(**values)


@pytest.mark.parametrize("values", [{"bucket": 0}, {"memory": 2}, {"kept": 1}, {"disk": 0}])
def test_keep_that_could_lose_the_last_copy_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected bucket >= 1, memory >= 3, kept >= 2 and disk >= 1"):
        Keep(**values)


def test_policies_cross_the_channel_unchanged() -> None:
    policies = Policies(Every(7, 21), as_keep(5))
    crossed: dict[str, Any] = policies.to_json()
    assert Policies.from_json(crossed) == policies


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 3)), unique=True), st.integers(1, 5))
def test_superseded_spares_the_newest(committed: list[tuple[int, int]], keep: int) -> None:
    doomed = superseded(committed, keep)
    staying = set(committed) - set(doomed)
    assert len(staying) == min(keep, len(committed))
    assert all(gone < stays for gone in doomed for stays in staying)
