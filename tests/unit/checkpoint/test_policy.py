from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktrain.checkpoint.checkpointer import Checkpointer
from ktrain.checkpoint.policy import Capture, Every, Keep, Policies, as_capture, as_keep
from ktrain.checkpoint.retention import AnyOf, Best, Latest
from ktrain.errors import ConfigError


@pytest.mark.parametrize("values", [{"memory": 0}, {"memory": -3}, {"bucket": -1}])
def test_every_impossible_is_refused_with_the_numbers(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected memory >= 1, bucket >= 0 and disk >= 0"):
        Every(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bucket": 0}, "Latest: expected a number of 1 or more, found 0 .of the bucket"),
        ({"disk": 0}, "Latest: expected a number of 1 or more, found 0 .of the disk"),
        ({"disk": "newest"}, "'newest': expected N, latest:N.* .of the disk"),
        ({"memory": 2}, "memory: expected a number of slots of at least 3, found 2"),
        ({"kept": 1}, "kept: expected a number of slots of at least 2, found 1"),
        ({"memory": Latest(4)}, "memory: expected a number of slots .*no policy"),
        ({"kept": "latest:4"}, "kept: expected a number of slots .*no policy"),
    ],
)
def test_keep_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Keep(**values)


def test_policies_cross_the_channel_unchanged() -> None:
    policies = Policies(Every(7, 21), as_keep(5))
    crossed: dict[str, Any] = policies.to_json()
    assert Policies.from_json(crossed) == policies


@pytest.mark.parametrize(
    "keep", [5, Latest(5), AnyOf(Latest(2), Best(1, "v", "max")), "latest:3", Keep(memory=4, disk=Latest(3))]
)
def test_keep_of_any_form_crosses_the_channel_unchanged(keep: Any) -> None:
    policies = Policies(keep=as_keep(keep))
    assert Policies.from_json(json.loads(json.dumps(policies.to_json()))) == policies


def test_keep_number_means_the_latest_in_the_bucket() -> None:
    assert as_keep(4).in_bucket == Latest(4)


def test_keep_of_neither_number_nor_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a number of 1 or more, found None"):
        as_keep(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["hidden", Capture.HIDDEN])
def test_capture_is_named_by_its_value(value: str | Capture) -> None:
    assert as_capture(value) is Capture.HIDDEN
    assert as_capture("at_once") is Capture.AT_ONCE


def test_checkpointer_with_an_unknown_capture_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'hidden', 'at_once', found 'later'"):
        Checkpointer(tmp_path / "run", state={}, capture="later")
    assert list(tmp_path.iterdir()) == []
