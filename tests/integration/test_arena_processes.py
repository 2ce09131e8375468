"""Slots change hands only when their last writer is proven dead: processes killed, stopped and forked."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrain.errors import CapacityError, ConflictError, NotFoundError
from ktrain.snapshot.arena import NodeVolume, ProblemKind, list_volumes, remove_volume
from tests.unit.snapshot.builders import RUN, identity, save, steps, try_save, volume_at

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
Start = Callable[[], "Process"]


class Process:
    """A running `arena_child`."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "tests.integration.arena_child", str(root)]
        self._popen = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._popen.pid
        assert self._answer() == "ready"

    def tell(self, command: str) -> str:
        """The answer, or "" when the process died of the command."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(command.encode() + b"\n")
        self._popen.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._popen.stdout is not None
        ready, _, _ = select.select([self._popen.stdout], [], [], WAIT_S)
        assert ready, f"no answer of process {self.pid} within {WAIT_S} s"
        return self._popen.stdout.readline().decode().strip()

    def stop(self) -> None:
        """Returns once the process is stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        assert found is not None and found.si_status == signal.SIGSTOP

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Returns once the process is dead; twice is fine."""
        self._popen.kill()
        self._popen.wait(WAIT_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def kill_stranger(pid: int) -> None:
    """Kills a process that is no child of ours; returns once it is dead."""
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        assert select.select([fd], [], [], WAIT_S)[0], f"process {pid} did not die"
    finally:
        os.close(fd)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def start_one() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[NodeVolume]:
    with volume_at(tmp_path) as opened:
        yield opened


def slot_files(volume: NodeVolume) -> list[str]:
    return sorted(path.stem for path in (volume.path / "rank-00003").glob("*.safetensors"))


def test_slot_of_a_killed_writer_is_torn_and_is_the_next_one_taken(start: Start, volume: NodeVolume) -> None:
    child = start()
    for step in (10, 20):
        child.tell(f"save {step} 1 300")
    assert child.tell("begin 30 1") == "rank-00003/slot-0"
    child.kill()
    assert steps(volume) == [(20, 1)]
    assert [(p.slot, p.kind) for p in volume.problems()] == [("rank-00003/slot-0", ProblemKind.TORN)]
    assert save(volume, 30, 2).slot == "rank-00003/slot-0"
    assert steps(volume) == [(20, 1), (30, 2)]


def test_slot_that_a_killed_process_had_leased_ahead_is_whole_and_the_next_attempts_to_take(
    start: Start, volume: NodeVolume
) -> None:
    child = start()
    for step in (10, 20):
        child.tell(f"save {step} 1 300")
    assert child.tell("lease_ahead") == "done"
    with pytest.raises(NotFoundError):
        volume.open(3, identity(10))
    child.kill()
    volume.open(3, identity(10)).close()
    assert steps(volume) == [(10, 1), (20, 1)] and not volume.problems()
    assert save(volume, 30, 2, limit=2).slot == "rank-00003/slot-0"
    assert steps(volume) == [(20, 1), (30, 2)]


def test_scan_after_every_process_is_dead_finds_all_that_was_sealed(start: Start, tmp_path: Path) -> None:
    child = start()
    for step in (10, 20):
        child.tell(f"save {step} 1 300")
    child.kill()
    (info,) = list_volumes(tmp_path)
    assert [held.identity.step for held in info.held] == [10, 20]
    assert not info.live
    with volume_at(tmp_path) as volume:
        assert steps(volume) == [(10, 1), (20, 1)]


def test_slots_of_a_stopped_writer_are_not_taken_and_it_may_finish(start: Start, volume: NodeVolume) -> None:
    child = start()
    child.tell("save 10 1 300")
    assert child.tell("begin 20 1") == "rank-00003/slot-1"
    child.stop()
    mine = {save(volume, step, 2, limit=2).slot for step in (20, 30, 40, 50)}
    assert mine == {"rank-00003/slot-2", "rank-00003/slot-3"}
    child.go_on()
    assert child.tell("finish 20 1") == "rank-00003/slot-1"
    assert steps(volume) == [(10, 1), (20, 1), (40, 2), (50, 2)]


def test_slots_of_a_stopped_writer_are_taken_once_it_is_dead(start: Start, volume: NodeVolume) -> None:
    child = start()
    child.tell("save 10 1 300")
    child.tell("begin 20 1")
    child.stop()
    save(volume, 30, 2)
    child.kill()
    assert save(volume, 40, 2).slot == "rank-00003/slot-1"  # the torn one
    assert save(volume, 50, 2).slot == "rank-00003/slot-0"  # then the oldest
    assert len(slot_files(volume)) == 3


def test_forked_child_keeps_the_slots_of_its_dead_parent(start: Start, volume: NodeVolume) -> None:
    child = start()
    child.tell("begin 10 1")
    forked = int(child.tell("fork"))
    child.kill()
    try:
        assert save(volume, 20, 2).slot == "rank-00003/slot-1"
        assert [p.kind for p in volume.problems()] == [ProblemKind.WRITING]
    finally:
        kill_stranger(forked)
    assert save(volume, 30, 2).slot == "rank-00003/slot-0"


def test_volume_in_a_forked_child_refuses_to_write(start: Start) -> None:
    assert "used in a forked child" in start().tell("acquire_in_fork")


def test_lease_of_a_stopped_reader_holds_and_dies_with_it(start: Start, volume: NodeVolume) -> None:
    for step in (10, 20):
        save(volume, step, limit=2)
    child = start()
    assert child.tell("open 10 1") == "rank-00003/slot-0"
    child.stop()
    assert try_save(volume, 30, limit=2) is None
    child.kill()
    save(volume, 30, limit=2)
    assert steps(volume) == [(20, 1), (30, 1)]


def test_remove_waits_for_the_death_of_a_stopped_process(start: Start, tmp_path: Path) -> None:
    child = start()
    child.tell("save 10 1 300")
    child.stop()
    (info,) = list_volumes(tmp_path)
    with pytest.raises(ConflictError, match="living process"):
        remove_volume(info)
    child.kill()
    assert remove_volume(info) > 0


OLD = [(10, 1), (20, 1)]
WITHOUT = [(20, 1)]
NEW = [(20, 1), (30, 1)]
SAME, LARGER, SMALLER = 300, 90_000, 7


@pytest.mark.parametrize(
    ("step", "num_floats", "expected"),
    [
        ("leased", SAME, OLD),
        ("grown", LARGER, OLD),
        ("mapped", LARGER, OLD),
        ("mapped", SMALLER, OLD),
        ("unsealed", SAME, WITHOUT),
        ("unsealed", LARGER, WITHOUT),
        ("cut", SMALLER, WITHOUT),
        ("manifest-written", SAME, WITHOUT),
        ("sealed", SAME, NEW),
        ("unleased", SAME, NEW),
    ],
)
def test_writer_killed_after_any_step_leaves_only_whole_snapshots(
    start: Start, volume: NodeVolume, step: str, num_floats: int, expected: list[tuple[int, int]]
) -> None:
    child = start()
    for first in (10, 20):
        child.tell(f"save {first} 1 {SAME}")
    child.tell(f"die_at {step}")
    assert child.tell(f"save 30 1 {num_floats}") == "", "the step was not reached"
    child.kill()
    assert steps(volume) == expected
    save(volume, 40, 2, limit=2)
    assert steps(volume)[-1] == (40, 2)
    assert len(slot_files(volume)) == 2
    assert not list((volume.path / "rank-00003").glob("slot-*.bad*"))


@pytest.mark.parametrize("step", ["leased", "grown", "mapped", "unsealed", "manifest-written"])
def test_writer_killed_while_making_a_slot_leaves_the_others(start: Start, volume: NodeVolume, step: str) -> None:
    child = start()
    child.tell(f"save 10 1 {SAME}")
    child.tell(f"die_at {step}")
    assert child.tell(f"save 20 1 {SAME}") == "", "the step was not reached"
    child.kill()
    assert steps(volume) == [(10, 1)]
    assert save(volume, 20, 2, limit=2).slot == "rank-00003/slot-1"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a memory-backed volume in /dev/shm")
def test_acquire_of_more_than_the_volume_has_is_capacity_error_and_no_signal() -> None:
    root = Path(f"/dev/shm/ktrain-test-{os.getpid()}")
    stat = os.statvfs("/dev/shm")
    volume = NodeVolume(root, run=RUN, node="node-0")
    try:
        for step in (10, 20):
            save(volume, step)
        with pytest.raises(CapacityError, match=r"needs \d+ bytes.*are free"):
            volume.acquire(3, stat.f_blocks * stat.f_frsize + 4096, protect=(), limit=3)
        assert steps(volume) == [(10, 1), (20, 1)]
    finally:
        volume.remove()
        root.rmdir()
