from __future__ import annotations

from typing import Any, cast

import pytest

from ktrain.abc.transport import Transport
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
