"""Two at once, the wrong one, or the wrong time: heads, zombies, readers, copies made by hand, clocks, lost answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ktrain.checkpoint.coordinate import Coordinator
from ktrain.errors import ConflictError
from ktrain.format import document
from ktrain.format.manifest import Identity
from ktrain.testing.faulty_tier import Fault
from tests.faults import damage, store
from tests.faults.job import ALWAYS, NEWEST, OLDER, Alarm, Job, Resumed, Stopped
from tests.faults.model import Case
from tests.unit.checkpoint.builders import snapshot

NEXT = 30
MEMORY = ("memory", "memory")
BUCKET = ("bucket", "bucket")
DAY_S = 86_400.0


def cases() -> Iterator[Case]:
    yield from _heads()
    yield from _zombies()
    yield from _readers()
    yield from _copies_by_hand()
    yield from _clocks()
    yield from _lost_answers()
    yield from _lagging_listings()
    yield from _newer_versions()


# Heads


def _heads() -> Iterator[Case]:
    def two(job: Job) -> None:
        """Each node's beats reach one head and then the other; both believe that the attempt is theirs."""
        other = job.new_coordinator()
        other.adopt_attempt(job.epoch, job.assignment)
        job.save(NEXT)
        for _ in range(30):
            job.head.coordinator, other = other, job.coordinator
            job.turn()
        job.lose_all()

    how = "their records differ by name, and either is true"
    yield Case("two heads commit", "bucket", "commit", "the same step", two, Resumed(NEXT, BUCKET), how=how)

    def older(job: Job) -> None:
        stale = _head_before_its_commit(job)
        assert isinstance(job.restart(), Resumed)
        job.save_until_drained(25)
        stale._work_once()  # its record is written whole
        job.lose_all()

    how = "steps of an older attempt beyond the first commit of a newer one are off the line"
    point = "an older attempt's, after the new attempt has committed"
    yield Case("two heads commit", "bucket", "commit", point, older, Resumed(25, BUCKET), how=how)

    def between(job: Job) -> None:
        stale = _head_before_its_commit(job)
        job.at_turn[job.turns + 4] = stale._work_once  # the ranks are reading step 20, which it would collect

    point = "an older attempt's head would collect what is being read"
    end = Resumed(NEWEST, BUCKET)
    yield Case("collection races a reader", "bucket", "collect", point, between, end, store.NOTICE, keep=1)


def _head_before_its_commit(job: Job) -> Coordinator:
    """The head of an attempt that was cut off with all of step 30 in the bucket but the record; memory is lost."""
    stale = job.coordinator
    job.save(NEXT)
    for worker in job.workers:
        worker.pulse()
    for node in job.nodes:
        node.keeper.flush()
    stale._work_once()
    for node in job.nodes:
        node.keeper.flush()
        node.carry(drain=True)
        node.keeper.flush()
    job.lose_all()
    job.head.coordinator = job.new_coordinator()
    return stale


# Zombies, and saves over what is there


def _zombies() -> Iterator[Case]:
    def pulses(job: Job) -> None:
        zombie = job.workers[0]
        assert job.restart() == Resumed(NEWEST, MEMORY)
        try:
            zombie.pulse()
        except ConflictError:
            return
        raise AssertionError("a worker of an older attempt was heard")

    how = "ConflictError: it must end"
    point = "a worker of an older attempt goes on"
    yield Case("zombie", "memory", "stage", point, pulses, Resumed(NEWEST, MEMORY), how=how)

    def seals(job: Job) -> None:
        zombies = job.workers
        for node in job.nodes:
            node.volume = node.open_volume(node.calls)  # the old processes keep theirs, and their slots
        assert job.restore() == NEWEST
        job.save_until_drained(25)
        for zombie in zombies:
            job.save_of(zombie, 40)
        job.turn(4)
        for zombie in zombies:
            zombie.volume.close()

    how = "steps of an older attempt beyond the first commit of a newer one are off the line"
    point = "stopped workers wake up and seal a step of their attempt"
    yield Case("zombie", "memory", "seal", point, seals, Resumed(25, MEMORY), how=how)

    def again(job: Job) -> None:
        record = damage.record_of(job, NEWEST)
        record.put(damage.flip_bit(record.get()))
        job.lose_all()
        assert job.restart() == Resumed(OLDER, BUCKET)
        job.save_until_drained(NEWEST)
        job.lose_all()

    seen: frozenset[Alarm] = frozenset({("bad_copy", "bucket", None, NEWEST)})
    point = "by the next attempt, beside the damaged one of the last"
    yield Case("save over an existing step", "bucket", "commit", point, again, Resumed(NEWEST, BUCKET), seen)

    def twice(job: Job) -> None:
        job.save_until_drained(NEXT)
        job.save(NEXT)
        job.turn(8)

    how = "one identity, equal bytes: either copy is the step"
    yield Case("save over an existing step", "memory", "seal", "twice", twice, Resumed(NEXT, MEMORY), how=how)


