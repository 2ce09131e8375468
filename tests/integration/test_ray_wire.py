"""The Ray wire with a real Ray: one cluster of two nodes on this machine, and everything that may end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.settings import child_environment
from ktrain.errors import DeadlineError, KtrainError, UnavailableError
from ktrain.format.manifest import Identity
from ktrain.replicate.ray_cluster import RayHead
from ktrain.replicate.ray_keeper import session_members
from ktrain.replicate.ray_transport import NodeWire, RayTransport
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.transport_conformance import TransportConformance, WirePair, seal_snapshot

RUN = "run1"
TOKEN = "0123456789abcdef" * 4
WAIT_S = 120.0  # seconds on an idle machine

pytestmark = pytest.mark.timeout(300)


@dataclass(slots=True)
class Node:
    transport: RayTransport
    volume: NodeVolume
    work_dir: Path
    losses: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Rig:
    head: RayHead
    nodes: list[Node]
    work_dir: Path

    def serving(self) -> None:
        for node in self.nodes:
            wait_until(lambda node=node: node.transport.address() is not None, "a node to serve")


def wait_until(holds: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    deadline = Deadline.after(wait_s)
    while not holds():
        deadline.check(f"wait for {what}")
        SYSTEM_CLOCK.sleep(0.02)


def ray_processes(work_dir: Path) -> list[int]:
    """Pids of living processes that run in a Ray folder below `work_dir`: keepers and what they started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            inside = entry.name.isdecimal() and Path(os.readlink(entry / "cwd")).is_relative_to(work_dir)
        except OSError:
            continue
        if inside and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def links_into(work_dir: Path) -> list[Path]:
    """Short names of folders below `work_dir`; other runs on this machine have theirs."""
    links = Path(tempfile.gettempdir()).glob("kt-*")
    return [link for link in links if link.is_symlink() and link.readlink().is_relative_to(work_dir)]


def node_processes(node: Node) -> list[int]:
    return ray_processes(node.work_dir)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    work_dir = tmp_path_factory.mktemp("a-rather-long-name-so-that-socket-paths-would-not-fit-" + "x" * 60)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as volume_root:  # noqa: S108 -- the memory tier is meant
        head = RayHead(work_dir / "head", host="127.0.0.1", token=TOKEN)
        nodes = []
        for index in range(2):
            wire = NodeWire(
                node=f"node-{index}",
                host=f"127.0.0.{index + 2}",
                run=RUN,
                volume_root=Path(volume_root),
                work_dir=work_dir / f"node-{index}",
            )
            losses: list[str] = []
            transport = RayTransport(wire, token=TOKEN, on_lost=losses.append)
            volume = NodeVolume(wire.volume_root, node=wire.node, run=RUN)
            nodes.append(Node(transport, volume, wire.work_dir, losses))
        rig = Rig(head, nodes, work_dir)
        try:
            cluster = head.start(deadline=Deadline.after(WAIT_S))
            for node in nodes:
                node.transport.connect(cluster.to_json())
            rig.serving()
            yield rig
        finally:
            for node in nodes:
                node.transport.close()
                node.volume.close()
            head.close()
        assert ray_processes(work_dir) == []
        assert links_into(work_dir) == []
        assert list(Path("/dev/shm").glob("plasma*")) == []  # noqa: S108
        assert list(work_dir.rglob("ray-token*")) == []


@pytest.fixture
def pair(rig: Rig) -> WirePair:
    source, receiver = rig.nodes
    return WirePair(receiver.transport, receiver.volume, source.transport, source.volume, run=RUN, slots=2)


