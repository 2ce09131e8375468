"""What a running head makes of the words about nodes that end: a head in the process, its nodes played by the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.control import Client
from ktrain.base.job import LaunchSpec, PodPlace, WorkDir
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.log import LogReader
from ktrain.run.head import Head
from ktrain.run.wire import WireKeeper
from tests.unit.run.builders import in_pod

WITHIN_S = 60.0
PLACE = PodPlace(host="h", address="127.0.0.1", head_port=0, join_s=600.0, ready_file="/work/ready")
BROKEN = "CUDA error: uncorrectable ECC error encountered"


class Nodes:
    """The nodes of a job, as far as its head can tell."""

    def __init__(self, spec: LaunchSpec, address: str, token: str) -> None:
        self.spec = spec
        self._head = Client(address, token)

    def call(self, method: str, said: dict[str, Any]) -> dict[str, Any]:
        return self._head.call(method, said, timeout_s=WITHIN_S)

    def beat(self, node: str, **changes: Any) -> None:
        about = {"member": node, "node": node, "host": "h", "instance": node, "epoch": 0, "wire": None}
        holds: dict[str, Any] = {"has_looked": True, "held": [], "on_disk": [], "manifests": [], "freed": False}
        news: dict[str, Any] = {"events": [], "events_from": 0, "events_logged": 0, "drained": [], "filled": []}
        self.call("beat", {**about, **holds, **news, "ranks": {}, "restore_round": 0, **changes})

    def report(self, node: str, state: str = "idle", **changes: Any) -> dict[str, Any]:
        """A supervisor's report, with a beat of its agent; what the head wants of the node."""
        self.beat(node)
        about = {"node": node, "host": "h", "pid": self.pid(node), "epoch": 1 if state != "idle" else 0}
        ranks = self.ranks(node) if state != "idle" else []
        said = {"state": state, "ranks": ranks, "pids": [100 + rank for rank in ranks], "exits": []}
        return self.call("supervise", {**about, **said, "store": None, **changes})

    def pid(self, node: str) -> int:
        return 10 + self.spec.node_names.index(node)

    def ranks(self, node: str) -> list[int]:
        first = self.spec.node_names.index(node) * self.spec.workers_per_node
        return list(range(first, first + self.spec.workers_per_node))

    def start(self) -> None:
        """Brings the job to where its attempt runs."""
        self.until(lambda: all([self.report(node)["action"] == "run" for node in self.spec.node_names]))
        for node in self.spec.node_names:
            self.report(node, "running")
        self.until(lambda: self.call("status", {})["state"] == "running")

    def until(self, seen: Callable[[], bool]) -> None:
        deadline = Deadline.after(WITHIN_S)
        while not seen():
            deadline.check("the head")
            SYSTEM_CLOCK.sleep(0.02)

    def end(self, node: str, *, told: bool) -> None:
        """The last words of its pod: its trainer's, then its agent's, which is a sidecar and always told."""
        for role, said in (("supervisor", told), ("node", True)):
            self.call(
                "process_exited", {"processes": [{"node": node, "role": role, "pid": self.pid(node), "told": said}]}
            )


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    return replace(in_pod(), run=str(tmp_path / "run"), pod=PLACE, patience_s=180.0)  # no lease ends in a test


@pytest.fixture
def running(spec: LaunchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Nodes, Future[int]]]:
    monkeypatch.setattr(WireKeeper, "start", lambda self: None)
    work = WorkDir(tmp_path / "work")
    work.path.mkdir()
    work.write_token()
    head = Head(spec, work)
    with ThreadPoolExecutor(1) as threads:
        try:
            yield Nodes(spec, head._server.address, work.read_token()), threads.submit(head.run)
        finally:
            head.leave()


def noted_as_told(spec: LaunchSpec) -> list[str]:
    """Nodes that the next head of the launch takes for told to end from outside."""
    (path,) = Path(spec.run).rglob("head.json")
    return list(json.loads(path.read_text())["told"])


def test_head_node_that_it_gave_back_is_not_one_that_was_taken(
    spec: LaunchSpec, running: tuple[Nodes, Future[int]]
) -> None:
    nodes, _ = running
    nodes.start()
    exits = [{"rank": 2, "pid": 100, "exitcode": 1, "reason": BROKEN, "kind": "exception"}]
    nodes.report("node-1", "failed", exits=exits)
    nodes.report("node-0", "stopped")
    nodes.until(lambda: nodes.report("node-1", "failed", exits=exits)["action"] == "replace")

    nodes.end("node-1", told=False)
    nodes.end("node-0", told=True)
    nodes.until(lambda: "node-0" in noted_as_told(spec))

    assert noted_as_told(spec) == ["node-0"]


def test_head_success_waits_for_no_volume_of_a_pod_that_said_goodbye(
    spec: LaunchSpec, running: tuple[Nodes, Future[int]]
) -> None:
    nodes, head = running
    nodes.start()
    for node in spec.node_names:
        nodes.report(node, "succeeded")
    nodes.until(lambda: nodes.call("status", {})["state"] == "ended")

    nodes.end("node-1", told=False)  # its sidecar was told to end, freed its volume, and had nobody to say so to
    nodes.beat("node-0", freed=True)

    assert head.result(WITHIN_S) == contract.EXIT_OK
    events = LogReader(spec.run, timeouts=Timeouts(spec.patience_s)).read_new()
    assert not [event.fields["message"] for event in events if event.kind == "notice"]