# Readers


def _readers() -> Iterator[Case]:
    def while_read(job: Job) -> None:
        """A reader holds the newest while later steps need slots; its bytes stay what they were."""
        identity = Identity(job.catalog.run_id, NEWEST, 1, 2)
        expected, _ = snapshot(0, identity)
        with job.nodes[0].volume.open(0, identity) as reader:
            for step in range(NEXT, 100, 10):
                job.save_until_drained(step)
            assert bytes(reader.memory) == expected
            del reader

    how = "a slot under lease is not taken"
    end, point = Resumed(90, MEMORY), "a slot that is read"
    yield Case("save races a restore", "memory", "stage", point, while_read, end, how=how)

    def other_attempt(job: Job) -> None:
        """The next attempt restores step 20 while workers of the last, which nobody ended, go on saving."""
        zombies = job.workers
        for node in job.nodes:
            node.volume = node.open_volume(node.calls)

        def save() -> None:
            for zombie in zombies:
                job.save_of(zombie, NEXT)

        job.at_turn[job.turns + 6] = save  # the ranks are reading
        assert job.restore() == NEWEST
        for zombie in zombies:
            zombie.volume.close()

    how = "the step is chosen once; what appears later is for the next attempt"
    point = "the last attempt's workers seal a step meanwhile"
    yield Case("save races a restore", "memory", "restore", point, other_attempt, Resumed(NEXT, MEMORY), how=how)

    def collected(job: Job) -> None:
        catalog = job.catalog
        commit = catalog.listing().commits[0]  # somebody has listed it, and reads it after it was collected
        job.policies_keep(1)
        job.save_until_drained(NEXT)
        job.turn(2)
        assert {found.identity.step for found in catalog.listing().commits} == {NEXT}
        assert commit.identity.step == OLDER
        job.lose_all()

    how = "first the record goes, then the data: a reader sees a whole step or none"
    point = "steps that somebody has listed"
    end = Resumed(NEXT, BUCKET)
    yield Case("collection races a reader", "bucket", "collect", point, collected, end, how=how)


# Copies made by hand


def _copies_by_hand() -> Iterator[Case]:
    def move(job: Job, change: Callable[[str], str], *, only: str = "") -> None:
        names = [name for name in job.bucket.objects if f"step-{NEWEST:08d}/{only}" in name]
        job.bucket.objects |= {change(name): job.bucket.objects[name] for name in names}
        job.lose_all()

    def as_another_step(job: Job) -> None:
        move(job, lambda name: name.replace(f"{NEWEST:08d}", "00000040"))

    def without_record(job: Job) -> None:
        move(job, lambda name: name.replace(f"{NEWEST:08d}", "00000040"), only="data")

    def of_another_run(job: Job) -> None:
        """The checkpoints of one run under the name of another, which has none."""
        job.bucket.objects["run.json"] = job.bucket.objects["run.json"].replace(job.catalog.run_id.encode(), b"cd" * 16)
        for name in [name for name in job.bucket.objects if name.startswith("attempts/")]:
            del job.bucket.objects[name]
        job.lose_all()
        job.open_anew()

    def whole(job: Job) -> None:
        """The run, with its identity, under another URL."""
        job.lose_all()
        job.open_anew()

    end = Resumed(NEWEST, BUCKET)
    name = "copy made by hand"
    seen: frozenset[Alarm] = frozenset({("bad_copy", "bucket", None, 40)})
    yield Case(name, "bucket", "restore", "a step under another step's name", as_another_step, end, seen)
    how = "data without a record are nothing, and are never deleted"
    yield Case(name, "bucket", "restore", "a step's data without the record", without_record, end, how=how)
    seen = frozenset({("bad_copy", "bucket", None, step) for step in (OLDER, NEWEST)})
    words = ("no commit record can be read", "nothing was deleted")
    end_of_another, point = Stopped("corruption"), "checkpoints of another run"
    yield Case(name, "bucket", "restore", point, of_another_run, end_of_another, seen, words=words)
    how = "it is the same run by its identity, and continues"
    yield Case(name, "bucket", "restore", "the whole run in another place", whole, end, how=how)


# Clocks


