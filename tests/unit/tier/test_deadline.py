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
from ktrain.tier import deadline
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


def threads_of(what: str) -> list[threading.Thread]:
    """Those that work on a call now."""
    return [thread for thread in threading.enumerate() if thread.name == f"ktrain-tier: {what}"]


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
    late = threads_of("read x") + threads_of("read y")
    assert len(late) == 2
    calls.close()  # so that they end with their calls
    gate.set()
    assert freed.wait(10)
    for thread in late:
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


def test_run_caller_does_not_leave_while_its_memory_is_written_to_and_nothing_is_written_later() -> None:
    done: list[str] = []

    def work(call: Call) -> None:
        with call.hands_over():
            threading.Event().wait(0.2)  # long after the deadline
            done.append("written")
        with call.hands_over():
            done.append("written late")

    calls = BoundedCalls()
    with pytest.raises(DeadlineError):
        calls.run("read x", work, deadline=Deadline.after(0.02))
    done.append("left")
    late = threads_of("read x")
    calls.close()
    for thread in late:
        thread.join(10)
    assert done == ["written", "left"]


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
        calls = BoundedCalls()
        with contextlib.suppress(UnavailableError):
            calls.run("write", fail, deadline=Deadline.after(10))
        calls.run(
            "next", lambda call: None, deadline=Deadline.after(10)
        )  # by the same thread: it is done with the first
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
        calls = BoundedCalls(limit=1)
        with contextlib.suppress(DeadlineError):
            calls.run("write", fail, deadline=Deadline.after(0.05))
        gate.set()
        calls.run("next", lambda call: None, deadline=Deadline.after(10))  # by the same thread, once it is free
        del buffer, fail
        assert watched() is None
    finally:
        gc.enable()


def test_run_one_call_after_the_other_uses_one_thread_and_close_ends_it() -> None:
    calls = BoundedCalls()
    used = [calls.run("who", lambda call: threading.current_thread(), deadline=Deadline.after(10)) for _ in range(5)]
    assert len(set(used)) == 1
    calls.close()
    calls.close()
    used[0].join(10)
    assert not used[0].is_alive()


def test_run_beside_a_call_that_hangs_never_waits_for_its_thread(gate: threading.Event) -> None:
    calls = BoundedCalls()
    _hang(calls, gate)
    used = [calls.run("who", lambda call: threading.current_thread(), deadline=Deadline.after(10)) for _ in range(2)]
    assert len({*used, *threads_of("read x")}) == 2


def test_thread_that_finds_no_call_ends_by_itself_and_the_next_call_gets_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadline, "_IDLE_S", 0.001)
    calls = BoundedCalls()
    for _ in range(20):  # some of these meet a thread that is about to end
        used = calls.run("who", lambda call: threading.current_thread(), deadline=Deadline.after(10))
    used.join(10)
    assert not used.is_alive()
    assert calls.run("again", lambda call: "fine", deadline=Deadline.after(10)) == "fine"
