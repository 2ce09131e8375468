from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.checkpoint.checkpointer import Checkpointer
from ktrain.checkpoint.policy import Capture, Every, Keep, Policies, as_capture, as_every, as_keep, superseded
from ktrain.errors import ConfigError


@given(st.integers(1, 50), st.integers(1, 500))
def test_every_number_means_its_multiples(every: int, step: int) -> None:
    assert as_every(every).due(step) == (step in range(0, step + 1, every))


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


@pytest.mark.parametrize("value", ["hidden", Capture.HIDDEN])
def test_capture_is_named_by_its_value(value: str | Capture) -> None:
    assert as_capture(value) is Capture.HIDDEN
    assert as_capture("at_once") is Capture.AT_ONCE


def test_checkpointer_with_an_unknown_capture_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'hidden', 'at_once', found 'later'"):
        Checkpointer(tmp_path / "run", state={}, capture="later")
    assert list(tmp_path.iterdir()) == []
