"""Who can die, and when: a worker, an agent, a head, a node, or all; before, during and after each phase.

The deaths of whoever calls the store, at each of its calls, are in `store`. What only real processes show (locks that
die with them, processes that are stopped, signals) is in `elsewhere`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ktrain.errors import UnavailableError
from ktrain.snapshot.slots import SlotCalls
from ktrain.testing.faulty_tier import Killed
from ktrain.testing.local_transport import LocalWire
from tests.faults.job import NEWEST, Alarm, Job, Resumed, ThreadDied, WorkerDied
from tests.faults.model import Case

NEXT = 30
MEMORY = ("memory", "memory")
BUCKET = ("bucket", "bucket")
TORN = "a slot without its manifest counts for nothing"


class DiesAt(SlotCalls):
    """A process that dies after one step of a writer."""

    def __init__(self, step: str) -> None:
        self._step: str | None = step

    def reached(self, step: str) -> None:
        if step == self._step:
            self._step = None
            raise Killed(step)


def cases() -> Iterator[Case]:
    yield from _worker_while_saving()
    yield from _worker_while_restoring()
    yield from _agent_while_replicating()
    yield from _head_or_all_at_a_turn()
    yield from _nodes()


def _worker_while_saving() -> Iterator[Case]:
    """Rank 0 dies; rank 1 has sealed the same step before."""
    slot_steps = {"leased": "stage", "grown": "stage", "mapped": "stage", "unsealed": "stage"}
    slot_steps |= {"manifest-written": "seal", "sealed": "seal", "unleased": "seal"}

    def at_slot_step(step: str) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.save_of(job.workers[1], NEXT)
            job.use_calls(0, DiesAt(step))
            _dies(lambda: job.save_of(job.workers[0], NEXT))

        return play

    for step, phase in slot_steps.items():
        done = step in ("sealed", "unleased")
        end = Resumed(NEXT if done else NEWEST, MEMORY)
        how = "the step is complete, though nobody was told" if done else TORN
        yield Case("worker dies", "memory", phase, f"slot {step}", at_slot_step(step), end, how=how)

    def in_the_copy(moment: str) -> Callable[[Job], None]:
        def die(found: str) -> None:
            if found == moment:
                raise Killed(moment)

        def play(job: Job) -> None:
            job.save_of(job.workers[1], NEXT)
            job.workers[0].reached = die
            _dies(lambda: job.save_of(job.workers[0], NEXT))

        return play

    for moment in ("half staged", "staged"):
        end = Resumed(NEWEST, MEMORY)
        yield Case("worker dies", "memory", "stage", f"bytes {moment}", in_the_copy(moment), end, how=TORN)

    def alone(job: Job) -> None:
        job.save_of(job.workers[0], NEXT)
        job.turn(4)

    how = "only snapshots of all ranks make a checkpoint"
    yield Case("mixed steps", "memory", "seal", "rank 1 never sealed its part", alone, Resumed(NEWEST, MEMORY), how=how)


def _dies(act: Callable[[], object]) -> None:
    try:
        act()
    except WorkerDied:
        return
    raise AssertionError("the worker did not die: it never came to this point")


def _worker_while_restoring() -> Iterator[Case]:
    def after(turns: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.end_processes()
            job.begin()
            job.turn(turns)

        return play

    for turns in range(1, 7):
        point = f"all workers, {turns} beats after the restore began"
        how = "the next attempt agrees anew; what was restored is recorded before it is applied"
        yield Case("worker dies", "memory", "restore", point, after(turns), Resumed(NEWEST, MEMORY), how=how)


def _agent_while_replicating() -> Iterator[Case]:
    """The agent of node 1 pulls rank 0's step; then node 0 is lost, so that the replica is needed."""
    end = Resumed(NEXT, ("peer", "memory"))
    how = "a new agent finds what lies in the volume, and pulls again"

    def at_slot_step(step: str) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.nodes[1].agent_calls = DiesAt(step)
            job.replace_agent(1)
            job.save_until_drained(NEXT)
            job.lose_node(0)

        return play

    for step in ("leased", "unsealed", "manifest-written", "sealed", "unleased"):
        yield Case("agent dies", "peer", "replicate", f"landing, slot {step}", at_slot_step(step), end, how=how)

    def of_the_puller(job: Job) -> None:
        _interrupt_a_piece(job, Killed("the puller"))
        job.save_until_drained(NEXT)
        job.lose_node(0)

    yield Case("agent dies", "peer", "replicate", "a piece is on its way", of_the_puller, end, how=how)

    def of_the_thread(job: Job) -> None:
        _interrupt_a_piece(job, ThreadDied("the thread that pulls"))
        job.save_until_drained(NEXT)
        job.lose_node(0)

    how_thread = "the thread's loop records it and takes the next wanted state"
    yield Case("thread dies", "peer", "replicate", "a piece is on its way", of_the_thread, end, how=how_thread)

    def of_the_owner(job: Job) -> None:
        _interrupt_a_piece(job, UnavailableError("the owner of the snapshot is gone"))
        job.save(NEXT)
        job.turn(2)
        job.replace_agent(0)
        job.turn(20)
        job.lose_node(0)

    seen: frozenset[Alarm] = frozenset({("save_skipped", "peer", 0, NEXT)})
    yield Case("agent dies", "peer", "replicate", "the owner's, while it is read", of_the_owner, end, seen)

    def cut(job: Job) -> None:
        job.wire.cut.add("node-0")
        job.save(NEXT)
        job.turn(30)
        job.wire.cut.clear()
        job.lose_all()

    how = "no replica is asked of a node without a wire; that it is gone is said by the wire's keeper"
    yield Case("network cut", "peer", "replicate", "a node that no other reaches", cut, Resumed(NEXT, BUCKET), how=how)

    def cut_for_a_save(job: Job) -> None:
        job.wire.before_piece = lambda node, begin, end: _unreachable(node, begin, end) if node == "node-0" else None
        job.save(NEXT)
        job.turn(8)
        job.wire.before_piece = LocalWire().before_piece
        for step in (40, 50):
            job.save(step)
            job.turn(40)
        job.lose_node(0)

    point = "one node's pulls during one save; two saves later the other node is lost"
    yield Case("network cut", "peer", "replicate", point, cut_for_a_save, Resumed(50, ("peer", "memory")), seen)

    def cut_beside_a_drain(job: Job) -> None:
        job.drains = False
        cut_for_a_save(job)
        job.drains = True

    # The drain is lost with the node: replicas of newer steps have taken the slot of its step (ADR 0022).
    drain: set[Alarm] = {("tier_failed", "bucket", None, NEXT), ("tier_recovered", "bucket", None, None)}
    end = Resumed(50, ("peer", "memory"))
    point = "the same, beside a drain that does not end before"
    yield Case("network cut", "peer", "replicate", point, cut_beside_a_drain, end, seen | drain)

    def cut_for_good(job: Job) -> None:
        job.lose_node(0)
        job.wire.before_piece = _unreachable

    seen = frozenset({("notice", "peer", 0, NEWEST)})
    end = Resumed(NEWEST, ("bucket", "memory"))
    yield Case("network cut", "peer", "restore", "the peer that holds the replica", cut_for_good, end, seen)


