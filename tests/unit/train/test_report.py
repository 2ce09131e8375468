from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ktrain.base.events import Event
from ktrain.train.report import Report


def event(time: float, attempt: int, kind: str, **fields: object) -> Event:
    return Event(kind=kind, fields=fields, time=time, attempt=attempt)


def steps(attempt: int, first: int, last: int, *, at: float, each: float = 1.0) -> list[Event]:
    """Steps first..last; the first ends `each` seconds after `at`."""
    return [
        event(at + each * (index + 1), attempt, "step", step=step, loss=1.0 / step, samples=8)
        for index, step in enumerate(range(first, last + 1))
    ]


def killed_once() -> list[Event]:
    """Ten steps, rank 2 killed at 12.5 s, back from memory at step 8, its first step at 17 s, done at 20."""
    return [
        event(0, 0, "run_started", nodes=2, world_size=4),
        event(1, 1, "attempt_started", world_size=4),
        event(2, 1, "fresh_start", step=0),
        *steps(1, 1, 10, at=2),  # 3 .. 12 s
        event(12.5, 1, "fault_injected", spec="kill:rank=2", step=10),
        event(13, 1, "worker_exit", rank=2, exitcode=-9, reason="signal 9"),
        event(13.5, 1, "failure", cause="crash", rank=2, reason="killed by signal 9", step=10),
        event(14, 1, "attempt_ended", outcome="failed", cause="crash", step=10),
        event(15, 2, "attempt_started", world_size=4),
        event(16, 2, "restored", step=8, tier="memory", nbytes=1000, seconds=0.5, wire_bytes=0),
        *steps(2, 9, 20, at=16),  # 17 .. 28 s
        event(29, 2, "attempt_ended", outcome="succeeded", step=20),
        event(30, 0, "run_ended", outcome="succeeded", exit_code=0, step=20, reason=""),
    ]


def test_report_run_killed_once_has_known_numbers() -> None:
    report = Report.from_events(killed_once())
    first, second = report.attempts
    assert (first.number, first.restored_tier, first.restored_step, first.steps_lost, first.recovery_s) == (
        1,
        None,
        0,
        0,
        None,
    )
    assert (first.last_step, first.num_steps) == (10, 10)
    assert first.ended == "crash of rank 2: killed by signal 9"
    assert (second.restored_tier, second.restored_step, second.steps_lost) == ("memory", 8, 2)
    assert second.recovery_s == pytest.approx(17 - 12.5)
    assert second.ended == "succeeded"
    assert (report.outcome, report.step, report.loss) == ("succeeded", 20, 1 / 20)
    assert (report.num_failures, report.steps_lost, report.wall_s) == (1, 2, 30)
    assert report.useful_share == pytest.approx((8 + 12) / 30)  # steps 9 and 10 of attempt 1 were lost


def test_report_events_in_any_order_is_the_same() -> None:
    assert Report.from_events(reversed(killed_once())) == Report.from_events(killed_once())


def test_report_without_events_is_empty() -> None:
    report = Report.from_events([])
    assert (report.attempts, report.outcome, report.step, report.loss, report.wall_s) == (
        (),
        "running",
        0,
        None,
        0.0,
    )
    assert "running at step 0" in report.to_text()


def test_report_going_back_twice_counts_steps_lost_from_the_line() -> None:
    events = [
        event(0, 1, "fresh_start", step=0),
        *steps(1, 1, 10, at=0),
        event(11, 1, "failure", cause="crash", rank=0, reason="x"),
        event(12, 2, "restored", step=8, tier="memory"),
        *steps(2, 9, 9, at=12),
        event(14, 2, "failure", cause="node-lost", node="node-1", reason="y"),
        event(15, 3, "restored", step=4, tier="bucket"),
        *steps(3, 5, 12, at=15),
    ]
    report = Report.from_events(events)
    assert [row.steps_lost for row in report.attempts] == [0, 2, 5]
    assert report.steps_lost == 7
    assert report.attempts[1].ended == "node-lost of node-1: y"
    assert report.attempts[2].ended == "running"
    assert report.useful_share == pytest.approx((4 + 8) / 23)


def test_report_attempt_that_never_restored_is_shown_and_loses_nothing() -> None:
    events = [
        event(0, 1, "fresh_start", step=0),
        *steps(1, 1, 4, at=0),
        event(5, 1, "failure", cause="crash", rank=0, reason="a"),
        event(6, 2, "attempt_started", world_size=4),
        event(7, 2, "failure", cause="crash", rank=1, reason="b"),
        event(8, 3, "restored", step=4, tier="peer", wire_bytes=500),
        *steps(3, 5, 5, at=8),
    ]
    report = Report.from_events(events)
    second, third = report.attempts[1:]
    assert (second.restored_step, second.steps_lost, second.recovery_s, second.num_steps) == (
        None,
        0,
        None,
        0,
    )
    assert (third.restored_tier, third.steps_lost) == ("peer", 0)
    assert third.recovery_s == pytest.approx(2.0)
    assert report.num_failures == 2
    assert report.wire_nbytes == 500


