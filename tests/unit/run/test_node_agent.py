"""The node agent: lends folders in memory, frees what nobody has open, keeps what somebody has."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.run import node_agent
from ktrain.run.node_agent import Loan, NodeAgent, file_system, parse
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.fake_clock import FakeClock

RUN, IDLE_S = "0123456789abcdef", 100.0
MOUNTS = (
    "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / {root} rw - tmpfs tmpfs rw\n3 1 0:3 / /lent\\040x rw - ext4 a rw\n"
)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def agent(tmp_path: Path, clock: FakeClock) -> NodeAgent:
    made = NodeAgent(Loan(tmp_path, ("team", "other"), 1 << 20, IDLE_S), clock)
    made.prepare(MOUNTS.format(root=tmp_path))
    return made


def volume(root: Path, namespace: str = "team", node: str = "node-0") -> NodeVolume:
    """As a job's agent opens it, below the folder of its run."""
    return NodeVolume(root / namespace / RUN, run="run-1", node=node, uri="s3://bucket/net")


def part(root: Path, namespace: str = "team", node: str = "node-0") -> Path:
    return root / namespace / RUN / "run-1" / node


def test_prepare_makes_a_private_folder_for_each_namespace_again_and_again(tmp_path: Path, agent: NodeAgent) -> None:
    (tmp_path / "team").chmod(0o2770)  # as the kubelet leaves it
    agent.prepare(MOUNTS.format(root=tmp_path))

    assert (tmp_path / "team").stat().st_mode & 0o7777 == 0o2770
    assert (tmp_path / "other").stat().st_mode & 0o7777 == 0o700


def test_prepare_refuses_a_root_that_is_not_in_memory(tmp_path: Path) -> None:
    agent = NodeAgent(Loan(tmp_path, ("team",), 1, IDLE_S))
    with pytest.raises(ConfigError, match="expected a file system in memory .*, found overlay"):
        agent.prepare(MOUNTS.format(root="/elsewhere"))
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses_to_lend_more_than_there_is(tmp_path: Path) -> None:
    agent = NodeAgent(Loan(tmp_path, ("team",), 1 << 60, IDLE_S))
    with pytest.raises(ConfigError, match="are to be lent, and its file system has"):
        agent.prepare(MOUNTS.format(root=tmp_path))


def test_prepare_refuses_a_link_in_the_place_of_a_namespace(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "team").symlink_to(tmp_path / "away")
    with pytest.raises(ConfigError, match="it is a link"):
        NodeAgent(Loan(tmp_path, ("team",), 1, IDLE_S)).prepare(MOUNTS.format(root=tmp_path))


def test_file_system_is_that_of_the_innermost_mount() -> None:
    text = MOUNTS.format(root="/dev/shm")
    assert file_system(Path("/dev/shm/ktrain"), text) == "tmpfs"
    assert file_system(Path("/dev/shmoo"), text) == "overlay"
    assert file_system(Path("/lent x/a"), text) == "ext4"


def test_job_opens_its_volume_in_a_folder_as_the_kubelet_makes_it(tmp_path: Path, agent: NodeAgent) -> None:
    """Writable by the group of the jobs, which every folder below inherits; what a job makes is its own alone."""
    (tmp_path / "team").chmod(0o2770)
    (tmp_path / "team" / RUN).mkdir()
    (tmp_path / "team" / RUN).chmod(0o2770)
    for _ in range(2):  # made, and taken up again
        volume(tmp_path).close()
    assert part(tmp_path).stat().st_mode & 0o777 == 0o700


def test_sweep_frees_what_nobody_had_open_for_long_enough(tmp_path: Path, agent: NodeAgent, clock: FakeClock) -> None:
    volume(tmp_path).close()
    assert agent.sweep() == 0  # seen idle for the first time
    clock.advance(IDLE_S - 1)
    agent.sweep()
    assert part(tmp_path).is_dir()
    clock.advance(1)
    agent.sweep()
    assert not part(tmp_path).exists()
    assert (tmp_path / "team" / RUN).is_dir()  # a pod may be about to mount it


def test_sweep_keeps_what_a_process_has_open_and_counts_anew_after_it(
    tmp_path: Path, agent: NodeAgent, clock: FakeClock
) -> None:
    volume(tmp_path).close()
    agent.sweep()
    clock.advance(IDLE_S - 1)
    held = volume(tmp_path)
    agent.sweep()
    clock.advance(10 * IDLE_S)
    agent.sweep()
    assert part(tmp_path).is_dir()
    held.close()
    agent.sweep()
    clock.advance(IDLE_S - 1)
    agent.sweep()
    assert part(tmp_path).is_dir()