class TestRayTransport(TransportConformance):
    @pytest.fixture
    def wires(self, pair: WirePair) -> WirePair:
        return pair

    def test_processes_keep_the_token_out_of_sight(self, rig: Rig) -> None:
        token_files = list(rig.work_dir.rglob("ray-token*"))
        assert {path.stat().st_mode & 0o777 for path in token_files} == {0o600}
        for pid in ray_processes(rig.work_dir):
            for name in ("environ", "cmdline"):
                assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()

    def test_join_without_the_token_is_refused(self, rig: Rig) -> None:
        cluster = rig.head.cluster
        assert cluster is not None
        script = "import ray._raylet as r, sys; r.GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)"
        environment = child_environment({"RAY_AUTH_MODE": "disabled"})
        command = [sys.executable, "-c", script, cluster.address]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
        assert result.returncode != 0
        assert "nauthenticated" in result.stderr or "oken" in result.stderr

    def test_pull_with_stopped_source_ends_at_its_deadline(self, rig: Rig, pair: WirePair) -> None:
        identity = Identity(RUN, 10, 1, 100)
        seal_snapshot(pair.source_volume, 90, identity, 5000)
        address = pair.source.address()
        assert address is not None
        stopped = node_processes(rig.nodes[0])
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            deadline = Deadline.after(1.0)
            with pytest.raises(DeadlineError):
                pair.receiver.pull(address, 90, identity, protect=(), deadline=deadline)
            late_s = SYSTEM_CLOCK.monotonic() - deadline.at_s
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert late_s < 2.0
        assert pair.pull(90, identity).rank == 90

    def test_source_killed_in_mid_pull_is_unavailable_and_comes_back(self, rig: Rig, pair: WirePair) -> None:
        source = rig.nodes[0]
        source.losses.clear()
        identity = Identity(RUN, 10, 1, 100)
        seal_snapshot(pair.source_volume, 91, identity, 400 << 20)
        address = pair.source.address()
        assert address is not None
        errors: list[Exception] = []

        def pull() -> None:
            try:
                pair.receiver.pull(address, 91, identity, protect=(), deadline=Deadline.after(WAIT_S))
            except KtrainError as error:
                errors.append(error)

        thread = threading.Thread(target=pull)
        begun_s = SYSTEM_CLOCK.monotonic()
        thread.start()
        slot = pair.kept.path / "rank-00091" / "slot-0.safetensors"
        wait_until(slot.exists, "the pull to begin")
        for pid in node_processes(source):
            os.kill(pid, signal.SIGKILL)
        thread.join(WAIT_S)
        assert [type(error) for error in errors] in ([UnavailableError], [DeadlineError])
        assert SYSTEM_CLOCK.monotonic() - begun_s < 30.0
        assert [held for held in pair.kept.scan() if held.rank == 91] == []
        wait_until(lambda: pair.source.address() not in (None, address), "the source to join again")
        assert len(source.losses) == 1
        assert pair.pull(91, identity).nbytes == 400 << 20

    def test_head_killed_is_said_once_and_a_new_generation_serves(self, rig: Rig, pair: WirePair) -> None:
        old = pair.source.address()
        assert old is not None
        for node in rig.nodes:
            node.losses.clear()
        for pid in ray_processes(rig.work_dir / "head"):
            os.kill(pid, signal.SIGKILL)
        for node in rig.nodes:
            wait_until(lambda node=node: node.transport.address() is None, "the loss", 15.0)
        with pytest.raises(UnavailableError, match="no Ray cluster"):
            pair.receiver.pull(old, 92, Identity(RUN, 10, 1, 100), protect=(), deadline=Deadline.after(5.0))
        assert not rig.head.alive()
        cluster = rig.head.start(deadline=Deadline.after(WAIT_S))
        for node in rig.nodes:
            node.transport.connect(cluster.to_json())
        rig.serving()
        assert [len(node.losses) for node in rig.nodes] == [1, 1]
        identity = Identity(RUN, 10, 1, 100)
        seal_snapshot(pair.source_volume, 92, identity, 5000)
        with pytest.raises(UnavailableError, match="generation 1"):
            pair.receiver.pull(old, 92, identity, protect=(), deadline=Deadline.after(5.0))
        assert pair.pull(92, identity).rank == 92


_OWNER = """
import sys
from pathlib import Path
from ktrain.base.clock import Deadline, SYSTEM_CLOCK
from ktrain.replicate.ray_cluster import RayHead
from ktrain.replicate.ray_transport import NodeWire, RayTransport
work_dir = Path(sys.argv[1])
head = RayHead(work_dir / "head", host="127.0.0.1", token="a" * 64)
wire = NodeWire("node-0", "127.0.0.9", "run1", work_dir / "volume", work_dir / "node")
transport = RayTransport(wire, token="a" * 64)
transport.connect(head.start(deadline=Deadline.after(120.0)).to_json())
deadline = Deadline.after(120.0)
while transport.address() is None:
    deadline.check("serving")
    SYSTEM_CLOCK.sleep(0.05)
print("serving", flush=True)
sys.stdin.read()
"""


def test_owner_killed_leaves_no_process_and_no_link(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdin is not None and owner.stdout is not None
    try:
        assert owner.stdout.readline() == "serving\n"
        sessions = {os.getsid(pid) for pid in ray_processes(tmp_path)}
        assert len(sessions) == 2
        assert len(links_into(tmp_path)) == 2
    finally:
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
    wait_until(lambda: ray_processes(tmp_path) == [], "Ray to end with its owner", 15.0)
    assert [pid for session in sessions for pid in session_members(session)] == []
    assert links_into(tmp_path) == []
