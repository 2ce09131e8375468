from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.checkpoint.holder import Holder
from ktrain.errors import ConflictError, UnavailableError
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock, SteppedClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import TIMEOUTS


def local(path: Path) -> Holder:
    return Holder(FakeBucket(), local_path=path, timeouts=TIMEOUTS)


def test_local_run_held_by_a_living_process_is_refused_naming_it(tmp_path: Path) -> None:
    holder = local(tmp_path)
    try:
        with pytest.raises(ConflictError, match=f"held by process {os.getpid()} on host"):
            local(tmp_path)
    finally:
        holder.close()
    local(tmp_path).close()


def test_local_run_whose_holder_died_is_taken_at_once(tmp_path: Path) -> None:
    (tmp_path / "holder.lock").write_text(json.dumps({"pid": 1, "host": "gone"}))  # left over, no lock on it
    local(tmp_path).close()


def test_local_holder_closed_twice_is_fine(tmp_path: Path) -> None:
    holder = local(tmp_path)
    holder.close()
    holder.close()


def beats(bucket: FakeBucket) -> int:
    return int(json.loads(bucket.objects[contract.HOLDER_FILE])["beat"])


class Rewriting(FakeBucket):
    """A bucket where a living holder rewrites its object between any two reads."""

    def read(self, name: str, **options: object) -> bytes:  # type: ignore[override]
        data = super().read(name, **options)  # type: ignore[arg-type]
        record = json.loads(data)
        self.objects[name] = json.dumps({**record, "beat": record["beat"] + 1}).encode()
        return data


def test_object_that_changes_is_a_living_holder_and_is_named() -> None:
    bucket = Rewriting()
    bucket.objects[contract.HOLDER_FILE] = json.dumps({"pid": 77, "host": "far", "beat": 3}).encode()
    with pytest.raises(ConflictError, match="held by process 77 on host far"):
        Holder(bucket, local_path=None, timeouts=TIMEOUTS, clock=FakeClock())
    assert json.loads(bucket.objects[contract.HOLDER_FILE])["pid"] == 77


@pytest.mark.parametrize("left", [b'{"pid": 77, "host": "far", "beat": 3}', b'{"pid"', b"[]"])
def test_object_that_stays_the_same_for_a_lease_is_taken_over(left: bytes) -> None:
    bucket, clock = FakeBucket(), SteppedClock()
    bucket.objects[contract.HOLDER_FILE] = left
    made: list[Holder] = []
    thread = threading.Thread(
        target=lambda: made.append(Holder(bucket, local_path=None, timeouts=TIMEOUTS, clock=clock))
    )
    thread.start()
    while not made and thread.is_alive():
        clock.wait_for_sleepers(1)
        clock.advance(TIMEOUTS.lease_s / 6)
    thread.join(10.0)
    assert json.loads(bucket.objects[contract.HOLDER_FILE])["pid"] == os.getpid()
    closing = threading.Thread(target=made[0].close)
    closing.start()
    closing.join(10.0)
    assert contract.HOLDER_FILE not in bucket.objects


def test_object_is_rewritten_while_it_is_held_and_through_an_outage() -> None:
    bucket, clock = FakeBucket(), SteppedClock()
    faulty = FaultyTier(bucket, TierFault("write", Fault.UNAVAILABLE, nth=3))
    holder = Holder(faulty, local_path=None, timeouts=TIMEOUTS, clock=clock)
    begun_s = clock.monotonic()
    while beats(bucket) < 4:
        clock.wait_for_sleepers(1)
        clock.advance(TIMEOUTS.lease_s / 6)
    assert clock.monotonic() - begun_s >= 4 * TIMEOUTS.lease_s / 3
    holder.close()


def test_object_that_cannot_be_read_is_no_free_run() -> None:
    faulty = FaultyTier(FakeBucket(), TierFault("read", Fault.UNAVAILABLE))
    with pytest.raises(UnavailableError):
        Holder(faulty, local_path=None, timeouts=TIMEOUTS, clock=FakeClock())
