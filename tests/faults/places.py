"""What a volume or a disk of a node can refuse: no space, or an error of the device."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from ktrain.snapshot.slots import SlotCalls
from ktrain.testing.faulty_tier import Fault, TierFault
from tests.faults.job import ALWAYS, NEWEST, Alarm, Job, Resumed
from tests.faults.model import Case

NEXT = 30
MEMORY = ("memory", "memory")


class Refuses(SlotCalls):
    """A volume that answers with an error of the system, for ever: when room is reserved, or after a writer's step."""

    def __init__(self, code: int, step: str | None = None) -> None:
        self._error = OSError(code, os.strerror(code))
        self._step = step

    def reserve(self, fd: int, nbytes: int) -> None:
        if self._step is None:
            raise self._error
        super().reserve(fd, nbytes)

    def reached(self, step: str) -> None:
        if step == self._step:
            raise self._error


def cases() -> Iterator[Case]:
    for code in (errno.ENOSPC, errno.EIO):
        name = errno.errorcode[code]
        yield from _volume(f"{name} of the volume", code)
    yield from _disk("ENOSPC of the disk", Fault.NO_SPACE)
    yield from _disk("EIO of the disk", Fault.IO_ERROR)
    yield from _disk_writes()
    yield from _disk_reads()


def _volume(fault: str, code: int) -> Iterator[Case]:
    """The node's workers have room for no new slot, or for no manifest; or its agent for no replica."""
    failed: frozenset[Alarm] = frozenset({("tier_failed", "memory", 0, None)})

    def saving(step: str | None) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.use_calls(0, Refuses(code, step))
            job.save(NEXT)
            job.turn(4)
            job.use_calls(0, SlotCalls())

        return play

    def starting(job: Job) -> None:
        assert job.restore() == 0
        saving(None)(job)

    fresh, end = Resumed(0, ("none", "none")), Resumed(NEWEST, MEMORY)
    yield Case(fault, "memory", "stage", "room for the first slot", starting, fresh, failed, is_new=True)
    yield Case(fault, "memory", "stage", "a slot is taken", saving("unsealed"), end, failed)
    yield Case(fault, "memory", "seal", "the manifest is written", saving("manifest-written"), end, failed)

    def keeping(step: str) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.nodes[1].agent_calls = Refuses(code, step)
            job.replace_agent(1)
            job.drains = False
            job.save(NEXT)
            job.turn(12)
            job.drains = True
            job.nodes[1].agent_calls = SlotCalls()
            job.replace_agent(1)

        return play

    skipped: frozenset[Alarm] = frozenset({("save_skipped", "peer", 0, NEXT)})
    for step, words in (("unsealed", "a slot for a replica"), ("manifest-written", "a replica's manifest")):
        yield Case(fault, "peer", "replicate", words, keeping(step), Resumed(NEXT, MEMORY), skipped)


def _disk(fault: str, how: Fault) -> Iterator[Case]:
    """The machines restart afterwards, so that the disks are what is nearest."""
    failed: Alarm = ("tier_failed", "disk", None, None)
    recovered: Alarm = ("tier_recovered", "disk", None, None)

    def writing(name: str, count: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.fail_disk(0, TierFault("write", how, name=name, count=count))
            job.save(NEXT)
            job.turn(40)
            job.reboot()

        return play

    for what, name in (("payload", "*.safetensors"), ("manifest", "*.json")):
        end, seen = Resumed(NEXT, ("disk", "disk")), frozenset({failed, recovered})
        yield Case(fault, "disk", "drain", f"write a {what}, once", writing(name, 1), end, seen, has_disk=True)
        end, seen = Resumed(NEXT, ("bucket", "disk")), frozenset({failed})
        yield Case(fault, "disk", "drain", f"write a {what}, for ever", writing(name, ALWAYS), end, seen, has_disk=True)

    def collecting(job: Job) -> None:
        job.fail_disk(0, TierFault("delete", how, count=ALWAYS))
        job.save(NEXT)
        job.turn(40)
        job.reboot()

    if how is Fault.IO_ERROR:
        end, seen = Resumed(NEXT, ("disk", "disk")), frozenset({failed})
        yield Case(fault, "disk", "collect", "delete, for ever", collecting, end, seen, has_disk=True)


def _disk_writes() -> Iterator[Case]:
    """What else can happen to a write to a node's disk; the machines restart afterwards."""
    failed: frozenset[Alarm] = frozenset({("tier_failed", "disk", None, None), ("tier_recovered", "disk", None, None)})
    bad: frozenset[Alarm] = frozenset({("bad_copy", "disk", 0, NEXT)})
    names = {"payload": "*.safetensors", "manifest": "*.json"}

    def writing(what: str, how: Fault) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.fail_disk(0, TierFault("write", how, name=names[what]))
            job.save(NEXT)
            job.turn(40)
            job.reboot()

        return play

    for what in names:
        whole, spoilt = Resumed(NEXT, ("disk", "disk")), Resumed(NEXT, ("bucket", "disk"))
        point = f"write a {what}"
        for fault, how in (("timeout of the disk", Fault.HANG), ("torn write", Fault.TORN)):
            yield Case(fault, "disk", "drain", point, writing(what, how), whole, failed, has_disk=True)
        for fault, how in (("bit flip on the way", Fault.FLIP_BIT), ("truncation on the way", Fault.TRUNCATE)):
            play = writing(what, how)
            if what == "payload":
                yield Case(fault, "disk", "drain", point, play, spoilt, bad, has_disk=True)
                continue
            words = "the disk's inventory lacks it: stored again"
            yield Case(fault, "disk", "drain", point, play, whole, how=words, has_disk=True)
        for fault, how in (("agent dies", Fault.KILLED), ("agent dies", Fault.KILLED_AFTER)):
            moment = "before" if how is Fault.KILLED else "after"
            words = "a new agent stores what is missing"
            play = writing(what, how)
            yield Case(fault, "disk", "drain", f"{point}, {moment} it", play, whole, how=words, has_disk=True)


def _disk_reads() -> Iterator[Case]:
    def reading(operation: str, name: str, count: int) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.reboot()
            job.disk_faults = [TierFault(operation, Fault.IO_ERROR, name=name, count=count)]

        return play

    seen: frozenset[Alarm] = frozenset({("notice", "disk", rank, NEWEST) for rank in (0, 1)})
    end = Resumed(NEWEST, ("bucket", "bucket"))
    play = reading("read_range", "*", ALWAYS)
    yield Case("EIO of the disk", "disk", "restore", "read a payload", play, end, seen, has_disk=True)