def _clocks() -> Iterator[Case]:
    def wall(seconds: float) -> Callable[[Job], None]:
        def play(job: Job) -> None:
            job.clock.jump_wall(seconds)
            job.save_until_drained(NEXT)
            job.clock.jump_wall(2 * seconds)
            job.lose_all()

        return play

    how = "no decision rests on a wall clock"
    for words, seconds in (("ten years ahead", 3650 * DAY_S), ("a day back", -DAY_S)):
        yield Case("clock jumps", "all", "commit", f"wall, {words}", wall(seconds), Resumed(NEXT, BUCKET), how=how)

    def asleep_while_draining(job: Job) -> None:
        """The machine is suspended for a day in the middle of a drain."""
        job.drains = False
        job.save(NEXT)
        job.turn(3)
        job.clock.advance(DAY_S)
        job.drains = True
        job.turn(20)
        job.lose_all()

    point = "monotonic, a day in the middle of a drain"
    yield Case("clock jumps", "bucket", "drain", point, asleep_while_draining, Resumed(NEXT, BUCKET), store.FAILED)

    def asleep_while_restoring(job: Job) -> None:
        job.lose_all()
        job.at_turn[job.turns + 3] = lambda: job.clock.advance(DAY_S)

    point = "monotonic, a day in the middle of a restore"
    end, words = Stopped("deadline"), ("restore of epoch 2", "not done within")
    yield Case("clock jumps", "all", "restore", point, asleep_while_restoring, end, words=words)


# Answers


def _lost_answers() -> Iterator[Case]:
    def all_the_time(job: Job) -> None:
        for turn in range(job.turns, job.turns + 60, 2):
            job.at_turn[turn] = lambda: setattr(job.head, "lose_answers", 1)
        job.save_until_drained(NEXT)
        job.lose_all()

    how = "both sides tell states, and tell them again"
    point = "the head's, one in two beats"
    end = Resumed(NEXT, BUCKET)
    yield Case("answer lost on the control channel", "all", "commit", point, all_the_time, end, how=how)

    def away(job: Job) -> None:
        job.head.is_away = True
        job.save(NEXT)
        job.turn(20)
        job.head.is_away = False

    how = "what was sealed meanwhile counts as soon as a head is there"
    yield Case("head away", "all", "seal", "for twenty beats", away, Resumed(NEXT, MEMORY), how=how)


# Listings that lag by less than everything


def _lagging_listings() -> Iterator[Case]:
    def newest_is_missing(job: Job) -> None:
        job.clock.advance(100.0)
        job.save_until_drained(NEXT)
        job.lose_all()
        job.fail("list", Fault.LAGGING, name="checkpoints*", count=ALWAYS, seconds=50.0)

    yield Case(
        fault="listing that lags",
        tier="bucket",
        phase="restore",
        point="the newest checkpoint alone is missing",
        play=newest_is_missing,
        end=Resumed(NEWEST, BUCKET),
        gap="a store that does not list what it took breaks the contract of a tier; nothing else names the newest",
    )

    def first_is_missing(job: Job) -> None:
        """Everything of the run is younger than the lag: no checkpoint is seen, and no attempt that had one."""
        job.lose_all()
        job.fail("list", Fault.LAGGING, name="*", nth=2, count=3, seconds=60.0)

    how = "the attempt that has just begun is missing too: asked again"
    point = "all checkpoints and all attempts are missing"
    end = Resumed(NEWEST, BUCKET)
    yield Case("listing that lags", "bucket", "restore", point, first_is_missing, end, how=how)


# Newer versions


def _newer_versions() -> Iterator[Case]:
    def newer(data: bytes) -> bytes:
        """The document with a version that no ktrain of today reads, and a good digest."""
        body = data[: data.rindex(b',"digest"')].replace(b'"format":1', b'"format":99')
        return body + b',"digest":"' + document.digest_text(body).encode() + b'"}\n'

    def record(job: Job) -> None:
        job.lose_all()
        found = damage.record_of(job, NEWEST)
        found.put(newer(found.get()))

    def slot(job: Job) -> None:
        found = damage.copy_in(job, "memory", 0, NEWEST).manifest
        found.put(newer(found.get()))

    fault = "written by a newer ktrain"
    seen: frozenset[Alarm] = frozenset({("bad_copy", "bucket", None, NEWEST)})
    end, words = Stopped("config"), ("format 99", "formats up to 1", "upgrade ktrain")
    yield Case(fault, "bucket", "restore", "the newest record", record, end, words=words)
    seen = frozenset({("bad_copy", "memory", 0, None)})
    yield Case(fault, "memory", "restore", "a manifest", slot, Resumed(NEWEST, ("peer", "memory")), seen)
