"""The chosen cadence against a simulation of failures, and how a change of it reaches the ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktrain.base import contract
from ktrain.checkpoint.cadence import (
    LADDER,
    Auto,
    Cadence,
    ChangeAgreement,
    Costs,
    History,
    Measured,
    Schedule,
    choose,
    choose_steps,
    daly_interval_s,
    history_of,
    lost_share,
    young_interval_s,
)
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.checkpoint.policy import Every, Policies, as_every
from ktrain.errors import ConfigError


def simulated_loss(steps: int, costs: Costs, *, step_s: float, gaps_s: np.ndarray) -> float:
    """Part of the time that is lost to saves and to steps done again, over failures that come `gaps_s` apart."""
    saves = np.floor(gaps_s / (steps * step_s + costs.cost_s))  # what a failure finds saved since the one before
    return 1 - float(saves.sum()) * steps * step_s / float(gaps_s.sum())


DURATIONS = st.floats(0.02, 20.0), st.floats(0.001, 30.0), st.floats(300.0, 30_000.0)


@given(*DURATIONS, st.integers(0, 2**31))
@example(0.1, 0.2, 11_160.0, 0)
def test_choose_steps_loses_hardly_more_than_the_best_constant_cadence(
    step_s: float, cost_s: float, mtbf_s: float, seed: int
) -> None:
    gaps_s = np.random.default_rng(seed).exponential(mtbf_s, 20_000)
    costs = Costs(cost_s, mtbf_s)
    chosen = choose_steps(10**9, costs, step_s=step_s, least=1, most=max(LADDER))
    around = {max(1, round(chosen * 1.03**power)) for power in range(-60, 61)}  # a sixth to six times
    best = min(simulated_loss(steps, costs, step_s=step_s, gaps_s=gaps_s) for steps in around)
    assert simulated_loss(chosen, costs, step_s=step_s, gaps_s=gaps_s) <= best * 1.04 + 1e-4


@given(*DURATIONS)
def test_daly_is_the_least_of_the_expected_loss(step_s: float, cost_s: float, mtbf_s: float) -> None:
    best = daly_interval_s(cost_s, mtbf_s)
    at_best = lost_share(best, cost_s, mtbf_s)
    others = [lost_share(best * 1.1**power, cost_s, mtbf_s) for power in range(-20, 21)]
    assert at_best <= min(others) * 1.001


def test_daly_small_costs_are_youngs_and_a_cost_over_all_bounds_saves_once_a_failure() -> None:
    assert daly_interval_s(1e-4, 1e4) == pytest.approx(young_interval_s(1e-4, 1e4), rel=1e-3)
    assert daly_interval_s(30.0, 10.0) == 10.0
    assert lost_share(1e9, 1.0, 1.0) == math.inf


def test_reference_figures_of_the_field_are_met() -> None:
    """A stall of 0.2 s and a failure every 3.1 h: every 67 s, 0.6 % lost."""
    assert daly_interval_s(0.2, 3.1 * 3600) == pytest.approx(67, rel=0.02)
    assert lost_share(67, 0.2, 3.1 * 3600) == pytest.approx(0.006, rel=0.05)


@given(
    st.lists(st.floats(0.8, 1.25), min_size=40, max_size=40),
    st.floats(0.05, 5.0),
    st.floats(0.005, 5.0),
    st.floats(600.0, 30_000.0),
)
def test_choose_noise_of_a_quarter_does_not_make_it_flap(
    noise: list[float], step_s: float, stall_s: float, mtbf_s: float
) -> None:
    history = History(observed_s=mtbf_s)
    auto = Auto(mtbf_s=mtbf_s / 2)
    seen = [Cadence(10)]
    for factor in noise:
        found = choose(seen[-1], Measured(step_s, stall_s * factor, history=history), auto)
        if found != seen[-1]:
            seen.append(found)
    assert len(seen) <= 4, f"one change to get there, and few for the noise: {seen}"
    assert len({one.memory for one in seen}) == len(seen), f"back and forth: {seen}"


@given(st.integers(1, 2000), *DURATIONS)
def test_choose_steps_stays_in_its_bounds(current: int, step_s: float, cost_s: float, mtbf_s: float) -> None:
    found = choose_steps(current, Costs(cost_s, mtbf_s, least_s=3.0), step_s=step_s, least=5, most=50)
    assert min(50, max(5, math.ceil(3.0 / step_s))) <= found <= 50


def test_choose_bucket_is_whenever_idle_where_a_drain_costs_nothing_and_rarer_where_it_slows() -> None:
    auto = Auto()
    free = choose(Cadence(10), Measured(1.0, 0.01, drain_s=2.0), auto)
    dear = choose(Cadence(10), Measured(1.0, 0.01, drain_s=100.0, slowdown=0.1), auto)
    assert free.bucket == 0 and dear.bucket > 100
    costs = Costs(10.0, History().loss_mtbf_s(auto.mtbf_s))
    assert dear.bucket == choose_steps(1, costs, step_s=1, least=100, most=10**6)
    assert choose(Cadence(10, disk=7), Measured(1.0, 0.01), auto).disk == 7, "nothing was measured"


def test_choose_peers_that_copy_slowly_hold_the_saves_back() -> None:
    assert choose(Cadence(10), Measured(0.1, 1e-6, copy_s=5.0), Auto()).memory == 50


def test_history_counts_failures_and_the_time_between_records() -> None:
    def attempt(epoch: int, begin: float, end: dict[str, object] | None) -> AttemptRecord:
        return AttemptRecord(epoch, start={"time": begin}, committed={"time": begin + 50}, end=end)

    lost = {"outcome": "failed", "cause": contract.CAUSE_ALL_LOST, "time": 400.0}
    crash = {"outcome": "failed", "cause": contract.CAUSE_CRASH, "time": 1100.0}
    stopped = {"outcome": "stopped", "time": 2010.0}
    history = history_of(
        [
            attempt(1, 0.0, lost),
            attempt(2, 1000.0, crash),
            attempt(3, 2000.0, stopped),
            attempt(4, 3000.0, None),
            attempt(5, 9000.0, None),
        ]
    )
    assert history == History(failures=3, losses=2, observed_s=400 + 100 + 50 + 50)
    assert history.mtbf_s(3000) == 3600 / 4 and History().mtbf_s(3000) == 3000
    assert history.loss_mtbf_s(3000) == pytest.approx(3600 / 2.1)


# Policies


def test_every_auto_crosses_the_channel_unchanged() -> None:
    for every in (as_every("auto"), Every(5, auto=Auto(least=2, most=50, mtbf_s=60.0))):
        policies = Policies(every)
        assert Policies.from_json(policies.to_json()) == policies


@pytest.mark.parametrize("values", [{"least": 0}, {"least": 5, "most": 4}, {"mtbf_s": 0.0}, {"mtbf_s": math.inf}])
def test_auto_impossible_bounds_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="1 <= least <= most"):
        Auto(**values)  # type: ignore[arg-type]


def test_every_unknown_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="'auto'"):
        as_every("often")


# Agreement


@given(st.integers(1, 50), st.integers(1, 500))
def test_schedule_number_means_its_multiples(every: int, step: int) -> None:
    assert Schedule(as_every(every).memory).due(step) == (step in range(0, step + 1, every))


def test_schedule_change_begins_at_its_step_and_one_heard_late_at_the_next() -> None:
    schedule = Schedule(10)
    assert schedule.take([1, 25, 4], step=20) and schedule.said == [1, 25, 4, True]
    assert [step for step in range(1, 41) if schedule.due(step)] == [10, 20, 28, 32, 36, 40]
    assert schedule.take([2, 30, 3], step=33) and schedule.said == [2, 30, 3, False]
    assert [step for step in range(28, 41) if schedule.due(step)] == [28, 32, 36, 39]
    assert not schedule.take([2, 50, 7], step=34), "the same change once more"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 5)), max_size=8))
def test_schedule_any_changes_every_step_has_an_answer(changes: list[tuple[int, int, int]]) -> None:
    schedule, step = Schedule(10), 0
    for number, (ahead, memory, moved) in enumerate(changes, start=1):
        step += moved
        schedule.take([number, step + ahead, memory], step)
        for later in range(step, step + 40):
            schedule.due(later)


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=60),
    st.integers(1, 3),
)
def test_change_every_rank_saves_the_same_steps_in_the_end(
    starts: list[int], moves: list[tuple[int, bool, bool]], speed: int
) -> None:
    """Ranks step, hear and report in any order; once all have heard a change in time, they save alike from it on."""
    head = ChangeAgreement()
    ranks = [(Schedule(10), [start]) for start in starts]
    views = {rank: {"step": step[0], "cadence": None} for rank, (_, step) in enumerate(ranks)}
    head.announce(7, at_step=max(starts), lead=1)

    def turn(index: int, *, moves_on: bool, hears: bool) -> None:
        schedule, step = ranks[index]
        if moves_on:
            step[0] += speed
        if hears and head.change is not None:
            schedule.take(head.change.to_json(), step[0])
            views[index] = {"step": step[0], "cadence": schedule.said}
            head.hear(views)

    for which, moves_on, hears in moves:
        turn(which % len(ranks), moves_on=moves_on, hears=hears)
    for _ in range(3 * len(ranks) + 10):
        for index in range(len(ranks)):
            turn(index, moves_on=True, hears=True)
    assert head.change is not None
    begins = max(head.change.from_step, max(step[0] for _, step in ranks) + 1)
    saved = [[step for step in range(begins, begins + 60) if schedule.due(step)] for schedule, _ in ranks]
    assert all(steps == saved[0] for steps in saved) and len(saved[0]) > 60 // 7 - 1


def test_change_of_a_head_that_died_is_gone_on_with() -> None:
    new = ChangeAgreement()
    new.hear({0: {"step": 40, "cadence": [3, 30, 25, True]}, 1: {"step": 41, "cadence": [3, 30, 25, True]}})
    assert new.change is not None and new.change.to_json() == [3, 30, 25]
    assert new.announce(50, at_step=41, lead=2).number == 4
