"""What a person sees, from events alone."""

from __future__ import annotations

from typing import Any

from ktrain.base.events import Event
from ktrain.cli.progress import Picture, verdict_line
from ktrain.launcher.backends.local import Outcome


def event(kind: str, time: float = 0.0, attempt: int = 2, **fields: Any) -> Event:
    return Event(kind, fields, time, attempt)


def test_picture_training_shows_step_loss_rate_and_tiers() -> None:
    picture = Picture()
    picture.take(event("attempt_started", nodes={"node-0": [0]}))
    for index in range(3):
        picture.take(event("step", time=index * 0.5, step=30 + index, loss=1.25, samples=8))
    picture.take(event("committed", tier="memory", step=30))
    picture.take(event("committed", tier="bucket", step=20))

    assert picture.line() == "attempt 2 | training | step 32 | loss 1.2500 | 16.0 samples/s | memory 30 | bucket 20"


def test_picture_steps_without_samples_shows_steps_per_second() -> None:
    picture = Picture()
    for index in range(3):
        picture.take(event("step", time=index * 0.5, step=index, loss=None, samples=None))

    assert "2.00 steps/s" in picture.line() and "loss" not in picture.line()


def test_picture_rate_does_not_count_the_time_of_a_failure() -> None:
    picture = Picture()
    picture.take(event("step", time=0.0, step=1, samples=8))
    picture.take(event("attempt_started", time=60.0, attempt=3))
    picture.take(event("step", time=61.0, attempt=3, step=1, samples=8))
    picture.take(event("step", time=62.0, attempt=3, step=2, samples=8))

    assert "8.0 samples/s" in picture.line()


def test_picture_step_of_an_older_attempt_that_was_logged_late_changes_nothing() -> None:
    picture = Picture()
    picture.take(event("attempt_started", attempt=3))
    before = picture.line()
    picture.take(event("step", step=20, loss=None, samples=None, attempt=2))

    assert picture.line() == before


def test_picture_failure_gets_a_line_with_cause_rank_and_step() -> None:
    fields = {"cause": "crash", "rank": 1, "step": 30, "reason": "ValueError: nan\nmore"}

    assert Picture().take(event("failure", **fields)) == "attempt 2: crash (rank 1) at step 30: ValueError: nan"


def test_picture_restore_names_step_and_tier() -> None:
    line = Picture().take(event("restored", step=20, tier="peer"))

    assert line == "attempt 2: continues from step 20, restored from peer"


def test_picture_step_set_aside_has_one_line() -> None:
    fields = {"epoch": 1, "attempts": [2, 3], "reason": "2 attempts failed from it"}

    assert Picture().take(event("quarantined", step=20, **fields)) == (
        "set aside: step 20 of epoch 1: 2 attempts failed from it"
    )
    assert Picture().take(event("quarantined", step=None, **fields)) is None


def test_picture_event_with_a_missing_field_is_still_shown() -> None:
    assert Picture().take(event("tier_failed", tier="peer")) == "peer tier failed: ?"


def test_picture_ordinary_events_have_no_line() -> None:
    picture = Picture()

    assert picture.take(event("step", step=1, loss=1.0)) is None
    assert picture.take(event("snapshot", rank=0, step=1)) is None


def test_verdict_line_stopped_says_where_and_how_to_go_on() -> None:
    line = verdict_line(Outcome(130, "signal SIGINT", "stopped", 33))

    assert "step 33" in line and "the same command continues" in line
