"""A restore that reads parts of a peer's snapshot, or the bucket once for all, and what happens on their way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.errors import DeadlineError, KtrainError, NotFoundError, UnavailableError
from ktrain.format.manifest import Identity
from tests.faults.damage import flip_bit
from tests.faults.job import NEWEST, OLDER, Alarm, Job, Resumed
from tests.faults.model import Case
from tests.unit.checkpoint.builders import snapshot

FROM_PEER = Resumed(NEWEST, ("peer", "memory"))
FROM_BUCKET = Resumed(NEWEST, ("bucket", "memory"))


def cases() -> Iterator[Case]:
    def refused(error: KtrainError) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            _want_a_part(job)

            def before(node: str, begin: int, end: int) -> None:
                raise error

            job.wire.before_piece = before

        return play

    seen: frozenset[Alarm] = frozenset({("notice", "peer", 0, NEWEST)})
    gone = UnavailableError("node-1: it died")
    yield Case("node lost", "peer", "restore", "while a part is read of its memory", refused(gone), FROM_BUCKET, seen)
    late = DeadlineError("node-1: nothing within 20 s")
    yield Case("late answer", "peer", "restore", "a part of a snapshot", refused(late), FROM_BUCKET, seen)
    lost = NotFoundError("pull: the lease has ended")
    yield Case("lost snapshot", "peer", "restore", "while a part is read of it", refused(lost), FROM_BUCKET, seen)

    def spoilt(times: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            _want_a_part(job)
            left = [times]

            def arrive(data: bytes) -> bytes:
                left[0] -= 1
                return flip_bit(data) if left[0] >= 0 else data

            job.wire.on_piece = arrive

        return play

    once = "the part is read once more"
    yield Case("bit flip on the wire", "peer", "restore", "a part, once", spoilt(1), FROM_PEER, how=once)
    seen = frozenset({("bad_copy", "peer", 0, NEWEST)})
    yield Case("bit flip on the wire", "peer", "restore", "a part, twice", spoilt(2), FROM_BUCKET, seen)
    yield from _filling()


def _filling() -> Iterator[Case]:
    """Both nodes come back empty, both ranks want all, and each node brings one payload near for both."""
    whole, own = Resumed(NEWEST, ("memory", "memory")), "the ranks read the bucket where nothing was brought near"

    def dying(job: Job) -> None:
        _spread(job)
        job.nodes[0].at_fill = lambda: job.replace_agent(0)

    one_filled = Resumed(NEWEST, ("bucket", "memory"))
    yield Case("agent dies", "bucket", "restore", "filling a slot for all nodes", dying, one_filled, how=own)

    def cut(job: Job) -> None:
        _spread(job)

        def before(node: str, begin: int, end: int) -> None:
            if node == "node-0":
                raise UnavailableError("node-0: it died")

        job.wire.before_piece = before

    seen: frozenset[Alarm] = frozenset({("notice", "peer", 0, NEWEST), ("save_skipped", "peer", 0, NEWEST)})
    yield Case("node lost", "peer", "restore", "the others take what it filled", cut, whole, seen)

    def never(job: Job) -> None:
        _spread(job)
        job.nodes[0].fills = False

    point = "a node that is to fill a slot for all"
    yield Case("late answer", "bucket", "restore", point, never, one_filled, how=own)

    def head(job: Job) -> None:
        _spread(job)
        job.nodes[0].at_fill = job.replace_head

    how = "another head asks the ranks anew"
    yield Case("head dies", "bucket", "restore", "while slots are filled for all nodes", head, whole, how=how)

    def bad(job: Job) -> None:
        _spread(job)
        job.spoil_bucket(NEWEST, 0)

    seen = frozenset({("bad_copy", "bucket", 0, NEWEST)})
    end = Resumed(OLDER, ("bucket", "bucket"))
    yield Case("bit flip in a payload", "bucket", "restore", "what is filled for all", bad, end, seen)


def _spread(job: Job) -> None:
    """The run's log says that the wire is much faster than the bucket."""
    drain = {"kind": "drained", "node": "node-0", "step": OLDER, "tier": "bucket", "nbytes": 10, "seconds": 1.0}
    moved = {"kind": "replicated", "nbytes": 10**9, "seconds": 1.0}
    lines = [json.dumps({"time": 0.0, "attempt": 1, **event}) for event in (drain, moved)]
    name = f"{contract.EVENTS_DIR}/000001-00000000-abcdef.jsonl"
    job.bucket.write(name, "\n".join(lines).encode() + b"\n", deadline=Deadline.after(10.0))
    whole = (0, len(snapshot(0, Identity(job.catalog.run_id, NEWEST, 1, 2))[0]))
    job.wanted = dict.fromkeys((0, 1), {0: whole, 1: whole})
    job.lose_all()


def _want_a_part(job: Job) -> None:
    """Node 0 comes back empty, and its rank wants a little of its snapshot of then."""
    job.wanted = {0: {0: (5, 17)}}
    job.lose_node(0)
