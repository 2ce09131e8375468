"""Calls that hang: their callers go on, and the threads left behind are counted."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from ktrain.base.clock import Deadline
from ktrain.errors import DeadlineError, NotFoundError, UnavailableError
from ktrain.tier.deadline import BoundedCalls, Call


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Hanging calls wait for it; the end of the test lets them go."""
    gate = threading.Event()
    yield gate
    gate.set()


def _hang(calls: BoundedCalls, gate: threading.Event, what: str = "read x") -> None:
    with pytest.raises(DeadlineError, match=what):
        calls.run(what, lambda call: gate.wait(30), deadline=Deadline.after(0.02))


def test_run_work_that_returns_gives_its_value() -> None:
    assert BoundedCalls().run("add", lambda call: 1 + 1, deadline=Deadline.after(10)) == 2


def test_run_work_that_raises_raises_the_same_error() -> None:
    error = NotFoundError("x")

    def fail(call: Call) -> None:
        raise error

    with pytest.raises(NotFoundError) as caught:
        BoundedCalls().run("read x", fail, deadline=Deadline.after(10))
    assert caught.value is error


def test_run_work_that_hangs_is_left_behind_and_reported_until_it_returns(gate: threading.Event) -> None:
    calls = BoundedCalls()
    _hang(calls, gate)
    assert calls.late() == ["read x"]
    assert calls.run("next", lambda call: "fine", deadline=Deadline.after(10)) == "fine"

    freed = threading.Event()

    def hang(call: Call) -> None:
        gate.wait(30)
        freed.set()

    with pytest.raises(DeadlineError):
        calls.run("read y", hang, deadline=Deadline.after(0.02))
    gate.set()
    assert freed.wait(10)
    for thread in threading.enumerate():
        if thread.name.startswith("ktrain-tier: read"):
            thread.join(10)
    assert calls.late() == []


def test_run_work_of_a_caller_that_left_is_told_at_its_next_check(gate: threading.Event) -> None:
    told = threading.Event()

    def work(call: Call) -> None:
        gate.wait(30)
        try:
            call.check()
        except DeadlineError:
            told.set()
            raise

    with pytest.raises(DeadlineError):
        BoundedCalls().run("write x", work, deadline=Deadline.after(0.02))
    gate.set()
    assert told.wait(10)


def test_run_behind_too_many_hanging_calls_is_refused_at_once(gate: threading.Event) -> None:
    calls = BoundedCalls(late_limit=2)
    _hang(calls, gate, "read a")
    _hang(calls, gate, "read b")
    with pytest.raises(UnavailableError, match="2 earlier calls still hang .first: read a"):
        calls.run("read c", lambda call: None, deadline=Deadline.after(60))


def test_run_more_calls_than_the_limit_wait_for_a_place_until_their_deadline(gate: threading.Event) -> None:
    calls = BoundedCalls(limit=1)
    started = threading.Event()

    def hold(call: Call) -> None:
        started.set()
        gate.wait(30)

    holder = threading.Thread(target=lambda: calls.run("hold", hold, deadline=Deadline.after(30)))
    holder.start()
    assert started.wait(10)
    with pytest.raises(DeadlineError, match="1 calls were in progress"):
        calls.run("read x", lambda call: None, deadline=Deadline.after(0.02))
    gate.set()
    holder.join(10)
    assert calls.run("read x", lambda call: "now", deadline=Deadline.after(10)) == "now"


def test_run_after_close_is_refused() -> None:
    calls = BoundedCalls()
    calls.close()
    with pytest.raises(UnavailableError, match="closed"):
        calls.run("read x", lambda call: None, deadline=Deadline.after(10))


def test_call_that_fails_lets_go_of_the_callers_buffer_at_once() -> None:
    class Buffer(bytearray):
        """One that can be watched."""

    buffer = Buffer(8)

    def fail(call: Call, data: Buffer = buffer) -> None:
        raise UnavailableError(f"{call.what}: {len(data)} bytes were not taken")

    watched = weakref.ref(buffer)
    gc.disable()  # a slot's lease must not wait for it
    try:
        with contextlib.suppress(UnavailableError):
            BoundedCalls().run("write", fail, deadline=Deadline.after(10))
        for thread in threading.enumerate():
            if thread.name.startswith("ktrain-tier"):
                thread.join(10)  # it has said its last word, and is about to end
        del buffer, fail
        assert watched() is None
    finally:
        gc.enable()


def test_call_that_fails_after_it_was_given_up_lets_go_of_the_callers_buffer(gate: threading.Event) -> None:
    class Buffer(bytearray):
        """One that can be watched."""

    buffer = Buffer(8)

    def fail(call: Call, data: Buffer = buffer) -> None:
        gate.wait(30)
        raise UnavailableError(f"{call.what}: {len(data)} bytes were not taken")

    watched = weakref.ref(buffer)
    gc.disable()
    try:
        with contextlib.suppress(DeadlineError):
            BoundedCalls().run("write", fail, deadline=Deadline.after(0.05))
        left = [thread for thread in threading.enumerate() if thread.name == "ktrain-tier: write"]
        gate.set()
        for thread in left:
            thread.join(10)
        del buffer, fail, thread, left
        assert watched() is None
    finally:
        gc.enable()
