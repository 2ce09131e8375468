"""What the head believes of processes, from supervisors' reports and the launcher's word."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.run.head import Roster
from ktrain.testing.fake_clock import FakeClock


def said(node: str = "node-0", pid: int = 10, **changes: Any) -> dict[str, Any]:
    base = {"node": node, "host": "h", "pid": pid, "epoch": 1, "state": "running", "ranks": [0], "pids": [77]}
    return {**base, "exits": [], "store": None, **changes}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def roster(clock: FakeClock) -> Roster:
    return Roster(clock)


def test_roster_report_grows_silent(roster: Roster, clock: FakeClock) -> None:
    roster.take(said())
    clock.sleep(3.0)

    assert roster.supervisors()["node-0"].silent_s == pytest.approx(3.0)


def test_roster_late_report_of_a_dead_supervisor_does_not_count(roster: Roster) -> None:
    assert roster.take(said(pid=10))
    roster.process_exited("node-0", "supervisor", 10)

    assert not roster.take(said(pid=10))
    assert roster.supervisors() == {}


def test_roster_pod_that_was_replaced_while_it_still_ran_is_not_heard(roster: Roster) -> None:
    roster.take(said(pid=10))
    roster.process_exited("node-0", "node", 0)
    assert roster.lost() == {"node-0"}

    assert roster.take(said(pid=11, epoch=0, state="idle"))
    assert not roster.take(said(pid=10))
    assert roster.supervisors()["node-0"].pid == 11
    assert roster.lost() == frozenset()


def test_roster_exit_of_an_older_process_leaves_the_new_one(roster: Roster) -> None:
    roster.take(said(pid=11))
    roster.process_exited("node-0", "supervisor", 10)

    assert roster.supervisors()["node-0"].pid == 11


def test_roster_lost_node_is_lost_until_an_empty_one_speaks(roster: Roster) -> None:
    roster.take(said(pid=10))
    roster.process_exited("node-0", "node", 0)
    assert roster.lost() == {"node-0"} and roster.supervisors() == {}

    roster.take(said(pid=10))
    assert roster.lost() == {"node-0"}, "a late report of the lost one"
    roster.take(said(pid=12, epoch=0, state="idle"))

    assert roster.lost() == frozenset()


@pytest.mark.parametrize("role", ["supervisor", "node"])
@pytest.mark.parametrize("told", [False, True])
def test_roster_late_word_of_an_old_pod_changes_nothing_of_the_new_one(role: str, told: bool, roster: Roster) -> None:
    roster.take(said(pid=10))
    roster.process_exited("node-0", "node", 0)  # the new pod begins while the old one still ends
    roster.take(said(pid=11, epoch=0, state="idle"))

    assert not roster.process_exited("node-0", role, 10, told=told)

    assert roster.take(said(pid=11, epoch=0, state="idle")), "it is not told to leave"
    assert roster.supervisors()["node-0"].pid == 11
    assert roster.lost() == roster.told() == frozenset()
    assert not roster.take(said(pid=10))


def test_roster_late_word_of_a_pod_that_had_no_supervisor_ends_nobody(roster: Roster) -> None:
    assert roster.process_exited("node-0", "node", -1, told=True), "nobody else speaks for the node yet"
    assert roster.lost() == roster.told() == {"node-0"}
    roster.take(said(pid=11))

    assert not roster.process_exited("node-0", "node", -1, told=True)

    assert roster.supervisors()["node-0"].pid == 11 and roster.told() == frozenset()


def test_roster_old_trainer_told_to_end_does_not_mark_the_pod_that_has_begun(roster: Roster) -> None:
    roster.take(said(pid=10))
    roster.process_exited("node-0", "node", 0)

    assert not roster.process_exited("node-0", "supervisor", 10, told=True)

    assert roster.told() == frozenset()


def test_roster_pod_that_ends_is_lost_with_its_supervisor(roster: Roster) -> None:
    roster.take(said(pid=10))

    assert roster.process_exited("node-0", "node", 10, told=True)

    assert roster.lost() == roster.told() == {"node-0"} and roster.supervisors() == {}
    assert not roster.take(said(pid=10))


def test_roster_agent_counts_again_only_once_it_spoke_after_its_death(roster: Roster, clock: FakeClock) -> None:
    clock.sleep(10.0)
    roster.process_exited("node-0", "agent", 5)
    clock.sleep(1.0)

    assert roster.living_agents({"node-0": 2.0, "node-1": 2.0}) == {"node-1": 2.0}
    assert roster.living_agents({"node-0": 0.5}) == {"node-0": 0.5}


def test_roster_pod_told_to_end_is_known_until_another_is_heard(clock: FakeClock) -> None:
    roster = Roster(clock, told=("node-1",))  # an earlier head knew of that
    roster.take(said(pid=10))
    roster.process_exited("node-0", "supervisor", 10, told=True)
    roster.process_exited("node-0", "node", 12, told=True)
    assert roster.told() == {"node-0", "node-1"}

    roster.take(said(pid=11, epoch=0, state="idle"))
    roster.process_exited("node-1", "node", 0)  # its next pod begins

    assert roster.told() == frozenset()
