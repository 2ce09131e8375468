from __future__ import annotations

import os
import threading
from typing import Any, cast

import pytest

from ktrain.abc.transport import Transport
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.carry import Carrier, Ends, Wanted
from ktrain.checkpoint.replicas import WantedReplicas
from ktrain.errors import CapacityError, KtrainError, UnavailableError
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import identity

TIMEOUTS = Timeouts(patience_s=20)


class Refusing:
    """A wire whose every pull ends with an error."""

    def __init__(self, error: KtrainError) -> None:
        self.error = error

    def address(self) -> str:
        return "here"

    def pull(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


def want(carrier: Carrier, step: int) -> None:
    pull = [{"rank": 0, "identity": identity(step).to_json(), "source": "there", "owner": "node-0"}]
    carrier.want(Wanted(replicas=WantedReplicas(pull=pull, peers={"node-0": "there"})))


@pytest.mark.parametrize("error", [CapacityError("no slot"), UnavailableError("cut")], ids=["no-room", "no-wire"])
def test_pull_that_is_refused_is_said_once_no_room_only_when_it_lasts(error: KtrainError) -> None:
    clock, said = FakeClock(), list[int]()
    ends = Ends("unused", "node-1", lambda: None, lambda: None, cast("Transport", Refusing(error)))
    carrier = Carrier(
        ends,
        emit=lambda kind, **fields: said.append(fields["step"]),
        drained=lambda report: None,
        filled=lambda: None,
        timeouts=TIMEOUTS,
        clock=clock,
    )
    is_room, memory = isinstance(error, CapacityError), dict[Any, Any]()
    want(carrier, 10)
    carrier._pull_once(memory)
    assert said == ([] if is_room else [10])
    clock.advance(TIMEOUTS.call_s)
    carrier._pull_once(memory)
    carrier._pull_once(memory)
    assert said == [10]
    want(carrier, 20)
    carrier._pull_once(memory)
    assert said == [10, 20], "nothing was kept since: a newer step is no news of room"


class Watched:
    """The ends of a carrier, which note in which class its threads run when they come by."""

    def __init__(self) -> None:
        self.classes: dict[str, int] = {}  # by the thread's name
        self.changed = threading.Event()

    def note(self, *args: Any, **kwargs: Any) -> None:
        self.classes[threading.current_thread().name] = os.sched_getscheduler(0)
        self.changed.set()

    def address(self) -> str:
        return "here"

    def pull(self, *args: Any, **kwargs: Any) -> Any:
        self.note()
        raise UnavailableError("cut")

    def await_threads(self, *beginnings: str) -> None:
        deadline = Deadline.after(30.0)
        while not all(any(name.startswith(beginning) for name in self.classes) for beginning in beginnings):
            deadline.check(f"{beginnings}, of which there are {sorted(self.classes)}")
            SYSTEM_CLOCK.wait(self.changed, deadline.remaining_s())
            self.changed.clear()


def test_threads_that_carry_let_training_first_with_those_of_uploads_but_not_what_a_restore_waits_for() -> None:
    watched = Watched()
    ends = Ends("unused", "node-1", watched.note, watched.note, cast("Transport", watched))
    carrier = Carrier(
        ends,
        emit=watched.note,
        drained=watched.note,  # on the threads of the uploads, of which none finds a volume
        filled=lambda: None,
        timeouts=TIMEOUTS,
        clock=SYSTEM_CLOCK,
    )
    pull = [{"rank": 0, "identity": identity(20).to_json(), "owner": "node-0"}]
    drain = {"write_id": "x", "identity": identity(20).to_json(), "ranks": [0, 1], "again": []}
    carrier.start()
    try:
        carrier.want(Wanted(drain=drain, replicas=WantedReplicas(pull=pull, peers={"node-0": "there"})))
        watched.await_threads("ktrain-drain", "ktrain-drain step", "ktrain-disk", "ktrain-pull", "ktrain-fill")
    finally:
        carrier.close()
    assert watched.classes.pop("ktrain-fill") == os.sched_getscheduler(0)
    assert set(watched.classes.values()) == {os.SCHED_BATCH}, watched.classes
