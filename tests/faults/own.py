"""A node builds a replica of its peer's share from what it holds itself, and what can go wrong with that (ADR 0025)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

from ktrain.errors import UnavailableError
from ktrain.format.manifest import Identity
from ktrain.format.payload import CHUNK_NBYTES, copies_begin
from ktrain.testing.faulty_tier import Killed
from ktrain.testing.local_transport import LocalWire
from tests.faults.job import NEWEST, Alarm, Job, Resumed
from tests.faults.model import Case
from tests.unit.checkpoint.builders import divided
from tests.unit.checkpoint.cluster import flip_at

NEXT = 30
FROM_REPLICA = Resumed(NEXT, ("peer", "memory"))
_IN_SHARE = CHUNK_NBYTES + 7  # a byte of the second chunk of rank 0's share


def cases() -> Iterator[Case]:
    """Both nodes hold one tensor; node 1 builds its replica of rank 0's share, and then node 0 is lost."""
    yield from _bad_bytes()
    yield from _deaths()


def _bad_bytes() -> Iterator[Case]:
    def play(spoil: Callable[[Job], None], turns: int = 30, *, loses: bool = True) -> Callable[[Job], None]:
        def played(job: Job) -> None:
            _train(job)
            job.drains = False
            job.save(NEXT)
            spoil(job)
            job.turn(turns)
            job.drains = True
            job.turn(8)
            if loses:
                job.lose_node(0)

        return played

    def own(job: Job) -> None:
        flip_at(job.slot_of(1, 1, NEXT), _in_copies(job))

    def share(job: Job) -> None:
        flip_at(job.slot_of(0, 0, NEXT), _IN_SHARE)

    def both(job: Job) -> None:
        own(job)
        share(job)

    bad_own: Alarm = ("bad_copy", "memory", 1, NEXT)
    bad_share: Alarm = ("bad_copy", "memory", 0, NEXT)
    yield Case(
        fault="bit flip in copies",
        tier="memory",
        phase="replicate",
        point="a chunk that a replica is built from: it is pulled",
        play=play(own),
        end=FROM_REPLICA,
        seen=frozenset({bad_own}),
        is_new=True,
    )
    yield Case(
        fault="bit flip in a payload",
        tier="memory",
        phase="replicate",
        point="a chunk that the peer builds from its own copies: the replica is good",
        play=play(share),
        end=FROM_REPLICA,
        seen=frozenset({bad_share}),  # by the drain, which the replica's node takes over
        is_new=True,
    )
    yield Case(
        fault="bit flip in a payload",
        tier="all",
        phase="replicate",
        point="the same chunk of a share and of its peer's copies",
        play=play(both, loses=False),
        end=Resumed(NEWEST, ("memory", "memory")),
        seen=frozenset({bad_share, ("bad_copy", "peer", 0, NEXT), ("tier_failed", "bucket", None, NEXT)}),
        is_new=True,
    )


def _deaths() -> Iterator[Case]:
    def interrupted(act: Callable[[Job], None], source: str = "node-0") -> Callable[[Job], None]:
        """What is not in the own copies is on its way, once."""

        def played(job: Job) -> None:
            _train(job)
            left = [act]

            def before(node: str, begin: int, end: int) -> None:
                if node == source and left:
                    left.pop()(job)

            job.wire.before_piece = before
            job.save_until_drained(NEXT)
            assert not left, "nothing crossed the wire"
            job.wire.before_piece = LocalWire().before_piece
            if source == "node-0":
                job.lose_node(0)

        return played

    def of_the_owner(job: Job) -> None:
        raise UnavailableError("node-0: it died")

    def of_the_builder(job: Job) -> None:
        raise Killed("the agent that builds the replica")

    def of_the_slot(job: Job) -> None:
        shutil.rmtree(job.nodes[0].volume.path / "rank-00000")  # node 1 has its replica by then

    seen: frozenset[Alarm] = frozenset({("save_skipped", "peer", 0, NEXT)})
    point = "the owner's, while a replica is built from own copies"
    yield Case("agent dies", "peer", "replicate", point, interrupted(of_the_owner), FROM_REPLICA, seen, is_new=True)
    point, how = (
        "while it builds a replica from own copies",
        "a new agent finds what lies in the volume, and builds again",
    )
    play = interrupted(of_the_builder)
    yield Case("agent dies", "peer", "replicate", point, play, FROM_REPLICA, how=how, is_new=True)
    point, how = "whose copies a replica is built from", "what is read is under lease, and stays until it is not"
    play = interrupted(of_the_slot, source="node-1")
    yield Case("lost slot", "memory", "replicate", point, play, FROM_REPLICA, how=how, is_new=True)


def _train(job: Job) -> None:
    job.takes = divided
    job.train()


def _in_copies(job: Job) -> int:
    """The same byte in the slot of rank 1, among the copies."""
    at = Identity(job.catalog.run_id, NEXT, job.epoch, job.world_size)
    (payload, _), _ = divided(1, at)  # whose header is as long as that of its copies, for each is one box
    return copies_begin(len(payload)) + _IN_SHARE
