"""The head's state machine, driven by views."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ktrain.base import contract
from ktrain.base.job import LaunchSpec
from ktrain.checkpoint.quarantine import Trial
from ktrain.run.states import Action, Adopt, Allocate, Close, Finish, Say, State
from ktrain.run.watch import SupervisorReport
from tests.unit.run.builders import TIMEOUTS, World, ended, in_pod, job, rank


def find(actions: list[Action], kind: type) -> list:
    return [action for action in actions if isinstance(action, kind)]


def said(actions: list[Action], kind: str) -> list[dict]:
    return [action.fields for action in find(actions, Say) if action.kind == kind]


def test_machine_all_nodes_joined_starts_contiguous_blocks() -> None:
    world = World().join_all()

    (allocate,) = find(world.tick(), Allocate)

    assert allocate.assignment == {"node-0": (0, 1), "node-1": (2, 3)}
    assert world.machine.state is State.STARTING


def test_machine_node_missing_waits_then_names_it() -> None:
    world = World()
    world.report("node-0")

    assert world.tick() == []
    (finish,) = find(world.tick(TIMEOUTS.start_s + 1), Finish)

    assert finish.verdict.exit_code == contract.EXIT_FAILED
    assert "supervisor of node-1" in finish.verdict.reason and "node-0" not in finish.verdict.reason


def test_machine_new_attempt_does_not_tell_the_store_of_the_last_one() -> None:
    world = World().run()
    assert world.machine.desired("node-1")["store"] == "127.0.0.2:1"
    world.report("node-0", state="failed", exits=(ended(0),))
    world.tick()
    world.obey()

    while world.machine.state is not State.STARTING:
        world.tick()

    assert world.machine.desired("node-1")["epoch"] == 2
    assert world.machine.desired("node-1")["store"] is None


def test_machine_worker_killed_restarts_and_names_the_rank() -> None:
    world = World().run()
    world.report("node-0", state="failed", exits=(ended(1, -9), ended(0, -15, ended_by_us=True)))
    world.report("node-1", state="failed", exits=(ended(2, reason="RuntimeError: Connection closed by peer"),))

    wanted = world.until_settled(progress={1: rank(30)}, committed=30)

    (failure,) = said(wanted, "failure")
    assert (failure["cause"], failure["rank"], failure["step"]) == ("crash", 1, 30)
    assert failure["reason"] == "killed by SIGKILL"
    assert find(wanted, Allocate) and world.machine.epoch == 2


def test_machine_failure_waits_until_the_other_nodes_have_stopped() -> None:
    world = World().run()
    world.report("node-0", state="failed", exits=(ended(0),))

    world.tick()
    assert world.machine.desired("node-1")["action"] == "stop"
    assert not said(world.tick(), "failure")
    world.obey()

    assert said(world.tick(), "failure")


def test_machine_node_never_stops_goes_on_after_the_bound() -> None:
    world = World().run()
    world.report("node-0", state="failed", exits=(ended(0),))
    world.tick()

    assert said(world.tick(TIMEOUTS.stop_s + 1), "failure")


def test_machine_all_succeeded_finishes_with_zero() -> None:
    world = World().run()
    for node in world.spec.node_names:
        world.report(node, state="succeeded")

    wanted = world.tick()

    assert find(wanted, Close)[0].outcome == "succeeded"
    assert find(wanted, Finish)[0].verdict.exit_code == 0
    assert world.machine.desired("node-0")["action"] == "exit"


def test_machine_one_node_done_waits_for_the_other() -> None:
    world = World().run()
    world.report("node-0", state="succeeded")

    assert world.tick() == []


def test_machine_node_lost_says_so_and_joins_the_empty_one() -> None:
    world = World().run()
    del world.reports["node-1"]

    wanted = world.tick(lost=frozenset({"node-1"}))
    wanted += world.until_settled()
    assert said(wanted, "failure")[0]["cause"] == contract.CAUSE_NODE_LOST
    assert not find(wanted, Allocate)

    world.reports["node-1"] = SupervisorReport("node-1", "h", 99, 0, "idle")
    assert find(world.tick(lost=frozenset()), Allocate)


def test_machine_all_nodes_lost_has_a_cause_of_its_own() -> None:
    world = World().run()
    world.reports.clear()

    wanted = world.until_settled(lost=frozenset({"node-0", "node-1"}), progress={})

    assert said(wanted, "failure")[0]["cause"] == contract.CAUSE_ALL_LOST


def test_machine_all_nodes_lost_remembers_the_step() -> None:
    world = World().run()
    world.tick(progress={0: rank(41)})
    world.reports.clear()

    wanted = world.until_settled(lost=frozenset({"node-0", "node-1"}), progress={})

    assert said(wanted, "failure")[0]["step"] == 41


def test_machine_survivor_fails_before_its_node_is_known_lost_blames_the_node() -> None:
    world = World().run()
    echo = ended(0, reason="RuntimeError: [gloo] Connection closed by peer")
    world.report("node-0", state="failed", exits=(echo, ended(1, -15, ended_by_us=True)))
    assert not said(world.tick(), "failure"), "node-1 still counts as running"
    del world.reports["node-1"]

    wanted = world.tick(lost=frozenset({"node-1"}))

    assert said(wanted, "failure")[0]["cause"] == contract.CAUSE_NODE_LOST


def test_machine_worker_died_of_its_own_and_a_node_is_lost_too_blames_the_worker() -> None:
    world = World().run()
    world.report("node-0", state="failed", exits=(ended(0, reason="ValueError: nan"),))
    world.tick()
    del world.reports["node-1"]

    assert said(world.tick(lost=frozenset({"node-1"})), "failure")[0]["rank"] == 0


def test_machine_both_processes_of_a_node_silent_counts_as_lost() -> None:
    world = World().run()
    world.report("node-1", silent_s=TIMEOUTS.lease_s + 1)
    assert world.tick() == [], "its agent still speaks"

    world.report("node-1", silent_s=3 * TIMEOUTS.lease_s + 1)

    assert said(world.tick(), "node_lost") == [{"node": "node-1"}]


def test_machine_supervisor_died_restarts_the_attempt() -> None:
    world = World().run()
    world.reports["node-1"] = SupervisorReport("node-1", "h", 99, 0, "idle")

    wanted = world.until_settled()

    assert "supervisor of node-1 died" in said(wanted, "failure")[0]["reason"]
    assert world.machine.epoch == 2


def test_machine_agent_silent_is_said_once_and_training_goes_on() -> None:
    world = World().run()
    agents = {"node-0": 0.0, "node-1": TIMEOUTS.lease_s + 1}

    def tick(agents: dict[str, float]) -> list[Action]:
        from dataclasses import replace

        world.now_s += 0.1
        view = replace(world.view, now_s=world.now_s, agents=agents, supervisors=dict(world.reports))
        return world.machine.tick(view)

    assert len(said(tick(agents), "agent_lost")) == 1
    assert tick(agents) == []
    assert len(said(tick({"node-0": 0.0, "node-1": 0.0}), "node_joined")) == 1
    assert world.machine.state is State.RUNNING


def test_machine_hang_names_the_silent_process() -> None:
    world = World().run()
    late = TIMEOUTS.step_s + 1
    progress = {number: rank(7, step_silent_s=late) for number in range(4)}
    progress[2] = rank(7, step_silent_s=late, silent_s=late, node="node-1")

    wanted = world.tick(progress=progress)

    (hang,) = said(wanted, "hang")
    assert (hang["rank"], hang["node"], hang["phase"]) == (2, "node-1", "train")
    assert "silent" in hang["reason"]
    assert world.machine.desired("node-0")["dump_stacks"] is True


def test_machine_rank_never_heard_of_while_others_train_is_a_hang() -> None:
    world = World().run()
    wanted = world.tick(TIMEOUTS.start_s + 1, progress={0: rank(1), 1: rank(1), 2: rank(1)})

    assert said(wanted, "hang")[0]["rank"] == 3


def test_machine_script_without_checkpointer_never_hangs() -> None:
    world = World().run()

    assert world.tick(100 * TIMEOUTS.start_s) == []


def test_machine_config_error_is_final_with_its_exit_code() -> None:
    world = World().run()
    refusal = ended(0, contract.EXIT_USAGE, kind="config", reason="ConfigError: the batch does not divide")
    world.report("node-0", state="failed", exits=(refusal,))

    (finish,) = find(world.until_settled(), Finish)

    assert finish.verdict.exit_code == contract.EXIT_USAGE
    assert "does not divide" in finish.verdict.reason


def test_machine_budget_spent_ends_with_the_cause() -> None:
    world = World(spec=job(max_restarts=1)).run()
    for _ in range(2):
        world.report("node-0", state="failed", exits=(ended(0, log_tail="last words"),))
        wanted = world.until_settled()

    (finish,) = find(wanted, Finish)
    assert finish.verdict.exit_code == contract.EXIT_FAILED
    assert "budget for crash" in finish.verdict.reason and "last words" in finish.verdict.reason


def test_machine_stop_without_checkpointer_ends_the_workers() -> None:
    world = World().run()

    wanted = world.until_settled(stop="signal SIGINT")

    assert find(wanted, Finish)[0].verdict.exit_code == contract.EXIT_STOPPED


def test_machine_stop_waits_for_the_save() -> None:
    world = World().run()
    progress = {number: rank(5) for number in range(4)}
    assert world.tick(stop="cancel", progress=progress) == []
    assert world.machine.desired("node-0")["action"] == "run"

    for node in world.spec.node_names:
        world.report(node, state="stopped")
    (finish,) = find(world.tick(), Finish)

    assert finish.verdict.exit_code == contract.EXIT_STOPPED


def test_machine_stop_not_reached_in_time_names_the_late_rank() -> None:
    world = World().run()
    progress = {0: rank(9), 1: rank(9), 2: rank(8), 3: rank(9)}
    world.tick(stop="cancel", progress=progress)

    wanted = world.tick(TIMEOUTS.stop_s + 1)
    world.obey()
    wanted += world.until_settled()

    (finish,) = find(wanted, Finish)
    assert finish.verdict.exit_code == contract.EXIT_FAILED and "rank 2" in finish.verdict.reason


def test_machine_stop_while_joining_ends_at_once() -> None:
    world = World()

    assert find(world.tick(stop="cancel"), Finish)[0].verdict.exit_code == contract.EXIT_STOPPED


def test_new_head_finds_the_attempt_running_adopts_it() -> None:
    world = World(unended_epoch=4)
    world.report("node-0", epoch=4, state="running", ranks=(0, 1), pid=10, store="127.0.0.2:1")
    assert world.tick() == []
    assert world.machine.desired("node-0")["action"] == "wait", "nobody is stopped before it is known what runs"
    world.report("node-1", epoch=4, state="running", ranks=(2, 3), pid=11)

    wanted = world.tick()

    assert find(wanted, Adopt) == [Adopt(4, {"node-0": (0, 1), "node-1": (2, 3)})]
    assert said(wanted, "head_adopted")
    assert world.machine.desired("node-1")["store"] == "127.0.0.2:1"


def test_new_head_finds_everything_gone_closes_the_attempt_and_starts_the_next() -> None:
    world = World(unended_epoch=4, next_epoch=5).join_all()

    wanted = world.tick()

    (close,) = find(wanted, Close)
    assert (close.epoch, close.outcome, close.cause) == (4, "failed", contract.CAUSE_ALL_LOST)
    assert find(wanted, Allocate) and world.machine.epoch == 5


def test_new_head_finds_half_of_the_attempt_stops_it_first() -> None:
    world = World(unended_epoch=4, next_epoch=5)
    world.report("node-0", epoch=4, state="running", ranks=(0, 1), pid=10)
    world.report("node-1", epoch=0, state="idle", pid=11)

    assert not find(world.tick(), Allocate)
    world.obey()

    assert find(world.tick(), Allocate)


def test_machine_third_failure_in_a_row_sets_the_step_aside_and_goes_on() -> None:
    world = World().run()
    world.machine.budgets = replace(world.machine.budgets, max_restarts=100, streak=2, committed=20)
    world.report("node-0", state="failed", exits=(ended(0, reason="ValueError: nan"),))

    wanted = world.until_settled(progress={0: rank(25)}, committed=20, trial=Trial(farthest=20, failures_left=1))

    assert find(wanted, Close)[0].own_fault
    assert find(wanted, Allocate) and not find(wanted, Finish)


def test_machine_failure_while_stopping_is_not_booked_on_the_step() -> None:
    world = World().run()
    world.report("node-0", state="failed", exits=(ended(0, reason="ValueError: nan"),))

    wanted = world.until_settled(progress={0: rank(25)}, stop="cancel")

    assert not find(wanted, Close)[0].own_fault


@pytest.mark.parametrize(("spec", "wait_s", "code"), [(job(), 120.0, 1), (in_pod(join_s=600.0), 600.0, 75)])
def test_machine_node_that_does_not_come_ends_the_wait_as_its_place_asks(
    spec: LaunchSpec, wait_s: float, code: int
) -> None:
    world = World(spec)
    world.report("node-0")

    assert world.tick(0.0) == world.tick(wait_s) == []
    (finish,) = world.tick(1.0)

    assert isinstance(finish, Finish)
    assert finish.verdict.exit_code == code
    assert finish.verdict.reason.startswith(f"not joined within {wait_s:g} s: supervisor of node-1")
