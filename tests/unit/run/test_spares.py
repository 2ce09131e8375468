"""More nodes than ranks, nodes that are taken away, nodes that are given back: the machine and what it decides from."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base import contract
from ktrain.base.job import LaunchSpec
from ktrain.run.rendezvous import assign_ranks
from ktrain.run.states import Action, Adopt, Allocate, Finish, Say, State
from tests.unit.run.builders import TIMEOUTS, World, ended, in_pod, job, rank

SPARE = replace(job(), spares=1)  # node-0 and node-1 carry, node-2 waits


def find(actions: list[Action], kind: type) -> list:
    return [action for action in actions if isinstance(action, kind)]


def said(actions: list[Action], kind: str) -> list[dict]:
    return [action.fields for action in find(actions, Say) if action.kind == kind]


def lose(world: World, *nodes: str, told: bool = False) -> list[Action]:
    for node in nodes:
        del world.reports[node]
    gone = frozenset(nodes)
    return world.until_settled(lost=gone, told=gone if told else frozenset())


# Spares


def test_spare_waits_while_the_first_nodes_carry_the_ranks() -> None:
    world = World(SPARE).run()

    assert world.machine.state is State.RUNNING
    assert set(world.machine.assignment) == {"node-0", "node-1"}
    assert world.machine.desired("node-2")["action"] == "stop" and world.reports["node-2"].state == "idle"


def test_spare_takes_the_place_of_a_lost_node_at_once() -> None:
    world = World(SPARE).run()

    wanted = lose(world, "node-1")

    (allocate,) = find(wanted, Allocate)
    assert allocate.assignment == {"node-0": (0, 1), "node-2": (2, 3)}
    assert world.machine.state is State.RUNNING and world.now_s < TIMEOUTS.lease_s


def test_lost_node_that_comes_back_is_the_next_spare() -> None:
    world = World(SPARE).run()
    lose(world, "node-1")
    world.report("node-1", pid=99)
    assert world.tick(lost=frozenset()) == [], "the attempt goes on where it is"
    assert world.machine.desired("node-1")["action"] == "stop"

    wanted = lose(world, "node-0")

    assert find(wanted, Allocate)[0].assignment == {"node-1": (0, 1), "node-2": (2, 3)}


def test_lost_spare_disturbs_nobody() -> None:
    world = World(SPARE).run()

    assert lose(world, "node-2") == []
    assert world.machine.state is State.RUNNING and world.machine.epoch == 1


def test_start_does_not_wait_longer_than_a_lease_for_the_first_nodes() -> None:
    world = World(SPARE)
    world.report("node-0", pid=10)
    world.report("node-2", pid=12)

    assert world.tick() == []
    (allocate,) = find(world.tick(TIMEOUTS.lease_s + 0.1), Allocate)

    assert allocate.assignment == {"node-0": (0, 1), "node-2": (2, 3)}


def test_container_that_is_started_again_is_waited_for_because_its_volume_is_there() -> None:
    world = World(SPARE).run()
    del world.reports["node-1"]  # seen to die alone; its agent lives

    assert not find(world.until_settled(), Allocate)
    world.report("node-1", pid=99)

    assert find(world.tick(), Allocate)[0].assignment == {"node-0": (0, 1), "node-1": (2, 3)}


def test_ranks_go_where_their_snapshots_are_also_to_a_former_spare() -> None:
    world = World(SPARE).run()
    holdings = {"node-0": {0: 20, 1: 20}, "node-2": {2: 20, 3: 20}}
    world.report("node-0", state="failed", exits=(ended(0),))

    wanted = world.until_settled(holdings=holdings)

    assert find(wanted, Allocate)[0].assignment == {"node-0": (0, 1), "node-2": (2, 3)}


def test_too_few_nodes_with_their_spares_wait_for_one() -> None:
    world = World(SPARE).run()

    assert not find(lose(world, "node-1", "node-2"), Allocate)
    (finish,) = find(world.tick(TIMEOUTS.start_s + 1), Finish)

    assert "supervisor of node-1" in finish.verdict.reason and "node-2" in finish.verdict.reason


def test_new_head_adopts_the_carriers_and_lets_the_spare_wait() -> None:
    world = World(SPARE, unended_epoch=4)
    world.report("node-2", epoch=0, state="idle", pid=12)
    world.report("node-0", epoch=4, state="running", ranks=(0, 1), pid=10)
    assert world.tick() == [], "two nodes are there, and the one that runs may be about to speak"
    world.report("node-1", epoch=4, state="running", ranks=(2, 3), pid=11)

    wanted = world.tick()

    assert find(wanted, Adopt) == [Adopt(4, {"node-0": (0, 1), "node-1": (2, 3)})]


def test_silent_node_whose_last_word_was_running_does_not_block_the_spare() -> None:
    world = World(SPARE).run()
    world.report("node-1", silent_s=3 * TIMEOUTS.lease_s + 1)

    wanted = world.tick() + world.until_settled()

    assert find(wanted, Allocate)[0].assignment == {"node-0": (0, 1), "node-2": (2, 3)}


_HELD = st.dictionaries(st.integers(0, 3), st.sampled_from([10, 20]), max_size=4)


@given(st.lists(_HELD, min_size=2, max_size=4))
def test_assign_ranks_with_spares_is_as_good_as_any_choice(held: list[dict[int, int]]) -> None:
    nodes = [f"node-{index}" for index in range(len(held))]
    newest = {rank: max(item.get(rank, -1) for item in held) for rank in range(4)}

    def hits(chosen: list[int]) -> int:
        """`chosen` is block -> node index."""
        return sum(
            held[node].get(rank) == newest[rank]
            for block, node in enumerate(chosen)
            for rank in (2 * block, 2 * block + 1)
            if newest[rank] >= 0
        )

    found = assign_ranks(nodes, 2, dict(zip(nodes, held, strict=True)), num_blocks=2)

    assert sorted(rank for block in found.values() for rank in block) == [0, 1, 2, 3]
    by_block = sorted(found, key=lambda node: found[node])
    assert hits([nodes.index(node) for node in by_block]) == max(
        hits(list(pair)) for pair in permutations(range(len(held)), 2)
    )


# Nodes that are taken away: exit 76


@pytest.mark.parametrize(
    ("told", "code"), [(True, contract.EXIT_AGAIN_FREE), (False, contract.EXIT_AGAIN)], ids=["told", "died"]
)
def test_nodes_that_do_not_come_back_are_asked_for_anew_and_counted_by_why_they_went(told: bool, code: int) -> None:
    world = World(in_pod(join_s=600.0)).run()
    lose(world, "node-1", told=told)

    (finish,) = find(world.tick(601.0), Finish)

    assert finish.verdict.exit_code == code


def test_one_node_taken_and_one_dead_is_counted() -> None:
    world = World(in_pod(join_s=600.0)).run()
    world.reports.clear()
    world.until_settled(lost=frozenset({"node-0", "node-1"}), told=frozenset({"node-1"}))

    assert find(world.tick(601.0), Finish)[0].verdict.exit_code == contract.EXIT_AGAIN


def test_disruption_costs_no_budget_and_ends_no_row_of_failures() -> None:
    world = World(in_pod()).run()
    world.machine.budgets = replace(world.machine.budgets, spent={"node-lost": 3}, streak=2, committed=20)
    before = world.machine.budgets

    wanted = lose(world, "node-1", told=True)

    (failure,) = said(wanted, "failure")
    assert failure["cause"] == contract.CAUSE_NODE_LOST and "told to end" in failure["reason"]
    assert world.machine.budgets == before and not find(wanted, Finish)


def test_trainer_that_is_told_to_end_is_no_crash_of_its_supervisor() -> None:
    world = World(in_pod()).run()
    del world.reports["node-1"]  # its agent, a sidecar, still lives

    wanted = world.until_settled(told=frozenset({"node-1"}))

    (failure,) = said(wanted, "failure")
    assert (failure["cause"], failure["node"]) == (contract.CAUSE_NODE_LOST, "node-1")
    assert world.machine.budgets.spent == {}


# Nodes that are given back: exit 74


def fail_on(world: World, node: str, number: int, reason: str, committed: int) -> list[Action]:
    """A worker of the node ends by itself; a step was committed since the last time."""
    world.report(node, state="failed", exits=(ended(number, reason=reason, node=node),))
    return world.until_settled(progress={number: rank(committed + 1, node=node)}, committed=committed)


def test_second_failure_in_a_row_on_one_node_gives_its_pod_back() -> None:
    world = World(in_pod()).run()
    fail_on(world, "node-1", 2, "ValueError: nan", 10)
    assert world.machine.desired("node-1")["action"] == "run"

    wanted = fail_on(world, "node-1", 3, "ValueError: nan", 20)

    assert world.machine.desired("node-1")["action"] == "replace" and world.machine.is_suspect("node-1")
    assert world.machine.desired("node-0")["action"] == "stop" and not world.machine.is_suspect("node-0")
    assert "74" in said(wanted, "notice")[0]["message"] and not find(wanted, Allocate)
    del world.reports["node-1"]
    assert world.tick() == []
    world.report("node-1", pid=99, epoch=0, state="idle", exits=())
    assert find(world.tick(), Allocate)[0].assignment == {"node-0": (0, 1), "node-1": (2, 3)}
    assert not world.machine.is_suspect("node-1")


@pytest.mark.parametrize("second", ["node-0", "node-1"])
def test_failures_on_different_nodes_or_from_outside_blame_nobody(second: str) -> None:
    world = World(in_pod()).run()
    fail_on(world, "node-1", 2, "ValueError: nan", 10)
    code = 1 if second == "node-0" else -9  # killed from outside
    number = 0 if second == "node-0" else 2
    world.report(second, state="failed", exits=(ended(number, code, node=second),))

    wanted = world.until_settled(progress={number: rank(21)}, committed=20)

    assert find(wanted, Allocate) and not said(wanted, "notice")


@pytest.mark.parametrize(
    "reason",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "AcceleratorError: CUDA error: no CUDA-capable device is detected",
    ],
)
def test_device_that_says_it_is_broken_gives_its_pod_back_at_once(reason: str) -> None:
    world = World(in_pod()).run()

    fail_on(world, "node-0", 0, reason, 10)

    assert world.machine.desired("node-0")["action"] == "replace"


@pytest.mark.parametrize(("reason", "action"), [("ValueError: nan", "run"), ("CUDA error: GPU is lost", "replace")])
def test_only_node_of_a_job_is_blamed_by_its_device_alone(reason: str, action: str) -> None:
    world = World(replace(in_pod(), nodes=1)).run()
    fail_on(world, "node-0", 0, "ValueError: nan", 10)

    fail_on(world, "node-0", 0, reason, 20)

    assert world.machine.desired("node-0")["action"] == action, "its memory has no copy elsewhere"


def test_spare_takes_the_place_of_a_suspect_at_once() -> None:
    world = World(replace(in_pod(), spares=1)).run()

    wanted = fail_on(world, "node-0", 0, "CUDA error: uncorrectable ECC error encountered", 10)

    assert find(wanted, Allocate)[0].assignment == {"node-1": (2, 3), "node-2": (0, 1)}
    assert world.machine.desired("node-0")["action"] == "replace", "also while the others train"


def test_machine_of_ones_own_is_kept() -> None:
    world = World(job()).run()

    wanted = fail_on(world, "node-0", 0, "CUDA error: uncorrectable ECC error encountered", 10)

    assert find(wanted, Allocate) and world.machine.desired("node-0")["action"] == "run"


@pytest.mark.parametrize("spec", [SPARE, replace(in_pod(), spares=2)])
def test_job_with_spares_survives_its_file(spec: LaunchSpec) -> None:
    assert spec.node_names[-1] == f"node-{1 + spec.spares}" and spec.world_size == 4
    assert LaunchSpec.from_json(spec.to_json()) == spec
