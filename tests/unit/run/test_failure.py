"""Root causes, hangs and budgets: pure decisions."""

from __future__ import annotations

import pytest

from ktrain.base import contract
from ktrain.checkpoint.quarantine import Trial
from ktrain.run.failure import Budgets, Exit, Failure, crash, decide, find_hang, root_cause
from tests.unit.run.builders import TIMEOUTS, ended, rank

CRASH = Failure(contract.CAUSE_CRASH, "boom")
HANG = Failure(contract.CAUSE_HANG, "late")


def test_root_cause_signal_before_exception() -> None:
    assert root_cause([ended(0), ended(1, -11)]).rank == 1


def test_root_cause_exception_before_its_echo() -> None:
    echo = ended(0, reason="RuntimeError: [gloo] Connection closed by peer")
    assert root_cause([echo, ended(1, reason="ValueError: nan")]).rank == 1


def test_root_cause_only_echoes_takes_the_first_reported() -> None:
    echo = "DistNetworkError: Connection reset"
    assert root_cause([ended(2, reason=echo), ended(1, reason=echo)]).rank == 2


def test_root_cause_our_own_refusal_before_signals() -> None:
    refusal = ended(3, contract.EXIT_USAGE, kind="config")
    assert root_cause([ended(0, -9), refusal]).rank == 3


def test_root_cause_ended_by_us_does_not_count() -> None:
    assert root_cause([ended(0, -15, ended_by_us=True)]) is None


def test_root_cause_stopped_on_request_is_no_failure() -> None:
    assert root_cause([ended(0, contract.EXIT_STOPPED)]) is None


def test_crash_counts_the_echoes() -> None:
    found = crash([ended(1, -9), ended(0), ended(2, -15, ended_by_us=True)], {1: rank(12)})
    assert found is not None
    assert (found.rank, found.step, found.phase, found.secondary) == (1, 12, "train", 1)
    assert "1 other ranks failed because of it" in found.describe()


def test_crash_sys_exit_2_of_a_script_is_not_final() -> None:
    plain = ended(0, contract.EXIT_USAGE, kind="exit")
    assert crash([plain], {}).final is None


def test_find_hang_nobody_over_the_limit_is_none() -> None:
    assert find_hang({0: rank(1, step_silent_s=TIMEOUTS.step_s - 1)}, TIMEOUTS) is None


def test_find_hang_start_and_close_have_longer_limits() -> None:
    over = TIMEOUTS.step_s + 1
    assert find_hang({0: rank(0, "start", step_silent_s=over)}, TIMEOUTS) is None
    assert find_hang({0: rank(9, "close", step_silent_s=over)}, TIMEOUTS) is None
    assert find_hang({0: rank(9, step_silent_s=over)}, TIMEOUTS) is not None


def test_find_hang_closed_rank_is_never_late() -> None:
    assert find_hang({0: rank(9, step_silent_s=1e9, closed=True)}, TIMEOUTS) is None


def test_find_hang_all_speak_names_the_one_that_is_behind() -> None:
    over = TIMEOUTS.step_s + 1
    found = find_hang({0: rank(9, step_silent_s=over), 1: rank(8, step_silent_s=over), 2: rank(9)}, TIMEOUTS)
    assert found is not None and found[0] == 1


def test_decide_causes_have_budgets_of_their_own() -> None:
    budgets = Budgets(max_restarts=1)
    for failure in (CRASH, HANG):
        decision = decide(budgets, failure, committed=None)
        assert decision.verdict is None
        budgets = decision.budgets
    assert decide(budgets, CRASH, committed=None).verdict.exit_code == contract.EXIT_FAILED


def test_decide_no_restarts_allowed_fails_at_once() -> None:
    assert decide(Budgets(max_restarts=0), CRASH, committed=10).verdict is not None


def test_decide_progress_between_failures_costs_one_each() -> None:
    budgets = Budgets(max_restarts=3)
    for committed in (10, 20, 30):
        decision = decide(budgets, CRASH, committed=committed)
        assert decision.verdict is None
        budgets = decision.budgets
    assert decide(budgets, CRASH, committed=40).verdict is not None


def test_decide_three_in_a_row_without_progress_end_the_run() -> None:
    budgets = decide(Budgets(max_restarts=100), CRASH, committed=10).budgets
    budgets = decide(budgets, HANG, committed=10).budgets
    verdict = decide(budgets, CRASH, committed=10).verdict
    assert verdict is not None and "no progress" in verdict.reason


def test_decide_failure_without_progress_counts_double() -> None:
    budgets = decide(Budgets(max_restarts=2), CRASH, committed=10).budgets
    assert decide(budgets, CRASH, committed=20).verdict is None
    assert decide(budgets, CRASH, committed=10).verdict is not None


def test_budgets_round_trip_through_json() -> None:
    budgets = decide(Budgets(max_restarts=3), CRASH, committed=10).budgets
    assert Budgets.from_json(budgets.to_json(), max_restarts=3) == budgets


OWN = Failure(contract.CAUSE_CRASH, "boom", rank=1, step=25, own_fault=True)


def test_decide_failure_that_sets_the_step_aside_costs_nothing_and_ends_the_row() -> None:
    budgets = Budgets(max_restarts=3, spent={contract.CAUSE_CRASH: 3}, streak=2, committed=20)
    decision = decide(budgets, OWN, committed=20, trial=Trial(farthest=20, failures_left=1))
    assert decision.verdict is None
    assert (decision.budgets.spent, decision.budgets.streak) == ({contract.CAUSE_CRASH: 3}, 0)


@pytest.mark.parametrize("trial", [None, Trial(20, failures_left=2), Trial(farthest=19, failures_left=1)])
def test_decide_failure_that_sets_nothing_aside_ends_the_run_as_ever(trial: Trial | None) -> None:
    budgets = Budgets(max_restarts=100, streak=2, committed=20)
    assert decide(budgets, OWN, committed=20, trial=trial).verdict is not None


def test_decide_lost_node_in_a_last_trial_sets_nothing_aside() -> None:
    lost = Failure(contract.CAUSE_NODE_LOST, "gone", node="node-0", step=25)
    budgets = Budgets(max_restarts=100, streak=2, committed=20)
    assert decide(budgets, lost, committed=20, trial=Trial(20, failures_left=1)).verdict is not None


@pytest.mark.parametrize(
    ("exit_", "own"),
    [
        (ended(1, reason="ValueError: nan"), True),
        (ended(1, kind="error"), True),
        (ended(1, 7, kind="exit"), True),
        (ended(1, -11), True),
        (ended(1, -9), False),
        (ended(1, -15), False),
        (ended(1, contract.EXIT_USAGE, kind="config"), False),
        (ended(1, contract.EXIT_UNAVAILABLE, kind="unavailable"), False),
        (ended(1, reason="RuntimeError: [gloo] Connection closed by peer"), False),
    ],
)
def test_crash_own_fault_is_what_the_worker_did_by_itself(exit_: Exit, own: bool) -> None:
    found = crash([exit_], {1: rank(12)})
    assert found is not None and found.own_fault is own


def test_crash_while_closing_tells_nothing_of_the_step() -> None:
    found = crash([ended(1)], {1: rank(12, "close")})
    assert found is not None and not found.own_fault
