"""The parts of the Ray wire that need no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.errors import UnavailableError
from ktrain.format.manifest import Identity
from ktrain.replicate import ray_settings
from ktrain.replicate.ray_cluster import Cluster, write_token
from ktrain.replicate.ray_keeper import finish, remove_links, session_members, short_name, sweep
from ktrain.replicate.ray_transport import NodeWire, RayTransport
from ktrain.replicate.ray_wire import RayWire, WireConfig, parse_address
from ktrain.testing.fake_clock import FakeClock

_FAMILY = (
    "import subprocess, sys; "
    "p = subprocess.Popen([sys.executable, '-c', 'import sys; print(1, flush=True); sys.stdin.read()'],"
    " stdin=subprocess.PIPE); sys.stdin.read()"
)


def test_sweep_kills_the_whole_session_and_nobody_else() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    outsider = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert parent.stdin and parent.stdout and outsider.stdin
    try:
        assert parent.stdout.readline() == b"1\n"  # the grandchild runs
        assert len(session_members(parent.pid)) == 2
        sweep(parent.pid)
        assert session_members(parent.pid) == []
        assert parent.wait() == -9
        assert outsider.poll() is None
    finally:
        outsider.communicate(b"\n")
        parent.stdin.close()
        parent.stdout.close()


def test_finish_empty_session_removes_the_link(tmp_path: Path) -> None:
    link = short_name(tmp_path)
    link.symlink_to(tmp_path)
    finish(2**30, link)
    assert not link.is_symlink()
    assert tmp_path.is_dir()


def test_short_name_long_temporary_directory_leaves_room_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    socket = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.9"
    assert len(f"{short_name(tmp_path)}{socket}") <= 107


def test_remove_links_takes_those_of_its_directory_alone(tmp_path: Path) -> None:
    mine, other = short_name(tmp_path / "a"), short_name(tmp_path / "b")
    mine.symlink_to(tmp_path)
    other.symlink_to(tmp_path)
    try:
        remove_links(tmp_path / "a")
        assert not mine.is_symlink()
        assert other.is_symlink()
    finally:
        remove_links(tmp_path / "b")


def test_environment_drops_what_another_ray_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("OTHER", "stays")
    environment = ray_settings.environment(tmp_path / "token")
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert environment["OTHER"] == "stays"


def test_write_token_is_for_this_user_alone(tmp_path: Path) -> None:
    path = write_token(tmp_path / "work", "secret")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "secret"


@pytest.mark.parametrize("source", ["local:node-0", "ray:x:node-0", "ray:3:", "ray:3", ""])
def test_parse_address_of_another_wire_is_unavailable(source: str) -> None:
    with pytest.raises(UnavailableError, match="expected an address"):
        parse_address(source, 3)


def test_parse_address_of_another_generation_is_unavailable() -> None:
    assert parse_address("ray:3:node-0-ab", 3) == "node-0-ab"
    with pytest.raises(UnavailableError, match="generation 2"):
        parse_address("ray:2:node-0-ab", 3)


def test_cluster_and_config_survive_their_wire_form() -> None:
    cluster = Cluster("127.0.0.1:6379", 7)
    assert Cluster.from_json(cluster.to_json()) == cluster
    config = WireConfig("n", "127.0.0.2", "run1", "/v", "/w", "/t", 2, cluster.address, 7)
    assert WireConfig.from_argument(config.to_argument()) == config
    assert config.cluster == cluster


def test_thread_of_a_pull_lets_training_first(tmp_path: Path) -> None:
    folder, found = str(tmp_path), list[int]()
    wire = RayWire(WireConfig("n", "127.0.0.2", "run1", folder, folder, folder, 2, "127.0.0.1:1", 7), print)
    identity = Identity("run1", 1, 1, 1).to_json()

    def pull() -> None:
        with pytest.raises(UnavailableError, match="generation 6"):
            wire._pull({"timeout_s": 5, "rank": 0, "identity": identity, "protect": [], "source": "ray:6:x"})
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=pull)
    thread.start()
    thread.join(30)
    assert found == [os.SCHED_BATCH]


def test_cluster_nobody_listens_does_not_answer() -> None:
    assert not Cluster("127.0.0.1:1", 1).answers()


def test_transport_before_connect_has_no_address_and_refuses_pulls(tmp_path: Path) -> None:
    wire = NodeWire("node-0", "127.0.0.2", "run1", tmp_path / "v", tmp_path / "w")
    transport = RayTransport(wire, token="t")
    try:
        assert transport.address() is None
        with pytest.raises(UnavailableError, match="node-0 is in no Ray cluster"):
            transport.pull("ray:1:x", 0, Identity("run1", 1, 1, 1), protect=(), deadline=Deadline.after(5.0))
    finally:
        transport.close()
    transport.close()
    transport.connect({"address": "127.0.0.1:1", "generation": 1})  # after the end: nothing happens
    assert transport.address() is None
    assert list((tmp_path / "w").iterdir()) == []


class _Waits(FakeClock):
    """Waits for nothing, and remembers the waits between attempts."""

    def __init__(self) -> None:
        super().__init__()
        self.backoffs: list[float] = []

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        if timeout_s < 60.0:  # else it has nothing to join
            self.backoffs.append(timeout_s)
        return super().wait(event, timeout_s)


def test_transport_no_head_there_says_so_once_and_keeps_trying(tmp_path: Path) -> None:
    losses: list[str] = []
    clock = _Waits()
    wire = NodeWire("node-0", "127.0.0.2", "run1", tmp_path / "v", tmp_path / "w")
    transport = RayTransport(wire, token="t", on_lost=losses.append, clock=clock)
    try:
        transport.connect({"address": "127.0.0.1:1", "generation": 1})
        deadline = Deadline.after(60.0)
        while len(clock.backoffs) < 3:
            deadline.check("three attempts to join")
            SYSTEM_CLOCK.sleep(0.02)
        assert transport.address() is None
    finally:
        transport.close()
    assert clock.backoffs[:3] == [2.0, 5.0, 15.0]
    assert list((tmp_path / "w").glob("ray-1-*")) == []
    assert losses == ["the Ray head at 127.0.0.1:1 does not answer"]
    links = [link for link in Path(tempfile.gettempdir()).glob("kt-*") if link.is_symlink()]
    assert [link for link in links if link.readlink().is_relative_to(tmp_path)] == []


def test_agent_side_imports_no_ray() -> None:
    script = "import sys, ktrain.replicate.ray_transport, ktrain.replicate.ray_cluster; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
