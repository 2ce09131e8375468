"""What one head leaves for the next: read by its own launch alone, never fatal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.abc.tier import Tier
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.errors import UnavailableError
from ktrain.run.notes import FileNotes, Notes, RunNotes
from ktrain.tier.location import open_tier

TIMEOUTS = Timeouts(30.0)
NOTE = {"heads": 2, "budgets": {"spent": {"crash": 1}}, "stop": None}


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    found = open_tier(str(tmp_path), timeouts=TIMEOUTS)
    yield found
    found.close()


def notes(kind: str, tier: Tier, tmp_path: Path, launch_id: str) -> Notes:
    if kind == "file":
        return FileNotes(tmp_path / "head-state.json", launch_id)
    return RunNotes(tier, launch_id, timeouts=TIMEOUTS)


@pytest.mark.parametrize("kind", ["file", "run"])
def test_notes_are_read_by_the_next_head_of_the_launch_alone(kind: str, tier: Tier, tmp_path: Path) -> None:
    assert notes(kind, tier, tmp_path, "a").read() == {}

    notes(kind, tier, tmp_path, "a").write(NOTE)

    assert notes(kind, tier, tmp_path, "a").read() == {"launch_id": "a", **NOTE}
    assert notes(kind, tier, tmp_path, "b").read() == {}


@pytest.mark.parametrize("data", [b'{"launch_id": "a", "he', b"[]", b"\xff"])
def test_run_notes_torn_count_as_none(data: bytes, tier: Tier, tmp_path: Path) -> None:
    tier.write(contract.HEAD_FILE, data, deadline=Deadline.after(5.0))

    assert notes("run", tier, tmp_path, "a").read() == {}


def test_run_notes_store_that_is_away_ends_no_head(tier: Tier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise UnavailableError("away")

    monkeypatch.setattr(tier, "write", away)

    notes("run", tier, tmp_path, "a").write(NOTE)

    assert notes("run", tier, tmp_path, "a").read() == {}
