"""Anything may happen to a job of two nodes, in any order; what must be restorable is restored.

The model knows which copies are good: it looks at what the nodes and the bucket hold and remembers what it spoilt.
A restore must choose the newest step of the line that has a good copy of every rank, never load a bad byte (the
workers compare them), never call a run fresh that has committed, and never remove the last good copy. Meanwhile the job
collects by some policy, steps are pinned, and somebody reads some: what is pinned, read or wanted must stay.
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
from ktrain.checkpoint.marks import pin_name, reader_name, remove_mark, write_mark
from ktrain.checkpoint.policy import Every, Keep, Policies
from ktrain.checkpoint.retention import AnyOf, Best, EverySeconds, EverySteps, Latest, Retention
from ktrain.format.manifest import Identity, bad_ranges
from tests.unit.checkpoint.cluster import Cluster, Node, RestoreFailed

NODES = st.integers(0, 1)
POLICIES = st.sampled_from(
    [
        Latest(1),
        Latest(3),
        AnyOf(Latest(2), EverySteps(40)),
        AnyOf(EverySteps(30), EverySeconds(20)),
        Best(2, "loss"),
    ]
)
Key = tuple[int, int]  # step, epoch


def key(identity: Identity) -> Key:
    return identity.step, identity.epoch


class Job(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("ktrain").setLevel(logging.CRITICAL)  # what is spoilt is warned of, many times
        self.folder = Path(tempfile.mkdtemp(prefix="ktrain-model-"))
        self.machines = 0
        self.spoilt_away: set[tuple[int, str, int, Key]] = set()
        self.cluster = Cluster(self.folder / "0", url=f"memory://{ids.random_id()}")
        self.step = 0
        self.base = 0  # what this attempt continued from
        self.line: set[Key] = set()  # what a restore may choose, complete or not
        self.spoilt: set[tuple[str, int, Key]] = set()  # (place, rank, key)
        self.durable: set[Key] = set()  # committed in the bucket, as the job was told
        self.policy: Retention = Latest(3)
        self.kept: dict[str, set[Key]] = {}  # mark -> what was in the bucket of its step when it was written
        self.is_over = False  # no good copy is left, or none can be told

    def teardown(self) -> None:
        self.cluster.close()
        shutil.rmtree(self.folder)

    # What the model knows

    def places(self) -> dict[str, set[tuple[int, Key]]]:
        """Place -> (rank, key) of the copies that lie there now."""
        found = {node.name: {(rank, key(at)) for rank, at in node.held()} for node in self.cluster.nodes}
        commits = self.cluster.catalog.listing().commits
        found["bucket"] = {(files.rank, key(commit.identity)) for commit in commits for files in commit.ranks}
        return found

    def restorable(self) -> set[Key]:
        """Steps of the line with a good copy of every rank."""
        good: dict[Key, set[int]] = {}
        for place, copies in self.places().items():
            for rank, at in copies:
                if at in self.line and (place, rank, at) not in self.spoilt:
                    good.setdefault(at, set()).add(rank)
        return {at for at, ranks in good.items() if ranks == {0, 1}}

    def forget_reused(self) -> None:
        """A copy that is gone is spoilt no more: the same place may get, or have got, a good one again."""
        places = self.places()
        self.spoilt = {
            (place, rank, at)
            for place, rank, at in self.spoilt
            if (rank, at) in places[place] and (place == "bucket" or self.is_bad(place, rank, at))
        }

    def is_bad(self, place: str, rank: int, at: Key) -> bool:
        node = next(node for node in self.cluster.nodes if node.name == place)
        identity = next(found for held, found in node.held() if (held, key(found)) == (rank, at))
        with node.volume.open(rank, identity) as slot:
            return any(bad_ranges(slot.manifest, slot.memory))

    # What may happen

    @initialize(policy=POLICIES)
    def start(self, policy: Retention) -> None:
        self.policy = policy
        self.cluster.policies = Policies(Every(10), Keep(bucket=policy))
        assert self.cluster.restore() == 0

    @precondition(lambda self: not self.is_over)
    @rule(drains=st.booleans())
    def train_and_save(self, drains: bool) -> None:
        self.save(drains)

    @precondition(lambda self: not self.is_over)
    @rule(count=st.integers(2, 4))
    def train_on_so_that_steps_are_collected(self, count: int) -> None:
        for _ in range(count):
            self.save(True)

    def save(self, drains: bool) -> None:
        self.step += 10
        self.cluster.drains = drains
        if all(worker.save(self.cluster.catalog.run_id, self.step, 2) for worker in self.cluster.workers):
            epoch = self.cluster.epoch  # its first commit cuts off what older attempts had made beyond its start
            self.line = {at for at in self.line if at[0] <= self.base or at[1] == epoch} | {(self.step, epoch)}
        self.cluster.turn(5)
        self.note_durable()

    @precondition(lambda self: not self.is_over)
    @rule(rank=NODES)
    def one_rank_saves_and_all_processes_die(self, rank: int) -> None:
        self.cluster.workers[rank].save(self.cluster.catalog.run_id, self.step + 10, 2)
        self.restart()

    @precondition(lambda self: not self.is_over)
    @rule()
    def all_processes_die(self) -> None:
        self.restart()

    @precondition(lambda self: not self.is_over)
    @rule(node=NODES)
    def node_is_lost(self, node: int) -> None:
        self.cluster.lose_node(node)
        self.restart()

    @precondition(lambda self: not self.is_over)
    @rule()
    def job_moves_to_other_machines(self) -> None:
        """There are two sets of machines; what lies in the memory of the other set is found when the job comes back."""
        cluster = self.cluster
        for node in cluster.nodes:
            node.close()
            cluster.coordinator.forget_node(node.name)
        away = {(self.machines, place, rank, at) for place, rank, at in self.spoilt if place != "bucket"}
        self.spoilt_away |= away
        self.machines = 1 - self.machines
        cluster.folder = self.folder / str(self.machines)
        cluster.nodes = [Node(cluster, node.name) for node in cluster.nodes]
        here = {entry[1:] for entry in self.spoilt_away if entry[0] == self.machines}
        self.spoilt = {entry for entry in self.spoilt if entry[0] == "bucket"} | here
        self.spoilt_away = {entry for entry in self.spoilt_away if entry[0] != self.machines}
        self.restart()

    @precondition(lambda self: not self.is_over)
    @rule()
    def head_is_replaced_by_an_empty_one(self) -> None:
        self.cluster.head.coordinator = self.cluster.new_coordinator()
        self.cluster.coordinator.adopt_attempt(self.cluster.epoch, self.cluster.assignment)
        self.cluster.turn(3)
        self.note_durable()

    @precondition(lambda self: not self.is_over)
    @rule(node=NODES, rank=NODES)
    def newest_copy_in_memory_is_spoilt(self, node: int, rank: int) -> None:
        held = [at for found, at in self.cluster.nodes[node].held() if found == rank]
        place = self.cluster.nodes[node].name
        if held:
            newest = max(held, key=lambda at: (at.epoch, at.step))
            if (place, rank, key(newest)) not in self.spoilt:
                self.cluster.spoil_memory(node, rank, newest.step)
                self.spoilt.add((place, rank, key(newest)))

    @precondition(lambda self: not self.is_over)
    @rule(rank=NODES)
    def newest_copy_in_the_bucket_is_spoilt(self, rank: int) -> None:
        commits = self.cluster.catalog.listing().commits
        if commits and ("bucket", rank, key(commits[-1].identity)) not in self.spoilt:
            newest = key(commits[-1].identity)
            if [key(commit.identity) for commit in commits].count(newest) == 1:
                self.cluster.spoil_bucket(newest[0], rank)
                self.spoilt.add(("bucket", rank, newest))

    @precondition(lambda self: not self.is_over)
    @rule(index=st.integers(0, 3), is_pin=st.booleans())
    def step_in_the_bucket_is_pinned_or_read_and_training_goes_on(self, index: int, is_pin: bool) -> None:
        there = sorted(self.in_bucket())
        if there:
            step = there[index % len(there)][0]
            name = pin_name(step) if is_pin else reader_name(str(step))
            write_mark(self.cluster.catalog, name, {"step": step, "who": "the model", "renew_s": 600})
            self.kept[name] = {at for at in there if at[0] == step}
            self.train_on_so_that_steps_are_collected(2)

    @precondition(lambda self: self.kept and not self.is_over)
    @rule(index=st.integers(0, 5))
    def pin_or_reader_goes(self, index: int) -> None:
        name = sorted(self.kept)[index % len(self.kept)]
        remove_mark(self.cluster.catalog, name)
        del self.kept[name]

    @precondition(lambda self: self.is_over)
    @rule()
    def nothing_more_can_happen(self) -> None:
        """A machine needs a rule that it can follow."""

    # What must hold

    def in_bucket(self) -> set[Key]:
        return {key(commit.identity) for commit in self.cluster.catalog.listing().commits}

    @invariant()
    def what_is_pinned_or_read_stays(self) -> None:
        there = self.in_bucket()
        assert all(kept <= there for kept in self.kept.values())

    def note_durable(self) -> None:
        found = self.cluster.coordinator.committed().get("bucket")
        if found is not None:
            self.durable.add(found)
        self.forget_reused()

    def restart(self) -> None:
        self.cluster.turn(0)
        self.forget_reused()
        expected = max(self.restorable(), default=None)
        ever_durable = bool(self.durable)
        try:
            found = self.cluster.restore()
        except RestoreFailed as error:
            assert expected is None, f"step {expected} has good copies of every rank: {error}"
            assert error.kind == "corruption"
            self.is_over = True
            return
        assert found == (0 if expected is None else expected[0])
        if expected is None:
            assert not ever_durable, "the run has committed, and was called fresh"
        self.step = self.base = found
        self.note_durable()

    @invariant()
    def newest_durable_step_of_the_line_is_in_the_bucket(self) -> None:
        told = self.durable & self.line
        if told:
            assert max(told) in self.in_bucket()

    @invariant()
    def every_record_names_files_that_are_there(self) -> None:
        names = {stored.name for stored in self.stored()}
        for commit in self.cluster.catalog.listing().commits:
            assert all({files.payload, files.manifest} <= names for files in commit.ranks)

    def stored(self) -> list:  # type: ignore[type-arg]
        catalog = self.cluster.catalog
        return catalog.tier.list("checkpoints", deadline=catalog.transfer_deadline(0))


class JobForLong(Job):
    """The same, for `make chaos`."""


# In every suite the same examples, in `make chaos` others each time. None is made shorter: that takes minutes.
_PHASES = [phase for phase in Phase if phase is not Phase.shrink]
_COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
TestJob = Job.TestCase
TestJob.settings = settings(_COMMON, max_examples=25, stateful_step_count=15, derandomize=True)
TestJobForLong = pytest.mark.chaos(pytest.mark.timeout(900)(pytest.mark.usefixtures("undumped")(JobForLong.TestCase)))
TestJobForLong.settings = settings(_COMMON, max_examples=60, stateful_step_count=20)
