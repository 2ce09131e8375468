"""Two nodes of a run's Ray cluster on this machine, and a raw Ray program in the same cluster beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.bench import Bench
from benchmarks.snapshots import RUN, Snapshotter
from ktrain.abc.transport import Receipt
from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.replicate import ray_settings
from ktrain.replicate.landing import IN_FLIGHT, PULL_NBYTES
from ktrain.replicate.ray_cluster import Cluster, RayHead, write_token
from ktrain.replicate.ray_transport import NodeWire, RayTransport

_START_S = 180.0
_PULL_S = 300.0
_END_S = 15.0
_HOSTS = ("127.0.0.2", "127.0.0.3")


@dataclass(slots=True)
class Wire:
    """node-0 holds what node-1 pulls."""

    source: RayTransport
    receiver: RayTransport
    raw: RawRay

    def pull(self, snapshots: Snapshotter) -> Receipt:
        """Brings the newest snapshot to node-1."""
        address = self.source.address()
        assert address is not None, "node-0 has lost its wire"
        return self.receiver.pull(address, 0, snapshots.identity, protect=(), deadline=Deadline.after(_PULL_S))


class RawRay:
    """A plain Ray program: a driver on node-1 gets chunks from an actor on node-0 and drops them."""

    def __init__(self, cluster: Cluster, work_dir: Path, token: str) -> None:
        self._token_file = write_token(work_dir, token)
        config = {
            "address": cluster.address,
            "source_host": _HOSTS[0],
            "driver_host": _HOSTS[1],
            "chunk_nbytes": PULL_NBYTES,
            "in_flight": IN_FLIGHT,
        }
        with open(work_dir / "raw-ray.log", "wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.raw_ray", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=ray_settings.environment(self._token_file),
                cwd=Path(__file__).parents[1],
                text=True,
            )
        self.proven = bool(self._hear()["proven"])

    def get(self, nbytes: int) -> float:
        """Seconds to get `nbytes`, measured there."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{nbytes}\n")
        self._child.stdin.flush()
        return float(self._hear()["seconds"])

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the raw Ray program ended; its log is in the work directory")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(_END_S)
        self._child.stdout.close()
        self._token_file.unlink(missing_ok=True)


def wire(bench: Bench) -> Wire:
    """The run's wire; Ray starts at the first use and ends with the run."""
    return bench.once("wire", lambda: _start(bench))


def _start(bench: Bench) -> Wire:
    token = ids.random_id(32)
    with ExitStack() as stack:
        head = RayHead(bench.work_dir / "head", host="127.0.0.1", token=token)
        stack.callback(head.close)
        cluster = head.start(deadline=Deadline.after(_START_S))
        nodes = []
        for index, host in enumerate(_HOSTS):
            work_dir = bench.work_dir / f"node-{index}"
            place = NodeWire(f"node-{index}", host, RUN, bench.volume_root, work_dir)
            node = RayTransport(place, token=token)
            stack.callback(node.close)
            node.connect(cluster.to_json())
            nodes.append(node)
        _wait(lambda: all(node.address() is not None for node in nodes))
        raw = stack.enter_context(RawRay(cluster, bench.work_dir, token))
        bench.stack.push(stack.pop_all())
    return Wire(nodes[0], nodes[1], raw)


def _wait(holds: Callable[[], bool]) -> None:
    deadline = Deadline.after(_START_S)
    while not holds():
        deadline.check("start of two Ray nodes")
        SYSTEM_CLOCK.sleep(0.02)