def test_report_hang_counts_from_when_the_rank_fell_silent() -> None:
    events = [
        event(0, 1, "fresh_start", step=0),
        *steps(1, 1, 4, at=0),
        event(24, 1, "hang", rank=3, silent_s=19.5),
        event(25, 1, "failure", cause="hang", rank=3, reason="no step"),
        event(26, 2, "restored", step=4, tier="memory"),
        *steps(2, 5, 5, at=26),
    ]
    assert Report.from_events(events).attempts[1].recovery_s == pytest.approx(27 - 4.5)


def test_report_failure_that_training_survived_is_no_failed_attempt() -> None:
    events = [
        event(0, 1, "fresh_start", step=0),
        *steps(1, 1, 2, at=0),
        event(2.5, 1, "failure", cause="agent", node="node-0", reason="agent died"),
        *steps(1, 3, 4, at=3),
        event(6, 1, "attempt_ended", outcome="succeeded", step=4),
        event(7, 0, "run_ended", outcome="succeeded", step=4),
    ]
    report = Report.from_events(events)
    assert report.num_failures == 0
    assert report.attempts[0].ended == "succeeded"


def test_report_launcher_killed_says_that_the_attempt_vanished() -> None:
    events = [
        event(0, 0, "run_started"),
        event(0, 1, "fresh_start", step=0),
        *steps(1, 1, 4, at=0),
        event(100, 0, "run_started"),
        event(101, 2, "restored", step=3, tier="bucket"),
        *steps(2, 4, 6, at=101),
    ]
    report = Report.from_events(events)
    assert report.attempts[0].ended == "vanished without a word"
    assert report.attempts[1].recovery_s == pytest.approx(102 - 4)
    assert report.wall_s == 104  # nobody said that it had ended, so the pause is part of the price


def test_report_pause_after_orderly_end_is_no_wall_time() -> None:
    events = [
        event(0, 1, "fresh_start", step=0),
        *steps(1, 1, 4, at=0),
        event(5, 1, "attempt_ended", outcome="stopped", step=4),
        event(5, 0, "run_ended", outcome="stopped", step=4),
        event(1000, 0, "run_started"),
        event(1001, 2, "restored", step=4, tier="bucket"),
        *steps(2, 5, 8, at=1001),
        event(1005, 2, "attempt_ended", outcome="succeeded", step=8),
        event(1005, 0, "run_ended", outcome="succeeded", step=8),
    ]
    report = Report.from_events(events)
    assert report.wall_s == 10
    assert report.useful_share == pytest.approx(0.8)
    assert [row.ended for row in report.attempts] == ["stopped", "succeeded"]
    assert report.attempts[1].recovery_s is None  # nothing had failed
    assert report.outcome == "succeeded"


def test_report_launchers_word_for_success_is_success() -> None:
    events = [event(0, 1, "fresh_start", step=0), *steps(1, 1, 4, at=0)]
    events += [event(5, 1, "attempt_ended", outcome="succeeded"), event(5, 0, "run_ended", outcome="succeeded")]
    report = Report.from_events(events)
    assert (report.outcome, report.attempts[0].ended, report.num_failures) == ("succeeded", "succeeded", 0)


def test_report_plain_run_that_failed_is_not_running() -> None:
    events = [
        event(0, 1, "attempt_started", launcher="none"),
        event(1, 1, "fresh_start", step=0),
        *steps(1, 1, 4, at=1),
        event(6, 1, "attempt_ended", outcome="failed"),
    ]
    report = Report.from_events(events)
    assert (report.outcome, report.attempts[0].ended, report.num_failures) == ("failed", "failed", 1)


def test_report_bytes_between_nodes_are_replicas_and_restores() -> None:
    events = [
        event(0, 1, "replicated", rank=0, nbytes=300),
        event(1, 2, "restored", step=1, tier="peer", wire_bytes=70),
    ]
    assert Report.from_events(events).wire_nbytes == 370


def test_report_as_text_lines_up_in_columns() -> None:
    head, rule, first, second, empty, summary = Report.from_events(killed_once()).to_text().splitlines()
    assert rule.startswith("-------")
    assert first.index("crash of rank 2") == second.index("succeeded") == head.index("ended")
    assert empty == ""
    assert summary == "succeeded at step 20, loss 0.0500, 2 attempts, 1 failure, 2 steps lost, 66.7% of 30.0 s useful"


def test_report_as_html_escapes_what_others_wrote() -> None:
    events = [
        event(0, 1, "fresh_start", step=0),
        event(1, 1, "failure", cause="crash", rank=0, reason="<script>"),
    ]
    events += [event(2, 2, "fresh_start", step=0)]
    found = Report.from_events(events)._repr_html_()
    assert "&lt;script&gt;" in found and "<script>" not in found


def test_report_as_json_is_json() -> None:
    found = json.loads(json.dumps(Report.from_events(killed_once()).to_json()))
    assert found["attempts"][1]["restored_tier"] == "memory"


def test_report_module_imports_no_torch() -> None:
    program = "import sys, ktrain.train.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
