"""Anything may happen to the replicas of three nodes, in any order; they catch up, and a lost node loses no step.

Nothing is drained: what the peers hold is all that a lost node leaves.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktrain.base import ids
from ktrain.base.control import LocalCaller
from ktrain.errors import UnavailableError
from ktrain.format.manifest import Identity
from tests.unit.checkpoint.cluster import Cluster

NUM_NODES = 3
NODES = st.integers(0, NUM_NODES - 1)
MAX_SAVES_BEHIND = 2 * NUM_NODES + 1  # each node pulls once for the step that is wanted, and once for the one before
CATCH_UP_TURNS = 12  # a pull that failed is tried again after `call_s`, of which one turn takes a seventh


class Replicas(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("ktrain").setLevel(logging.CRITICAL)
        self.folder = Path(tempfile.mkdtemp(prefix="ktrain-model-"))
        self.cluster = Cluster(self.folder, num_nodes=NUM_NODES, url=f"memory://{ids.random_id()}")
        self.cluster.drains = False
        self.step = 0
        self.is_copy_bad = False  # found bad since the nodes were last seen to catch up
        self.cannot_pull: set[str] = set()  # owners whose pieces do not come through

    def teardown(self) -> None:
        self.cluster.close()
        shutil.rmtree(self.folder)

    def peer(self) -> int:
        return self.cluster.committed().get("peer", 0)

    def cut(self, node: str, begin: int, end: int) -> None:
        if node in self.cannot_pull:
            raise UnavailableError(f"{node} does not answer")

    # What may happen

    @initialize()
    def start(self) -> None:
        assert self.cluster.restore() == 0
        self.cluster.wire.before_piece = self.cut

    @rule()
    def all_save(self) -> None:
        self.step += 10
        for worker in self.cluster.workers:
            worker.save(self.cluster.catalog.run_id, self.step, NUM_NODES)

    @rule(rank=NODES)
    def all_but_one_save(self, rank: int) -> None:
        self.step += 10
        for worker in self.cluster.workers:
            if worker.rank != rank:
                worker.save(self.cluster.catalog.run_id, self.step, NUM_NODES)

    @rule(rank=NODES)
    def rank_pulses(self, rank: int) -> None:
        self.cluster.workers[rank].pulse()

    @rule(node=NODES)
    def node_beats(self, node: int) -> None:
        self.cluster.nodes[node].keeper.flush()

    @rule(node=NODES)
    def node_pulls(self, node: int) -> None:
        self.cluster.nodes[node].carry(drain=False)

    @rule(num=st.integers(1, 3))
    def time_goes_on_for_all(self, num: int) -> None:
        self.cluster.turn(num)

    @rule(node=NODES)
    def pulls_from_a_node_fail(self, node: int) -> None:
        self.cannot_pull.add(self.cluster.nodes[node].name)

    @rule()
    def pulls_work_again(self) -> None:
        self.cannot_pull.clear()

    @rule(node=NODES)
    def agent_is_replaced(self, node: int) -> None:
        found = self.cluster.nodes[node]
        self.cluster.head.is_away = True
        found.end_agent()
        self.cluster.head.is_away = False
        found.start_agent()
        self.cluster.workers[node].caller = LocalCaller(found.keeper.handlers())

    @rule()
    def head_is_replaced_by_an_empty_one(self) -> None:
        self.cluster.head.coordinator = self.cluster.new_coordinator()
        self.cluster.coordinator.adopt_attempt(self.cluster.epoch, self.cluster.assignment)

    @rule(rank=NODES)
    def newest_own_copy_is_found_bad(self, rank: int) -> None:
        """Before its replica was: one that lies with a peer as well may be lost with that peer, which is two faults."""
        held = [at for found, at in self.cluster.nodes[rank].held() if found == rank and at.step > self.peer()]
        newest = max(held, key=lambda at: (at.epoch, at.step), default=None)
        if newest is not None and len(self.holders()[newest][rank]) == 1:
            self.cluster.nodes[rank].volume.discard(rank, newest, "the model")
            self.is_copy_bad = True

    @precondition(lambda self: self.peer() > 0)
    @rule(node=NODES)
    def node_is_lost_and_the_job_restarts(self, node: int) -> None:
        self.cannot_pull.clear()
        promised = self.peer()
        self.cluster.lose_node(node)
        found = self.cluster.restore()
        assert found >= promised, f"step {promised} was committed among peers, and {found} was restored"
        self.step = max(self.step, found)

    @rule(order=st.permutations(range(NUM_NODES)))
    def training_is_faster_than_replication(self, order: list[int]) -> None:
        """Between two saves a single node pulls: no two of them are ever asked at the same newest step."""
        self.peers_catch_up()
        for turn in range(4 * NUM_NODES):
            self.all_save()
            self.all_speak()
            self.all_speak()
            pulling = self.cluster.nodes[order[turn % NUM_NODES]]
            pulling.keeper.flush()
            pulling.carry(drain=False)
            pulling.keeper.flush()
        assert self.peer() >= self.step - MAX_SAVES_BEHIND * 10

    def all_speak(self) -> None:
        for worker, node in zip(self.cluster.workers, self.cluster.nodes, strict=True):
            worker.pulse()
            node.keeper.flush()
        for worker in self.cluster.workers:
            worker.pulse()

    # What must hold

    def holders(self) -> dict[Identity, dict[int, set[str]]]:
        found: dict[Identity, dict[int, set[str]]] = {}
        for node in self.cluster.nodes:
            for rank, at in node.held():
                found.setdefault(at, {}).setdefault(rank, set()).add(node.name)
        return found

    @invariant()
    def any_one_node_may_be_lost(self) -> None:
        promised = self.peer()
        for lost in self.cluster.nodes:
            left = [
                at
                for at, ranks in self.holders().items()
                if at.step >= promised and all(ranks.get(rank, set()) - {lost.name} for rank in range(NUM_NODES))
            ]
            assert not promised or left, f"without {lost.name} nothing is left of step {promised} or newer"

    @rule()
    def peers_catch_up(self) -> None:
        """With all nodes there, a save and a few turns later they hold the newest step, whatever happened before.

        Beside a drain that stands still; but where a rank's own copy went bad, its step, the one among peers, the
        drain's and a newer one that others skipped can be all slots of a rank, and the drain has to go on.
        """
        self.cannot_pull.clear()
        self.cluster.drains, self.is_copy_bad = self.is_copy_bad, False
        self.cluster.turn(CATCH_UP_TURNS)
        self.all_save()
        self.cluster.turn(2 * CATCH_UP_TURNS)
        assert self.cluster.committed().get("memory") == self.step, "no slot was free for a save"
        assert self.peer() == self.step
        self.cluster.drains = False


def test_agent_that_is_new_does_not_free_the_slot_of_a_step_that_peers_keep() -> None:
    model = Replicas()
    try:
        model.start()
        model.peers_catch_up()
        model.all_save()
        model.newest_own_copy_is_found_bad(0)
        model.training_is_faster_than_replication([1, 2, 0])
        model.agent_is_replaced(2)  # the agent had not told its volume yet which step the peers hold
        model.rank_pulses(2)  # the new one has not heard from the head
        model.all_but_one_save(1)
        model.any_one_node_may_be_lost()
    finally:
        model.teardown()


def test_step_of_which_a_snapshot_is_gone_keeps_no_slot_from_the_next_save() -> None:
    model = Replicas()
    try:
        model.start()
        model.all_save()
        model.all_save()
        model.training_is_faster_than_replication([0, 2, 1])
        model.rank_pulses(1)
        model.newest_own_copy_is_found_bad(0)  # the newest committed in memory, before a peer had it
        for _ in range(5):
            model.all_save()
        model.peers_catch_up()
    finally:
        model.teardown()


class ReplicasForLong(Replicas):
    """The same, for `make chaos`."""


# In every suite the same examples, in `make chaos` others each time. None is made shorter: that takes minutes.
_PHASES = [phase for phase in Phase if phase is not Phase.shrink]
_COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(_COMMON, max_examples=15, stateful_step_count=20, derandomize=True)
TestReplicasForLong = pytest.mark.chaos(
    pytest.mark.timeout(900)(pytest.mark.usefixtures("undumped")(ReplicasForLong.TestCase))
)
TestReplicasForLong.settings = settings(_COMMON, max_examples=150, stateful_step_count=30)
