"""A job that reads its checkpoint from the bucket once and passes it on, and what may come in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from tests.faults.job import NEWEST, Job

EVERYTHING = {0: (0, 4352), 1: (0, 4352)}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.delenv(contract.ENV_DISK, raising=False)
    monkeypatch.setenv(contract.ENV_SPREAD, "always")
    made = Job(tmp_path)
    made.train()
    made.lose_all()
    made.wanted = {0: EVERYTHING, 1: EVERYTHING}
    made.events.clear()
    yield made
    made.close()


def payload_reads(job: Job) -> list[str]:
    return [name for call, name in job.store.calls if call == "read_range" and name.endswith(".safetensors")]


def restored(job: Job) -> dict[str, Any]:
    (fields,) = job.said("restored")
    return fields


def test_restore_of_what_all_want_reads_each_payload_once(job: Job) -> None:
    job.store.calls.clear()
    job.end_processes()
    assert job.restore() == NEWEST  # each worker compares the bytes
    assert len(payload_reads(job)) == 2
    said = restored(job)
    assert said["bucket_bytes"] == 2 * 4352
    assert said["tier"] == "bucket" and set(said["tiers"].values()) == {"bucket"}
    assert said["spread"].startswith("each byte is read from the bucket once: it is set so")
    assert job.committed()["memory"] == NEWEST  # all of it lies in memory again


def test_restore_that_is_not_to_be_spread_reads_in_every_rank(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_SPREAD, "never")
    job.store.calls.clear()
    job.end_processes()
    assert job.restore() == NEWEST
    assert len(payload_reads(job)) == 4
    assert restored(job)["spread"] == "every rank reads for itself: it is set so"


def test_restore_that_weighs_says_what_it_lacks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_SPREAD, "auto")
    job.end_processes()
    assert job.restore() == NEWEST
    assert restored(job)["spread"] == "every rank reads for itself: no drain was measured"
