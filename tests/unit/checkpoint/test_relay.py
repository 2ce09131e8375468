"""The bounds of what keeps events on their way, and what is said where they are met."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.events import Event, FileSink, make, parse_lines
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import intake, relay
from ktrain.checkpoint.intake import Intake, Written
from ktrain.checkpoint.log import FileLog, ObjectLog
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.pulse import Pulse
from ktrain.checkpoint.relay import Inbox, Outbox, Relay, newest_numbers
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault

NO_FAULTS = FaultPoints([], epoch=1)
NOBODY = {"events_taken": 0, "events_heard": 0, "events_logged": 0}


def pulse_of(events: list[dict[str, Any]], *, begin: int = 0, logged: int = 0, epoch: int = 1) -> dict[str, Any]:
    about = {"rank": 0, "epoch": epoch, "instance": "abc"}
    return {**about, "events": events, "events_from": begin, "events_logged": logged}


def words(count: int) -> list[dict[str, Any]]:
    return [make("log", 1, step=step).to_json() for step in range(count)]


def steps(message: dict[str, Any]) -> list[int]:
    return [value["step"] for value in message["events"] if value["kind"] == "log"]


def test_outbox_keeps_until_logged_and_sends_again_to_a_receiver_that_is_new() -> None:
    box: Outbox[int] = Outbox()
    for number in range(6):
        box.add(number)
    assert box.settle(taken=4, logged=2) == ([0, 1, 2, 3], [0, 1])
    assert box.batch(9) == [4, 5]
    assert box.settle(taken=0, logged=0) == ([], [])  # it knows nothing
    assert box.batch(3) == [2, 3, 4] and box.num_taken == 2


def test_outbox_over_its_bound_loses_the_newest_and_counts_them_once_there_is_room() -> None:
    box: Outbox[int] = Outbox(limit=2)
    assert [box.add(number) for number in range(5)] == [True, True, False, False, False]
    assert box.take_lost() == 0, "there is no room to say it"
    box.settle(taken=2, logged=1)
    assert box.take_lost() == 3 and box.take_lost() == 0
    box.add(7)
    assert box.batch(9) == [7] and box.num_said == 3


def test_inbox_takes_nothing_beyond_a_gap_and_nothing_twice() -> None:
    inbox = Inbox()
    assert inbox.fresh(pulse_of(words(2), begin=5), room=9) == []
    assert [number for number, _ in inbox.fresh(pulse_of(words(3)), room=2)] == [0, 1]
    assert [number for number, _ in inbox.fresh(pulse_of(words(4)), room=9)] == [2, 3]
    assert [number for number, _ in inbox.fresh(pulse_of(words(2), begin=9, logged=9), room=9)] == [9, 10]


def test_pulse_says_how_many_events_it_lost() -> None:
    class Keeper:
        said: list[dict[str, Any]] = []
        answer = dict(NOBODY)

        def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
            self.said += params["events"]
            return {"committed": {}, **self.answer}

    keeper = Keeper()
    pulse = Pulse(keeper, rank=3, epoch=1, policies=Policies(), timeouts=Timeouts(), clock=SYSTEM_CLOCK)
    pulse._outbox = Outbox(limit=2)
    for step in range(5):
        pulse.emit("log", step=step)
    assert pulse.log.num_said == 2
    pulse._beat(news=True)
    keeper.answer = {"events_taken": 2, "events_heard": 2, "events_logged": 2}
    pulse._beat(news=True)
    pulse._beat(news=True)
    assert "rank 3: 3 of its events were lost" in keeper.said[-1]["message"] and pulse.log.num_said == 3


def test_relay_leaves_what_it_has_no_room_for_with_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_MOST_OF_WORKERS", 3)
    node = Relay("node-0", FakeClock())
    assert node.take(pulse_of(words(5)))["events_taken"] == 3
    node.emit("notice", 1, message="still heard")
    message = node.message()
    assert steps(message) == [0, 1, 2] and message["events"][3]["kind"] == "notice"
    node.settle({"events_taken": 4, "events_logged": 2})
    answer = node.take(pulse_of(words(5)[3:], begin=3))
    assert answer == {"events_taken": 4, "events_heard": 3, "events_logged": 2}


def test_relay_keeps_the_events_of_a_worker_of_an_older_attempt() -> None:
    node = Relay("node-0", FakeClock())
    node.take(pulse_of(words(1)))
    node.begin(2)
    node.take(pulse_of(words(2)))  # it was stopped, and does not know; what was taken before comes again
    origins = [tuple(value["origin"]) for value in node.message()["events"]]
    assert origins == [("rank-0/1/abc", 0), ("rank-0/1/abc", 0), ("rank-0/1/abc", 1)]


def test_intake_logs_each_once_and_counts_what_is_written(tmp_path: Path) -> None:
    said = [make("log", 1, step=step).with_origin("rank-0/1/abc", step) for step in range(4)]
    log = FileLog(tmp_path / "events.jsonl")
    first, written = Intake(log), Written()
    assert first.take(said[:2], NO_FAULTS) == said[:2] and first.take(said[:3], NO_FAULTS) == said[2:3]
    first.note(written, 5)
    assert first.num_written(written) == 5
    log.close()
    found = parse_lines((tmp_path / "events.jsonl").read_bytes().splitlines())
    assert found == said[:3]
    with closing(FileLog(tmp_path / "events.jsonl")) as log:
        assert Intake(log, known=newest_numbers(found)).take(said, NO_FAULTS) == said[3:]


def test_intake_takes_no_more_while_the_file_is_full_and_confirms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_MOST_WAITING", 3)
    with closing(FileLog(Path("/dev/full"))) as log:  # every write gives ENOSPC
        head, written = Intake(log), Written()
        head.take([make("log", 1, step=step) for step in range(3)], NO_FAULTS)
        head.note(written, 3)
        assert head.room == 0 and head.num_written(written) == 0


def test_file_sink_that_could_not_write_tries_again_when_asked(tmp_path: Path) -> None:
    sink = FileSink(Path("/dev/full"))
    sink.emit(make("log", 1, step=1))
    assert sink.write_waiting() == 1
    sink._file.close()
    sink._file = open(tmp_path / "events.jsonl", "a+b", buffering=0)  # noqa: SIM115 -- closed by the sink
    assert sink.write_waiting() == 0
    sink.close()
    assert len((tmp_path / "events.jsonl").read_bytes().splitlines()) == 1


def test_object_log_counts_what_waits_until_the_store_has_it_and_writes_it_in_order() -> None:
    bucket, clock = FakeBucket(), FakeClock()
    tier = FaultyTier(bucket, TierFault("write", Fault.UNAVAILABLE), clock=clock)
    log = ObjectLog(tier, timeouts=Timeouts(), clock=SYSTEM_CLOCK)
    log._closed.set()  # its thread writes nothing of itself
    log._thread.join()
    for step in range(2):
        log.emit(make("log", 1, step=step))
    log.flush()
    log.emit(make("log", 1, step=2))
    assert (log.num_waiting(), log.num_emitted) == (3, 3)
    tier.heal()
    log.flush()
    assert log.num_waiting() == 0
    lines = [line for _, data in sorted(bucket.objects.items()) for line in data.splitlines()]
    assert [event.fields["step"] for event in parse_lines(lines)] == [0, 1, 2]


def test_event_with_a_foreign_origin_has_none() -> None:
    value = make("log", 1, step=1).to_json()
    assert Event.from_json({**value, "origin": "me"}).origin is None
    assert Event.from_json({**value, "origin": ["me", 3]}).origin == ("me", 3)
