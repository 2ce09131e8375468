"""Copies of DCP saves in the node's memory volume: read where they are proven, never trusted, never needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ktrain.checkpoint.dcp import RunStorageWriter
from ktrain.checkpoint.dcp_attempt import attempt_of
from tests.unit.checkpoint.dcp_runs import load, payload, same, save, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    url = str(tmp_path / "run")
    yield url
    attempt_of(url).close()


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "volume"))
    return tmp_path / "volume"


def save_kept(run: str, step: int) -> None:
    writer = RunStorageWriter(run, keep_in_memory=1)
    dcp.save(state(step), storage_writer=writer, checkpoint_id=f"step-{step}")


def test_load_takes_the_copy_in_memory_where_there_is_one(run: str, volume: Path) -> None:
    save_kept(run, 1)
    payload(run).unlink()  # nothing else has the bytes now

    assert same(load(run), state(1))


def test_load_with_a_bad_copy_in_memory_sets_it_aside_and_reads_the_runs_own(run: str, volume: Path) -> None:
    save_kept(run, 1)
    (slot,) = volume.rglob("slot-*.safetensors")
    data = bytearray(slot.read_bytes())
    data[-1] ^= 1
    slot.write_bytes(data)

    assert same(load(run), state(1))
    assert not list(volume.rglob("slot-*.manifest.json"))
    payload(run).unlink()
    with pytest.raises(CheckpointException, match="there is no such object"):
        load(run)


def test_load_never_takes_a_copy_of_a_save_that_was_not_committed(run: str, volume: Path) -> None:
    class Failing(RunStorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            payload(run).unlink()
            super().finish(metadata, results)

    with pytest.raises(CheckpointException):
        dcp.save(state(9), storage_writer=Failing(run, keep_in_memory=1), checkpoint_id="1")
    assert list(volume.rglob("slot-*.manifest.json"))  # it lies there, under the same step and epoch
    save(run, 1, state(1))

    assert same(load(run), state(1))


def test_save_keeps_the_newest_copies_and_no_more_slots(run: str, volume: Path) -> None:
    for step in (1, 2, 3, 4):
        save_kept(run, step)

    assert len(list(volume.rglob("slot-*.safetensors"))) == 2
    for files in Path(run).glob("checkpoints/step-00000004/*/*.safetensors"):
        files.unlink()
    assert same(load(run), state(4))


def test_save_with_a_volume_that_fails_is_committed_all_the_same(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "file"))

    save_kept(run, 1)

    assert same(load(run), state(1))
    assert "no copy is kept in memory" in caplog.text
