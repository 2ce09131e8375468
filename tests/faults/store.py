"""What a store can do to a call, at every call that the engine makes to the bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ktrain.testing.faulty_tier import Fault
from tests.faults.job import ALWAYS, NEWEST, OLDER, Alarm, Job, Resumed, Stopped
from tests.faults.model import Case

NEXT = 30  # the step that is saved while the fault is there
BUCKET = ("bucket", "bucket")
MEMORY = ("memory", "memory")
FAILED: frozenset[Alarm] = frozenset({("tier_failed", "bucket", None, NEXT), ("tier_recovered", "bucket", None, None)})
NOTICE: frozenset[Alarm] = frozenset({("notice", None, None, None)})

NAMES = {
    Fault.FORBIDDEN: "403 from the bucket",
    Fault.NOT_FOUND: "404 from the bucket",
    Fault.THROTTLED: "429 from the bucket",
    Fault.ERROR: "500 from the bucket",
    Fault.UNAVAILABLE: "503 from the bucket",
    Fault.HANG: "timeout of the bucket",
    Fault.SLOW: "slow drip from the bucket",
    Fault.IO_ERROR: "EIO of the bucket",
    Fault.NO_SPACE: "ENOSPC of the bucket",
    Fault.LOST_REPLY: "lost reply",
    Fault.LATE_REPLY: "reply after the deadline",
    Fault.TORN: "torn write",
    Fault.FLIP_BIT: "bit flip on the way",
    Fault.TRUNCATE: "truncation on the way",
    Fault.LAGGING: "listing that lags",
    Fault.KILLED: "process dies before a call",
    Fault.KILLED_AFTER: "process dies after a call",
}
_ANY = (
    Fault.FORBIDDEN,
    Fault.NOT_FOUND,
    Fault.THROTTLED,
    Fault.ERROR,
    Fault.UNAVAILABLE,
    Fault.HANG,
    Fault.SLOW,
    Fault.IO_ERROR,
    Fault.KILLED,
)
_LOST = (Fault.LOST_REPLY, Fault.LATE_REPLY, Fault.KILLED_AFTER)
FITS: dict[str, tuple[Fault, ...]] = {
    "write": (*_ANY, *_LOST, Fault.TORN, Fault.NO_SPACE, Fault.FLIP_BIT, Fault.TRUNCATE),
    "read": (*_ANY, Fault.FLIP_BIT, Fault.TRUNCATE),
    "read_range": (*_ANY, Fault.FLIP_BIT, Fault.TRUNCATE),
    "list": (*_ANY, Fault.LAGGING),
    "delete": (*_ANY, *_LOST),
}
_KINDS = {
    Fault.FORBIDDEN: "forbidden",
    Fault.HANG: "deadline",
    Fault.LATE_REPLY: "deadline",
    Fault.NO_SPACE: "capacity",
}
HIDDEN = (
    "a store that does not list what it took breaks the contract of a tier; nothing else names the steps that are set "
    "aside, one may be used or collected like any other"
)
_SILENT = (Fault.FLIP_BIT, Fault.TRUNCATE)
_DEATHS = (Fault.KILLED, Fault.KILLED_AFTER)
_OBJECTS = {
    "payload": "*/rank-*.safetensors",
    "manifest": "*/rank-*.json",
    "record": "*/commit-*",
    "data": "checkpoints/step-*",
    "checkpoints": "checkpoints",
    "attempts": "attempts",
    "quarantine": "quarantine",
    "marks": "marks",
    "mark": "marks/doomed-*",
    **{f"attempt {part}": f"attempts/*-{part}.json" for part in ("start", "restored", "committed", "durable")},
}


@dataclass(frozen=True, slots=True)
class Point:
    """The `nth` call of its kind in a phase, and what that call is for."""

    operation: str
    what: str
    words: str
    nth: int = 1

    def fail(self, job: Job, fault: Fault, count: int = 1) -> None:
        seconds = {Fault.SLOW: 3.0, Fault.LAGGING: 60.0}.get(fault, 0.0)
        count = ALWAYS if fault is Fault.SLOW else count
        job.fail(self.operation, fault, name=_OBJECTS[self.what], nth=self.nth, count=count, seconds=seconds)


START = (
    Point("list", "attempts", "list the attempts"),
    Point("read", "attempt start", "read an attempt"),
    Point("write", "attempt start", "write the attempt's start"),
    Point("read", "attempt start", "read the start back", nth=2),
)
PLAN = (
    Point("list", "attempts", "list the attempts again", nth=2),
    Point("list", "quarantine", "list what is set aside"),
    Point("list", "checkpoints", "list the checkpoints"),
    Point("list", "data", "list one step"),
    Point("read", "record", "read the newest record", nth=2),
    Point("read", "manifest", "read a manifest"),
    Point("read_range", "payload", "read a payload"),
    Point("write", "attempt restored", "write the choice"),
)
DRAIN = (
    Point("write", "payload", "write a payload"),
    Point("write", "manifest", "write a manifest"),
)
COMMIT = (
    Point("list", "data", "list the payloads"),
    Point("read", "manifest", "read a manifest back"),
    Point("write", "record", "write the record"),
    Point("read", "record", "read the record back"),
    Point("read", "mark", "read whether a collector took its files"),
    Point("list", "data", "list the payloads once more", nth=2),
)
FIRST = (
    Point("write", "attempt committed", "note the first commit"),
    Point("write", "attempt durable", "note the first durable commit"),
)
COLLECT = (
    Point("list", "quarantine", "list what is set aside"),
    Point("list", "checkpoints", "list the checkpoints"),
    Point("read", "record", "read a record"),
    Point("list", "attempts", "list the attempts"),
    Point("read", "attempt restored", "read an attempt"),
    Point("list", "marks", "list the marks"),
    Point("list", "data", "list the newest's payloads", nth=5),
    Point("read", "manifest", "read the newest's manifest"),
    Point("list", "attempts", "list the attempts before anything goes", nth=2),
    Point("write", "mark", "write the mark of a removal"),
    Point("list", "marks", "list the marks again", nth=2),
    Point("list", "attempts", "list the attempts before a removal", nth=3),
    Point("delete", "record", "delete a record"),
    Point("delete", "payload", "delete a payload"),
    Point("delete", "manifest", "delete a manifest"),
    Point("delete", "mark", "delete the mark"),
)


def cases() -> Iterator[Case]:
    for point, fault in _pairs(START):
        yield _case(point, fault, "restore", _lose_all_then(point, fault), *_at_start(point, fault))
    for point, fault in _pairs(PLAN):
        yield _case(point, fault, "restore", _lose_all_then(point, fault), *_at_plan(point, fault))
    for phase, points in (("drain", DRAIN), ("commit", COMMIT)):
        for point, fault in _pairs(points):
            yield _case(point, fault, phase, _save_under(point, fault), *_at_save(point, fault))
    for point, fault in _pairs(FIRST):
        end, how = Resumed(NEWEST, BUCKET), "noted again; what is complete tells the same"
        yield _case(point, fault, "commit", _train_under(point, fault), end, frozenset(), how, is_new=True)
    for point, fault in _pairs(COLLECT):
        yield _case(point, fault, "collect", _collect_under(point, fault), *_at_collect(point, fault), keep=1)
    yield from _for_ever()


def _pairs(points: tuple[Point, ...]) -> Iterator[tuple[Point, Fault]]:
    return ((point, fault) for point in points for fault in FITS[point.operation])


def _case(
    point: Point,
    fault: Fault,
    phase: str,
    play: Callable[[Job], None],
    end: Resumed | Stopped,
    seen: frozenset[Alarm],
    how: str = "",
    **fields: object,
) -> Case:
    words: tuple[str, ...] = ()
    if isinstance(end, Stopped):
        lost = end.kind == "corruption"
        words = ("no commit record can be read", "nothing was deleted") if lost else ("bucket tier", point.what[:7])
    how, gap = ("", how) if how == HIDDEN else (how, "")
    return Case(NAMES[fault], "bucket", phase, point.words, play, end, seen, how, gap, words, **fields)  # type: ignore[arg-type]


# Plays


def _lose_all_then(point: Point, fault: Fault, count: int = 1) -> Callable[[Job], None]:
    def play(job: Job) -> None:
        job.lose_all()
        point.fail(job, fault, count)

    return play


def _save_under(point: Point, fault: Fault, count: int = 1) -> Callable[[Job], None]:
    def play(job: Job) -> None:
        point.fail(job, fault, count)
        job.save_until_drained(NEXT)
        if count == 1:
            job.lose_all()

    return play


def _train_under(point: Point, fault: Fault) -> Callable[[Job], None]:
    def play(job: Job) -> None:
        assert job.restore() == 0
        point.fail(job, fault)
        job.save_until_drained(OLDER)
        job.save_until_drained(NEWEST)
        job.lose_all()

    return play


def _collect_under(point: Point, fault: Fault) -> Callable[[Job], None]:
    def play(job: Job) -> None:
        def fail_once() -> None:
            job.when_committed = lambda: None
            point.fail(job, fault)

        job.when_committed = fail_once
        job.save_until_drained(NEXT)
        job.turn(2)
        job.lose_all()

    return play


# What must come of it


def _at_start(point: Point, fault: Fault) -> tuple[Resumed | Stopped, frozenset[Alarm], str]:
    harmless = {Fault.SLOW, Fault.LAGGING, *_DEATHS, *_SILENT}
    if point.operation != "write":
        harmless.add(Fault.NOT_FOUND)
    if fault in harmless:
        how = "the next epoch is taken: a name is used once, and its content read back"
        return Resumed(NEWEST, BUCKET), frozenset(), "the start is tried again" if fault in _DEATHS else how
    return Stopped(_KINDS.get(fault, "unavailable")), frozenset(), ""


def _at_plan(point: Point, fault: Fault) -> tuple[Resumed | Stopped, frozenset[Alarm], str]:
    again = "asked again until the patience ends"
    if point.what == "quarantine" and fault in (Fault.NOT_FOUND, Fault.LAGGING):
        return Resumed(NEWEST, BUCKET), frozenset(), HIDDEN
    if point.what == "checkpoints" and fault in (Fault.NOT_FOUND, Fault.LAGGING):
        return Stopped("corruption"), frozenset(), ""
    if point.what in ("record", "manifest", "payload") and fault in (*_SILENT, Fault.NOT_FOUND):
        if (point.what, fault) == ("record", Fault.NOT_FOUND):
            return Resumed(NEWEST, BUCKET), frozenset(), "the listing still shows it: asked again"
        rank = None if point.what == "record" else 0
        return Resumed(OLDER, BUCKET), frozenset({("bad_copy", "bucket", rank, NEWEST)}), ""
    if point.what == "payload" and fault not in (Fault.SLOW, *_DEATHS):
        return Resumed(NEWEST, BUCKET), frozenset({("notice", "bucket", 0, NEWEST)}), ""
    return Resumed(NEWEST, BUCKET), frozenset(), "the next attempt" if fault in _DEATHS else again


def _at_save(point: Point, fault: Fault) -> tuple[Resumed | Stopped, frozenset[Alarm], str]:
    if fault in _DEATHS:
        return Resumed(NEXT, BUCKET), frozenset(), "a new agent or head takes over; the drain is made again"
    if fault is Fault.SLOW:
        return Resumed(NEXT, BUCKET), frozenset(), "nothing waits for it but the drain"
    if point.what == "mark" and fault in (Fault.NOT_FOUND, *_SILENT):
        return Resumed(NEXT, BUCKET), frozenset(), "that there is no mark is what a commit needs"
    if (point.what, fault) == ("payload", Fault.FLIP_BIT):  # the store keeps other bytes than it was given
        return Resumed(NEWEST, BUCKET), frozenset({("bad_copy", "bucket", 0, NEXT)}), ""
    if point.what in ("payload", "manifest") and point.operation == "write" and fault not in _SILENT:
        return Resumed(NEXT, BUCKET), frozenset(), "the other node, which holds the snapshot too, takes over"
    if (point.operation, point.what) == ("write", "record"):
        if fault in (Fault.LOST_REPLY, Fault.LATE_REPLY):
            return Resumed(NEXT, BUCKET), frozenset(), "read back: the record is there"
        if fault in (Fault.TORN, *_SILENT):
            return Resumed(NEXT, BUCKET), FAILED | {("bad_copy", "bucket", None, NEXT)}, ""
    return Resumed(NEXT, BUCKET), FAILED, ""


def _at_collect(point: Point, fault: Fault) -> tuple[Resumed | Stopped, frozenset[Alarm], str]:
    end = Resumed(NEXT, BUCKET)
    if fault in _DEATHS:
        return end, frozenset(), "the next head collects after its next commit"
    if fault is Fault.SLOW:
        return end, frozenset(), "nothing waits for it"
    how = _harmless_at_collect(point, fault)
    return end, frozenset() if how else NOTICE, how


def _harmless_at_collect(point: Point, fault: Fault) -> str:
    """Why nothing is said; empty where the collection is in doubt, which is."""
    answers = {
        ("list", "quarantine"): HIDDEN,
        ("list", "marks"): "the marks are read twice before anything goes",
        ("list", "checkpoints"): "what cannot be told is not deleted",
        ("list", "attempts"): "the attempts are read three times before anything goes",
        ("delete", "record"): "a record that proves nothing stays, and counts for nothing",
        ("delete", "mark"): "the next collection takes it for half a removal, and ends that",
    }
    if fault in (Fault.NOT_FOUND, Fault.LAGGING) and point.operation in ("list", "delete"):
        left = "data without a record are nothing" if point.operation == "delete" else ""
        return answers.get((point.operation, point.what), left)
    if fault in _SILENT and point.what == "record":
        return "a record that proves nothing stays, and counts for nothing"
    if fault in _SILENT and (point.operation, point.what) == ("write", "mark"):
        return "a mark counts by its name alone"
    if (point.what, fault) == ("attempt restored", Fault.FLIP_BIT):
        return "no decision rests on the words that the bit is in"
    return ""


# A store that stays away


def _for_ever() -> Iterator[Case]:
    for fault in (Fault.FORBIDDEN, Fault.UNAVAILABLE, Fault.HANG, Fault.IO_ERROR):
        for point in PLAN[1:]:
            first = Point(point.operation, point.what, f"{point.words}, for ever")
            play, end = _lose_all_then(first, fault, ALWAYS), Stopped("unavailable")
            seen: frozenset[Alarm] = frozenset()
            if point.what == "payload":
                seen = frozenset(("notice", "bucket", rank, step) for rank in (0, 1) for step in (OLDER, NEWEST))
            words = ("run tier://", "not readable now: step 20 rank 0 in bucket" if seen else "bucket tier")
            yield Case(NAMES[fault], "bucket", "restore", first.words, play, end, seen, words=words)
        yield from _away_while_saving(fault)
    yield from _away_while_saving(Fault.NO_SPACE)


def _away_while_saving(fault: Fault) -> Iterator[Case]:
    point = Point("write", "payload", "write a payload, for ever")
    seen: frozenset[Alarm] = frozenset({("tier_failed", "bucket", None, NEXT)})
    play = _save_under(point, fault, ALWAYS)
    yield Case(NAMES[fault], "bucket", "drain", point.words, play, Resumed(NEXT, MEMORY), seen)
