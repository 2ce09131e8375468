from __future__ import annotations

from collections.abc import Iterator

import pytest

from ktrain.base.settings import Timeouts
from ktrain.checkpoint.replication import Replication
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import identity

TIMEOUTS = Timeouts(patience_s=20)
HOME = {0: "node-0", 1: "node-1"}
OWN = {0: ["node-0"], 1: ["node-1"]}
HALF = {0: ["node-0", "node-1"], 1: ["node-1"]}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def replication(clock: FakeClock) -> Iterator[Replication]:
    found = Replication(TIMEOUTS, clock)
    found.choose(identity(10), None)
    found.look(OWN, HOME)
    yield found


def test_choose_a_newer_step_waits_until_all_peers_hold_the_wanted_one(replication: Replication) -> None:
    replication.choose(identity(20), None)
    assert replication.wanted == identity(10)
    replication.choose(identity(20), identity(10))
    assert replication.wanted == identity(20)


def test_choose_nothing_newer_goes_on_with_the_wanted_one(replication: Replication, clock: FakeClock) -> None:
    clock.advance(2 * TIMEOUTS.drain_s)
    replication.choose(identity(10), None)
    assert replication.wanted == identity(10)


def test_choose_gives_up_a_step_of_which_nothing_moved(replication: Replication, clock: FakeClock) -> None:
    clock.advance(TIMEOUTS.drain_s - 1)
    replication.look(HALF, HOME)
    clock.advance(TIMEOUTS.drain_s - 1)
    replication.look(HALF, HOME)
    replication.choose(identity(20), None)
    assert replication.wanted == identity(10), "a replica came in between"
    clock.advance(2)
    replication.look(HALF, HOME)
    replication.choose(identity(20), None)
    assert replication.wanted == identity(20)


def test_choose_gives_up_at_once_a_step_that_its_own_node_lost(replication: Replication) -> None:
    replication.look({0: ["node-1"], 1: ["node-0", "node-1"]}, HOME)
    replication.choose(identity(10), None)
    assert replication.wanted == identity(10), "there is nothing newer"
    replication.choose(identity(20), None)
    assert replication.wanted == identity(20)


def test_counts_the_wanted_step_alone_once_there_is_one(replication: Replication) -> None:
    assert replication.counts(identity(10)) and not replication.counts(identity(20))
    assert Replication(TIMEOUTS, FakeClock()).counts(identity(20))
