from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base import contract, settings
from ktrain.base.settings import Timeouts
from ktrain.errors import ConfigError


@given(st.floats(0.001, 1e6))
def test_timeouts_any_patience_keeps_the_order(patience_s: float) -> None:
    t = Timeouts(patience_s)
    assert 0 < t.beat_s < t.call_s <= t.lease_s
    assert t.step_s <= t.start_s and t.call_s < t.restore_s and t.storage_s < t.drain_s


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_timeouts_impossible_patience_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_PATIENCE, text)
    with pytest.raises(ConfigError, match=contract.ENV_PATIENCE):
        settings.timeouts()


def test_worker_settings_torchrun_environment_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KTRAIN_RUN", "KTRAIN_EPOCH", "KTRAIN_AGENT"):
        monkeypatch.delenv(name, raising=False)
    values = {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "GROUP_RANK": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    found = settings.worker_settings()
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size, found.node_index) == (5, 1, 8, 4, 1)
    assert found.epoch is None and found.agent is None


def test_worker_settings_rank_that_is_no_number_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK"):
        settings.worker_settings()


def test_volume_root_named_by_the_user_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(contract.ENV_VOLUME, str(tmp_path))
    assert settings.volume_root() == tmp_path


def test_environment_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_RUN, "")
    assert settings.env(contract.ENV_RUN, "none") == "none"


@pytest.mark.parametrize(("text", "expected"), [("", None), ("200e6", 200e6), ("1", 1.0)])
def test_drain_rate_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: float | None
) -> None:
    monkeypatch.setenv(contract.ENV_DRAIN_RATE, text)
    assert settings.drain_bytes_per_s() == expected


@pytest.mark.parametrize("text", ["0", "-5", "inf", "nan", "fast", "10MB"])
def test_drain_rate_that_is_none_is_refused_with_the_unit(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(contract.ENV_DRAIN_RATE, text)
    with pytest.raises(ConfigError, match="bytes per second"):
        settings.drain_bytes_per_s()