def _interrupt_a_piece(job: Job, error: BaseException) -> None:
    """Of rank 0's snapshot, once."""
    left = [error]

    def before(node: str, begin: int, end: int) -> None:
        if node == "node-0" and left:
            raise left.pop()

    job.wire.before_piece = before


def _unreachable(node: str, begin: int, end: int) -> None:
    raise UnavailableError(f"{node}: cut")


def _head_or_all_at_a_turn() -> Iterator[Case]:
    def head_after(turns: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.save(NEXT)
            job.turn(turns)
            job.replace_head()
            job.turn(8)
            job.lose_all()

        return play

    for turns, phase in ((0, "seal"), (1, "replicate"), (2, "drain"), (3, "commit"), (4, "collect")):
        point = f"{turns} beats after the save"
        how = "a new head derives what is committed from what the nodes hold"
        yield Case("head dies", "all", phase, point, head_after(turns), Resumed(NEXT, BUCKET), how=how)

    def all_after(turns: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.save(NEXT)
            job.turn(turns)
            for index in (0, 1):
                job.replace_agent(index)
            job.replace_head()

        return play

    for turns in range(5):
        point = f"{turns} beats after the save"
        how = "memory is found by looking"
        end = Resumed(NEXT, MEMORY)
        yield Case("all processes die", "memory", "replicate", point, all_after(turns), end, how=how)


def _nodes() -> Iterator[Case]:
    def one(job: Job, moment: str) -> None:
        job.drains = False
        if moment == "stage":
            job.save_of(job.workers[1], NEXT)
        else:
            job.save(NEXT)
        if moment == "replicate":
            job.turn(4)
        job.drains = True
        job.lose_node(0)

    lost = "a part of the step is nowhere; the newest that is complete is taken"
    kept = "the peer has its part"
    for moment, step, how in (("stage", NEWEST, lost), ("seal", NEWEST, lost), ("replicate", NEXT, kept)):
        end = Resumed(step, ("peer", "memory"))
        play = lambda job, moment=moment: one(job, moment)  # noqa: E731
        yield Case("node lost", "memory", moment, "node 0, after this phase of rank 1", play, end, how=how)

    def while_restoring(turns: int, lose: Callable[[Job], None]) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.end_processes()
            job.begin()
            job.turn(turns)
            lose(job)

        return play

    how = "the next attempt agrees on what is left"
    for turns in range(1, 7):
        point = f"{turns} beats after the restore began"
        play = while_restoring(turns, lambda job: job.lose_node(0))
        yield Case("node lost", "memory", "restore", point, play, Resumed(NEWEST, ("peer", "memory")), how=how)
        play = while_restoring(turns, Job.lose_all)
        yield Case("all nodes lost", "all", "restore", point, play, Resumed(NEWEST, BUCKET), how=how)

    def both(turns: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.save(NEXT)
            job.turn(turns)
            job.lose_all()

        return play

    given_up: frozenset[Alarm] = frozenset({("tier_failed", "bucket", None, NEXT)})  # nobody holds what was begun
    for turns, phase, step in ((0, "seal", NEWEST), (1, "drain", NEWEST), (6, "commit", NEXT)):
        seen = given_up if phase == "drain" else frozenset()
        how = "" if seen else "the newest record in the bucket"
        point = f"both nodes, {turns} beats after the save"
        yield Case("all nodes lost", "all", phase, point, both(turns), Resumed(step, BUCKET), seen, how)
