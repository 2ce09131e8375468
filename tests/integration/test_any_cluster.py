"""What holds on every cluster: a job is sent, hurt, cancelled, resumed and removed, all through the API.

It runs on the cluster in the process, and on another one where both of these are set:

    KTRAIN_TEST_KUBECONFIG    how it is reached, by its current context
    KTRAIN_TEST_JOB           job file with what a job needs there: image, run (a place for runs), secrets, queue, ...
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.errors import NotFoundError
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes import act, logs, remote
from ktrain.launcher.backends.kubernetes.client import Client, path_of
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.resume import find_last, resume
from ktrain.launcher.backends.kubernetes.status import Pod, State, Status, assess
from ktrain.launcher.backends.kubernetes.submit import submit, try_job, try_successor
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.spec import JobSpec
from tests.integration import cluster_jobs, launch_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("undumped")]

KUBECONFIG, JOB = settings.env("KTRAIN_TEST_KUBECONFIG"), settings.env("KTRAIN_TEST_JOB")
STEPS = 150
WITHIN_S = 600.0  # of another's cluster, which may pull the image; the one in the process takes seconds


@dataclass
class Place:
    """A cluster, and a job of two nodes that it can run, with the code that goes with it."""

    client: Client
    spec: JobSpec
    archive: CodeArchive

    def status(self) -> Status:
        return assess(look(self.client, self.spec.namespace, self.spec.name))

    def worker(self, index: int) -> Pod | None:
        found = [pod for pod in self.status().pods or () if (pod.role, pod.index) == ("worker", index)]
        return next((pod for pod in found if pod.phase == "Running"), None)

    def output(self) -> str:
        """What rank 0 has written, as far as the cluster keeps it."""
        (source, *_) = logs.of_rank(0)(look(self.client, self.spec.namespace, self.spec.name)) or (None,)
        if source is None:
            return ""
        try:
            return b"".join(logs.read(self.client, self.spec.namespace, source)).decode()
        except NotFoundError:  # it is being replaced
            return ""

    def await_that(self, what: str, holds: Callable[[], Any]) -> Any:
        deadline = Deadline.after(WITHIN_S)
        while not (found := holds()):
            assert not deadline.expired(), f"{what}: not within {WITHIN_S:g} s; {self.status()}\n{self.output()}"
            SYSTEM_CLOCK.sleep(0.2)
        return found

    def await_step(self, step: int) -> None:
        self.await_that(f"step {step}", lambda: f"step {step}\n" in self.output())

    def deadline(self) -> Deadline:
        return Deadline.after(WITHIN_S, self.client.clock)

    def remove(self) -> None:
        try:
            act.delete(self.client, self.spec.namespace, self.spec.name, deadline=self.deadline())
        except NotFoundError:
            pass


def code(folder: Path) -> CodeArchive:
    """The small training, which says how far it is."""
    text, pause = Path(launch_worker.__file__).read_text(), "        time.sleep(seconds)\n"
    assert text.count(pause) == 1
    (folder / "code").mkdir()
    (folder / "code" / "train.py").write_text(text.replace(pause, f'        print("step", step)\n{pause}'))
    return pack_code(folder / "code")


@contextmanager
def in_process(folder: Path) -> Iterator[Place]:
    with cluster_jobs.start() as running:
        fields = cluster_jobs.small_job("any", limits={"patience_s": 20})
        yield place(cluster_jobs.client_of(running, folder), fields, folder)


@contextmanager
def another(folder: Path) -> Iterator[Place]:
    assert KUBECONFIG is not None and JOB is not None
    given = spec_file.read_toml(Path(JOB))
    name = f"any-{ids.random_id(3)}"
    fields = {**given, "name": name, "run": f"{given['run'].rstrip('/')}/{name}", "nodes": 2}
    yield place(Client(connect(Path(KUBECONFIG), None)), fields, folder)


def place(client: Client, fields: dict[str, Any], folder: Path) -> Place:
    archive = code(folder)
    sent = {"command": ["train.py", str(STEPS), "0.1"], "code": {"archive": archive.sha256}}
    return Place(client, spec_file.from_value({**fields, **sent}), archive)


PLACES = {"in the process": in_process, "another": another}


@pytest.fixture(params=PLACES)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "another" and (KUBECONFIG is None or JOB is None):
        pytest.skip("no other cluster: KTRAIN_TEST_KUBECONFIG and KTRAIN_TEST_JOB name one, and a job file for it")
    with PLACES[request.param](tmp_path) as found:
        try:
            yield found
        finally:
            found.remove()


def test_job_is_sent_hurt_cancelled_resumed_and_removed(cluster: Place) -> None:
    client, spec, data = cluster.client, cluster.spec, cluster.archive.data
    assert submit(client, try_job(client, spec, data), data).submission.number == 1
    cluster.await_step(10)

    source = remote.find_pod(client, spec.namespace, spec.name, logs.of_rank(0))
    streams = remote.Streams(None, io.BytesIO(), io.BytesIO())
    assert (
        remote.run_command(client, spec.namespace, source, ["true"], streams=streams, deadline=cluster.deadline()) == 0
    )

    lost = cluster.worker(1)
    assert lost is not None
    path = f"{path_of('v1', 'pods', spec.namespace)}/{lost.name}"
    client.delete(path, client.get(path)["metadata"]["uid"])
    cluster.await_that("another pod", lambda: (pod := cluster.worker(1)) is not None and pod.name != lost.name)
    cluster.await_step(40)

    cancelled = act.cancel(client, spec.namespace, spec.name, deadline=cluster.deadline())
    assert (cancelled.state, cancelled.exit_code) == (State.CANCELLED, contract.EXIT_STOPPED)

    last = find_last(client, spec.namespace, spec.name)
    sent = resume(
        client, last, try_successor(client, spec, data), data, keep=lambda record: None, deadline=cluster.deadline()
    )
    assert sent.sent.submission.number == 2
    ended = act.wait(client, spec.namespace, spec.name, deadline=cluster.deadline())
    assert (ended.state, ended.exit_code) == (State.DONE, contract.EXIT_OK), cluster.output()
    said = [int(line.split()[-1]) for line in cluster.output().splitlines() if "step " in line]
    assert said[-1] == STEPS and said[0] > 10, "it went on from a checkpoint"

    cluster.remove()
    with pytest.raises(NotFoundError):
        look(client, spec.namespace, spec.name)
