"""Jobs that are resumed, moved by the test: ways to end them, to resume them, and to die on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ktrain.base.clock import Deadline
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes import stored
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import Door, Reply, connect
from ktrain.launcher.backends.kubernetes.resume import Last, Resumed, find_last, resume
from ktrain.launcher.backends.kubernetes.submission import Submission
from ktrain.launcher.backends.kubernetes.submit import try_successor
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.spec import JobSpec
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import FakeCluster

OWNED = (
    known.SECRET, known.SERVICE_ACCOUNT, known.ROLE, known.ROLE_BINDING, known.NETWORK_POLICY, known.CONFIG_MAP,
)  # fmt: skip


class RunRecords:
    """What a run keeps of submissions, in memory."""

    def __init__(self) -> None:
        self.found: list[Submission] = []

    def keep(self, submission: Submission) -> str | None:
        self.found.append(submission)
        return None

    def last(self) -> Submission | None:
        return self.found[-1] if self.found else None


class Died(BaseException):
    """The process is gone: nothing of it runs on, not even what it does when a step fails."""


class DyingDoor:
    """Lets a number of writes pass, and then nothing at all."""

    def __init__(self, door: Door, num_writes: int) -> None:
        self._door = door
        self._left = num_writes

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        is_write = method != "GET" and "dryRun" not in path
        if self._left < 0 or (is_write and self._left == 0):
            self._left = -1
            raise Died
        self._left -= is_write
        return self._door.send(method, path, headers, body, timeout_s)


def dying_client(cluster: FakeCluster, folder: Path, num_writes: int) -> Client:
    door = connect(cluster.write_kubeconfig(folder / "dying.json"))
    return Client(DyingDoor(door, num_writes), clock=FakeClock())


def end(cluster: FakeCluster, name: str, kind: str = "Failed", since: str = "2026-01-01T00:00:00Z") -> None:
    """As JobSet's controller writes the end of a job."""

    def change(jobset: dict[str, Any]) -> None:
        condition = {"type": kind, "status": "True", "reason": "Ended", "message": "words"}
        jobset["status"] = {"conditions": [{**condition, "lastTransitionTime": since}], "restarts": 2}

    cluster.store.mutate(known.JOB_SET, "default", name, change, status=True)


def go_on(
    client: Client,
    name: str = "net",
    *,
    records: RunRecords | None = None,
    archive: bytes | None = None,
    change: Mapping[str, Any] | None = None,
    seconds: float = 60.0,
) -> tuple[Last, Resumed | None]:
    """A whole `ktrain resume`; None where it had been sent before."""
    records = RunRecords() if records is None else records
    last = find_last(client, "default", name, from_run=records.last)
    if last.is_sent:
        stored.drop_ticket(client, "default", name)
        return last, None
    spec = _changed(last.submission.job, change or {})
    tried = try_successor(client, spec, archive)
    deadline = Deadline.after(seconds, client.clock)
    return last, resume(client, last, tried, archive, keep=records.keep, deadline=deadline)


def _changed(spec: JobSpec, change: Mapping[str, Any]) -> JobSpec:
    return spec_file.from_value({**spec_file.to_value(spec), **change})


def config_maps(cluster: FakeCluster, name: str) -> list[str]:
    found = cluster.store.list(known.CONFIG_MAP, "default").items
    return sorted(item["metadata"]["name"] for item in found if item["metadata"]["name"].startswith(name))


def strays(cluster: FakeCluster) -> Iterator[str]:
    """Objects that no JobSet which is there owns."""
    uids = {item["metadata"]["uid"] for item in cluster.store.list(known.JOB_SET, "default").items}
    for kind in OWNED:
        for item in cluster.store.list(kind, "default").items:
            owners = item["metadata"].get("ownerReferences") or [{"uid": None}]
            if owners[0]["uid"] not in uids:
                yield f"{kind.kind} {item['metadata']['name']}"
