"""A restore on another layout that reads parts of a peer's snapshot, and what happens to them on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ktrain.errors import DeadlineError, KtrainError, NotFoundError, UnavailableError
from tests.faults.damage import flip_bit
from tests.faults.job import NEWEST, Alarm, Job, Resumed
from tests.faults.model import Case

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


def _want_a_part(job: Job) -> None:
    """Node 0 comes back empty, and its rank wants a little of its snapshot of then."""
    job.wanted = {0: {0: (5, 17)}}
    job.lose_node(0)
