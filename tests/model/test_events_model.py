"""Workers, agents and heads die between any two messages, and the log has what was said: once, in order, all of it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ktrain.base import ids
from ktrain.base.control import LocalCaller
from ktrain.base.events import Event
from ktrain.checkpoint.coordinate import Coordinator
from ktrain.checkpoint.intake import Intake
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.pulse import Pulse
from ktrain.checkpoint.relay import newest_numbers
from ktrain.errors import ConflictError, KtrainError, UnavailableError
from ktrain.testing import invariants
from tests.unit.checkpoint.cluster import Cluster

NUM_NODES = 2
NODES = st.integers(0, NUM_NODES - 1)


class SlowLog:
    """What came in waits for the store; a head that dies loses it."""

    def __init__(self, written: list[Event]) -> None:
        self._written = written
        self._waiting: list[Event] = []
        self.num_emitted = 0

    def emit(self, event: Event) -> None:
        self.num_emitted += 1
        self._waiting.append(event)

    def num_waiting(self) -> int:
        return len(self._waiting)

    def flush(self) -> None:
        self._written += self._waiting
        self._waiting.clear()

    def close(self) -> None:
        self.flush()


class LoggedCluster(Cluster):
    """A cluster whose heads have a log that is slow."""

    def new_coordinator(self) -> Coordinator:
        self.log = SlowLog(self.events)
        intake = Intake(self.log, known=newest_numbers(self.events))
        return Coordinator(self.catalog, timeouts=self.timeouts, intake=intake, clock=self.clock)


class Line:
    """A worker's way to the agent that is there now; a test may lose answers."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        self._cluster = cluster
        self._node = node
        self.loses_answer = False

    def call(self, name: str, params: dict[str, object], *, timeout_s: float) -> dict[str, object]:
        caller = LocalCaller(self._cluster.nodes[self._node].keeper.handlers())
        answer = caller.call(name, params, timeout_s=timeout_s)
        if self.loses_answer:
            raise UnavailableError("the answer was lost")
        return answer


class Speaker:
    """A worker: its pulse without the thread, and what it has said."""

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self.rank = rank
        self.epoch = cluster.epoch
        self.line = Line(cluster, rank)
        self.pulse = Pulse(
            self.line,
            rank=rank,
            epoch=self.epoch,
            policies=Policies(),
            timeouts=cluster.timeouts,
            clock=cluster.clock,
        )
        self.num_said = 0
        self.num_given = 0  # that an agent is known to have

    def say(self) -> None:
        self.pulse.emit("step", step=self.num_said, loss=None, samples=self.rank)
        self.num_said += 1

    def beat(self, *, loses_answer: bool) -> None:
        self.line.loses_answer = loses_answer
        try:
            self.pulse._beat(news=True)
        except ConflictError:
            return  # of an older attempt
        except KtrainError:
            return
        self.num_given = self.pulse._outbox.num_taken


class Events(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("ktrain").setLevel(logging.CRITICAL)
        self.folder = Path(tempfile.mkdtemp(prefix="ktrain-model-"))
        self.cluster = LoggedCluster(self.folder, num_nodes=NUM_NODES, url=f"memory://{ids.random_id()}")
        self.speakers: list[Speaker] = []
        self.dead: list[Speaker] = []  # of whom an agent that lives has something

    def teardown(self) -> None:
        self.cluster.close()
        shutil.rmtree(self.folder)

    def logged(self, speaker: Speaker) -> list[int]:
        return [
            event.fields["step"]
            for event in self.cluster.events
            if event.kind == "step" and (event.fields["samples"], event.attempt) == (speaker.rank, speaker.epoch)
        ]

    # What may happen

    @initialize()
    def start(self) -> None:
        self.cluster.begin()
        self.speakers = [Speaker(self.cluster, rank) for rank in range(NUM_NODES)]

    @rule(rank=NODES, count=st.integers(1, 3))
    def rank_says(self, rank: int, count: int) -> None:
        for _ in range(count):
            self.speakers[rank].say()

    @rule(rank=NODES, loses_answer=st.booleans())
    def rank_pulses(self, rank: int, loses_answer: bool) -> None:
        self.speakers[rank].beat(loses_answer=loses_answer)

    @rule(node=NODES, loses_answer=st.booleans())
    def node_beats(self, node: int, loses_answer: bool) -> None:
        self.cluster.head.lose_answers = int(loses_answer)
        self.cluster.nodes[node].keeper.flush()
        self.cluster.head.lose_answers = 0

    @rule()
    def log_is_written(self) -> None:
        self.cluster.log.flush()

    @rule(node=NODES)
    def agent_is_replaced(self, node: int) -> None:
        found = self.cluster.nodes[node]
        self.cluster.head.is_away = True
        found.end_agent()
        self.cluster.head.is_away = False
        found.start_agent()
        self.dead = [speaker for speaker in self.dead if speaker.rank != node]

    @rule()
    def head_is_replaced(self) -> None:
        self.cluster.head.coordinator = self.cluster.new_coordinator()
        self.cluster.coordinator.adopt_attempt(self.cluster.epoch, self.cluster.assignment)

    @rule(lingers=st.booleans())
    def another_attempt_begins(self, lingers: bool) -> None:
        """Its workers are new; an old one that was stopped may say another word."""
        old = self.speakers
        self.dead += old
        self.start()
        for speaker in old if lingers else ():
            self.cluster.nodes[speaker.rank].keeper.flush()
            speaker.beat(loses_answer=False)

    # What must hold

    @invariant()
    def log_has_each_once_and_in_order(self) -> None:
        assert invariants.check_origins(self.cluster.events) == []

    @rule()
    def all_is_passed_on(self) -> None:
        """With everybody there, a few messages later the log has all that living workers said, and they forget it."""
        for _ in range(4):
            for speaker in self.speakers:
                speaker.beat(loses_answer=False)
            for node in self.cluster.nodes:
                node.keeper.flush()
            self.cluster.log.flush()
        for speaker in self.speakers:
            speaker.beat(loses_answer=False)
            assert self.logged(speaker) == list(range(speaker.num_said))
            assert len(speaker.pulse._outbox) == 0
        for speaker in self.dead:
            assert len(self.logged(speaker)) >= speaker.num_given
        self.dead = []


class EventsForLong(Events):
    """The same, for `make chaos`."""


# In every suite the same examples, in `make chaos` others each time. None is made shorter: that takes minutes.
_PHASES = [phase for phase in Phase if phase is not Phase.shrink]
_COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
TestEvents = Events.TestCase
TestEvents.settings = settings(_COMMON, max_examples=20, stateful_step_count=40, derandomize=True)
TestEventsForLong = pytest.mark.chaos(
    pytest.mark.timeout(900)(pytest.mark.usefixtures("undumped")(EventsForLong.TestCase))
)
TestEventsForLong.settings = settings(_COMMON, max_examples=300, stateful_step_count=50)
