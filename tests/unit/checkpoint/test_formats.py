"""The version of a run: what it began with, what an upgrade does, and what a ktrain that does not know it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ktrain.base.settings import Timeouts
from ktrain.checkpoint import formats
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commit import commit_drain
from ktrain.checkpoint.dcp_attempt import Save, Word
from ktrain.checkpoint.dcp_payload import Payload, Written
from ktrain.errors import ConfigError, CorruptionError, KtrainError, UnavailableError
from ktrain.format import document
from ktrain.format.manifest import Manifest
from ktrain.format.payload import lay_out
from ktrain.snapshot.arena import NodeVolume
from ktrain.state.plan import plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from ktrain.testing.tier_url import publish, withdraw
from tests.unit.checkpoint.builders import QUIET, RUN, identity, upload
from tests.unit.checkpoint.cluster import Cluster

TIMEOUTS = Timeouts(patience_s=8)
NEXT = document.FORMAT + 1
BOTH = rf"format {NEXT}, this ktrain reads formats up to {document.FORMAT}"


@pytest.fixture
def store() -> FaultyTier:
    return FaultyTier(FakeBucket(), clock=FakeClock())


@pytest.fixture
def url(store: FaultyTier) -> Iterator[str]:
    made = publish(store)
    yield made
    withdraw(made)


def open_run(url: str) -> RunCatalog:
    return RunCatalog.open(url, timeouts=TIMEOUTS)


def raise_to(catalog: RunCatalog, version: int) -> None:
    formats.upgrade(catalog.tier, catalog.format, version, timeouts=TIMEOUTS, clock=FakeClock())


def test_run_that_is_made_now_begins_with_the_newest_version(url: str) -> None:
    catalog = open_run(url)
    assert catalog.format == document.FORMAT
    assert json.loads(catalog.tier.read("run.json", deadline=catalog.transfer_deadline(0)))["format"] == document.FORMAT


def test_run_begun_by_a_newer_ktrain_is_refused_with_both_named(url: str, store: FaultyTier) -> None:
    data = json.dumps({"format": NEXT, "id": RUN}).encode()
    store.write("run.json", data, deadline=open_run(url).transfer_deadline(0))
    with pytest.raises(ConfigError, match=BOTH):
        open_run(url)


def test_run_upgraded_by_a_newer_ktrain_is_refused_with_both_named(url: str) -> None:
    raise_to(open_run(url), NEXT)
    with pytest.raises(ConfigError, match=BOTH):
        open_run(url)


def test_upgrade_twice_or_by_two_at_once_is_one(url: str, store: FaultyTier) -> None:
    catalog = open_run(url)
    raise_to(catalog, NEXT)
    before = store.read("format-000002.json", deadline=catalog.transfer_deadline(0))
    raise_to(catalog, NEXT)
    assert store.read("format-000002.json", deadline=catalog.transfer_deadline(0)) == before


def test_run_whose_upgrades_cannot_be_asked_is_not_opened(url: str, store: FaultyTier) -> None:
    open_run(url)
    store.add(TierFault("read", Fault.UNAVAILABLE, name="format-*"))
    with pytest.raises(UnavailableError):
        open_run(url)


def test_run_with_a_version_below_one_is_damaged(url: str, store: FaultyTier) -> None:
    data = json.dumps({"format": 0, "id": RUN}).encode()
    store.write("run.json", data, deadline=open_run(url).transfer_deadline(0))
    with pytest.raises(CorruptionError, match="format 0"):
        open_run(url)


def test_record_is_written_in_the_version_of_the_run() -> None:
    bucket = FakeBucket()
    newer = RunCatalog(bucket, RUN, timeouts=TIMEOUTS, clock=FakeClock(), format=NEXT)
    drain = upload(bucket, identity(10))
    with pytest.raises(KtrainError, match=BOTH):  # it obeys, and has no writer for it
        commit_drain(newer, drain, clock=FakeClock(), faults=QUIET)
    assert newer.listing().commits == ()


def test_manifest_of_a_dcp_save_is_written_in_the_version_of_the_run() -> None:
    newer = RunCatalog(FakeBucket(), RUN, timeouts=TIMEOUTS, clock=FakeClock(), format=NEXT)
    word, layout = Word("memory://run", RUN, epoch=1, nonce="0a", world_size=1), lay_out([])
    written = Written(word, Save(10, 1), Payload(layout, memoryview(layout.header), (0,), []), keep_in_memory=0)
    with pytest.raises(KtrainError, match=BOTH):
        written.write_manifest(newer, {})
    assert newer.tier.list("", deadline=newer.transfer_deadline(0)) == []


def test_payload_of_a_save_is_laid_out_in_the_version_of_the_run() -> None:
    state = TrainState({"model": torch.nn.Linear(2, 2)})
    first = plan_save(state, Topology(0, 1))
    assert plan_save(state, Topology(0, 1), version=document.FORMAT).layout is first.layout
    with pytest.raises(KtrainError, match=BOTH):  # it obeys, though it has a plan at hand, and has no form for it
        plan_save(state, Topology(0, 1), version=NEXT)


def test_ranks_are_told_the_version_of_the_run(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.restore()
    cluster.turn(2)
    assert [worker.answer["format"] for worker in cluster.workers] == [document.FORMAT] * 2
    assert Manifest(identity(1), 0, "0" * 16, 8, 8, (), (), {}, {}).format == document.FORMAT
    cluster.close()


def test_volume_laid_out_by_a_newer_ktrain_is_refused_with_both_named(tmp_path: Path) -> None:
    NodeVolume(tmp_path, node="node-0", run=RUN).close()
    path = tmp_path / RUN / "node-0" / "volume.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    with pytest.raises(ConfigError, match="format 9, this ktrain reads formats up to 1"):
        NodeVolume(tmp_path, node="node-0", run=RUN)