def test_sweep_by_a_new_agent_counts_anew(tmp_path: Path, agent: NodeAgent, clock: FakeClock) -> None:
    volume(tmp_path).close()
    agent.sweep()
    clock.advance(2 * IDLE_S)
    NodeAgent(Loan(tmp_path, ("team",), 1, IDLE_S), clock).sweep()
    assert part(tmp_path).is_dir()


def test_sweep_does_not_follow_links_out_of_a_run(tmp_path: Path, agent: NodeAgent, clock: FakeClock) -> None:
    """A job may lay what it likes into its own folder, and another namespace's memory is none of its business."""
    volume(tmp_path, "other").close()
    mine = tmp_path / "team" / RUN
    (mine / "run-1").mkdir(parents=True)
    (mine / "run-1" / "node-7").symlink_to(part(tmp_path, "other"))
    (tmp_path / "team" / "whole").symlink_to(tmp_path / "other" / RUN)
    only_mine = NodeAgent(Loan(tmp_path, ("team",), 1, IDLE_S), clock)
    for _ in range(2):
        assert only_mine.sweep() == 0
        clock.advance(IDLE_S)
    assert (part(tmp_path, "other") / contract.VOLUME_FILE).is_file()


def test_sweep_reads_no_file_of_a_job(tmp_path: Path, agent: NodeAgent, clock: FakeClock) -> None:
    """One that never ends would stop the agent for all."""
    volume(tmp_path).close()
    (part(tmp_path) / contract.VOLUME_FILE).unlink()
    os.mkfifo(part(tmp_path) / contract.VOLUME_FILE)
    (part(tmp_path) / "rank-00000").mkdir()
    os.mkfifo(part(tmp_path) / "rank-00000" / "slot-0.manifest.json")
    for _ in range(2):
        agent.sweep()
        clock.advance(IDLE_S)
    assert not part(tmp_path).exists()


def test_sweep_goes_on_past_a_folder_that_cannot_be_removed(
    tmp_path: Path, agent: NodeAgent, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    volume(tmp_path, node="node-1").close()
    (part(tmp_path, node="node-1") / "rank-00000").symlink_to(tmp_path)  # not followed, and not taken for a folder
    volume(tmp_path, "other").close()
    for _ in range(2):
        agent.sweep()
        clock.advance(IDLE_S)
    assert not part(tmp_path, "other").exists()
    assert part(tmp_path, node="node-1").exists() and "node-1" in caplog.text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--nbytes", "many", "a"], "--nbytes: expected bytes"),
        (["--nbytes", "1Gi", "../a"], "namespace '../a'"),
        (["--nbytes", "1Gi", "--idle-s", "0", "a"], "--idle-s: expected seconds"),
    ],
)
def test_arguments_that_cannot_be_are_refused(words: list[str], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        parse(["--root", "/x", "--idle-s", "1", "--ready", "/y", *words])


def test_run_sweeps_until_it_is_told_to_stop(
    tmp_path: Path, agent: NodeAgent, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume(tmp_path).close()
    stop = threading.Event()
    looks = []

    def wait(event: threading.Event, timeout_s: float) -> bool:
        looks.append(part(tmp_path).exists())
        clock.advance(timeout_s)
        return event.is_set() or (not looks[-1] and not stop.set())

    monkeypatch.setattr(clock, "wait", wait)
    agent.run(stop)

    assert looks == [True, True, True, False]  # seen idle, still too short, freed


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_process_says_that_it_is_ready_and_leaves_the_folders_when_it_ends(tmp_path: Path) -> None:
    root = Path("/dev/shm") / f"ktrain-lent-{os.getpid()}"
    root.mkdir()
    ready = tmp_path / "ready"
    words = ["--root", str(root), "--nbytes", "1Mi", "--idle-s", "60", "--ready", str(ready), "team"]
    process = subprocess.Popen([sys.executable, "-P", "-m", node_agent.__name__, *words])
    try:
        while not ready.exists():
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        process.terminate()
        assert process.wait(timeout=30) == contract.EXIT_OK
        assert (root / "team").is_dir()
    finally:
        process.kill()
        process.wait()
        (root / "team").rmdir()
        root.rmdir()


def test_process_with_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = ["--root", "/proc", "--nbytes", "1Mi", "--idle-s", "60", "--ready", str(tmp_path / "r"), "team"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", node_agent.__name__, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == contract.EXIT_USAGE and len(done.stderr.splitlines()) == 1
    assert "found proc" in done.stderr
