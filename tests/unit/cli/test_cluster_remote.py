"""Into the pods of a job by commands: what runs there, what their ports say, what their ranks write."""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.cli.main import main
from ktrain.errors import ConfigError, DeadlineError, ForbiddenError, KtrainError, NotFoundError
from ktrain.launcher.backends.kubernetes import logs, remote
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.launcher.on_cluster.clusters import CRDS, job, make_worker

JOB = ("--run", "memory://bucket/net", "--image", "example/train:1", "--state", "1Gi", "--nodes", "2")


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    """A client in real time, of a cluster with the job and its two workers."""
    made = Client(connect(cluster.write_kubeconfig(tmp_path / "kubeconfig")))
    submit(made, try_job(made, job(), None, None), None)
    for index in range(2):
        make_worker(cluster, index, f"rank {index}\n")
    return made


def run_python(
    client: Client, code: str, *, rank: int = 0, stdin: int | None = None, within_s: float = 20.0
) -> tuple[int, bytes, bytes]:
    source = remote.find_pod(client, "default", "net", logs.of_rank(rank))
    out, err = io.BytesIO(), io.BytesIO()
    streams = remote.Streams(stdin, out, err)
    command = (sys.executable, "-c", code)
    deadline = Deadline.after(within_s, client.clock)
    exit_code = remote.run_command(client, "default", source, command, streams=streams, deadline=deadline)
    return exit_code, out.getvalue(), err.getvalue()


# exec


def test_command_passes_on_its_output_and_its_exit_code(client: Client) -> None:
    code = "import sys; print('a' * 300_000); print('b', file=sys.stderr); sys.exit(7)"

    assert run_python(client, code, rank=1) == (7, b"a" * 300_000 + b"\n", b"b\n")


def test_command_that_succeeds_gives_zero_and_one_that_is_killed_what_a_shell_says(client: Client) -> None:
    assert run_python(client, "pass")[0] == 0
    assert run_python(client, "import os; os.kill(os.getpid(), 9)")[0] == 137


def test_command_reads_what_stands_on_standard_input_to_its_end(client: Client) -> None:
    reads, writes = os.pipe()
    os.write(writes, b"seven\n" * 7)
    os.close(writes)
    try:
        assert run_python(client, "import sys; print(len(sys.stdin.read()))", stdin=reads) == (0, b"42\n", b"")
    finally:
        os.close(reads)


def test_command_that_does_not_end_is_given_up_at_the_deadline(client: Client) -> None:
    with pytest.raises(DeadlineError, match="net-worker-0-0"):
        run_python(client, "import signal; signal.pause()", within_s=0.2)


def test_command_that_is_not_there_is_bad_input(client: Client) -> None:
    source = remote.find_pod(client, "default", "net", logs.of_rank(0))
    streams = remote.Streams(None, io.BytesIO(), io.BytesIO())

    with pytest.raises(ConfigError, match="was not run: .*no-such-program"):
        deadline = Deadline.after(20.0, client.clock)
        remote.run_command(client, "default", source, ("no-such-program",), streams=streams, deadline=deadline)


def test_pod_that_is_gone_and_container_that_is_not_its_own_are_refused(client: Client, cluster: FakeCluster) -> None:
    from dataclasses import replace

    source = remote.find_pod(client, "default", "net", logs.of_rank(0))
    streams = remote.Streams(None, io.BytesIO(), io.BytesIO())
    deadline = Deadline.after(20.0, client.clock)

    with pytest.raises(ConfigError, match="container other is not valid"):
        remote.run_command(
            client, "default", replace(source, container="other"), ("x",), streams=streams, deadline=deadline
        )
    with pytest.raises(NotFoundError):
        remote.run_command(client, "default", replace(source, pod="gone"), ("x",), streams=streams, deadline=deadline)
    with pytest.raises(NotFoundError, match="ranks are 0 to 1"):
        remote.find_pod(client, "default", "net", logs.of_rank(2))


def test_user_who_may_not_is_told_so(cluster: FakeCluster, client: Client, tmp_path: Path) -> None:
    source = remote.find_pod(client, "default", "net", logs.of_rank(0))
    stranger = Client(connect(cluster.write_kubeconfig(tmp_path / "other", user="nobody")))
    streams = remote.Streams(None, io.BytesIO(), io.BytesIO())

    with pytest.raises(ForbiddenError):
        deadline = Deadline.after(20.0, client.clock)
        remote.run_command(stranger, "default", source, ("true",), streams=streams, deadline=deadline)


def ktrain(cluster: FakeCluster, folder: Path, *arguments: str) -> int:
    config = cluster.write_kubeconfig(folder / "kubeconfig")
    verb, *rest = arguments
    with pytest.raises(SystemExit) as caught:
        main((verb, "--kubeconfig", str(config), *rest))
    return int(caught.value.code or 0)


def test_exec_verb_leaves_with_the_command_s_code(
    cluster: FakeCluster, client: Client, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    code = "import sys; print('here'); sys.exit(3)"

    assert ktrain(cluster, tmp_path, "exec", "--rank", "1", "net", "--", sys.executable, "-c", code) == 3

    assert capfdbinary.readouterr().out == b"here\n"
    (asked,) = cluster.requests(lambda request: request.path.endswith("/exec"))
    assert "net-worker-0-1" in asked.path and asked.query["container"] == "trainer"
    assert ktrain(cluster, tmp_path, "exec", "--rank", "0", "--head", "net", "--", "true") == contract.EXIT_USAGE
    slow = (sys.executable, "-c", "import signal; signal.pause()")
    assert ktrain(cluster, tmp_path, "exec", "--timeout", "0.2", "net", "--", *slow) == contract.EXIT_UNFINISHED


def test_agent_is_entered_before_the_trainer_of_its_pod_has_started(
    cluster: FakeCluster, client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def wait_for_image(pod: dict[str, Any]) -> None:
        waiting = {"name": "trainer", "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}
        agent = {"name": "agent", "restartCount": 0, "state": {"running": {}}}
        pod["status"] = {"phase": "Pending", "containerStatuses": [waiting], "initContainerStatuses": [agent]}

    cluster.store.mutate(known.POD, "default", "net-worker-0-1-abcde", wait_for_image, status=True)
    said = (sys.executable, "-c", "print('here')")

    assert ktrain(cluster, tmp_path, "exec", "--rank", "1", "net", "--", *said) == contract.EXIT_USAGE
    assert ktrain(cluster, tmp_path, "exec", "--rank", "1", "--container", "agent", "net", "--", *said) == 0
    assert capfd.readouterr().out == "here\n"
    (asked,) = cluster.requests(lambda request: request.path.endswith("/exec"))
    assert asked.query["container"] == "agent"
    assert (
        ktrain(cluster, tmp_path, "exec", "--head", "--container", "agent", "net", "--", *said) == contract.EXIT_USAGE
    )
    assert "leave one out" in capfd.readouterr().err


# port-forward


class Echo:
    """A server on 127.0.0.1 that answers each connection with what it got up to a stop, twice, and closes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                data = b""
                while not data.endswith(b".") and (piece := connection.recv(1 << 16)):
                    data += piece
                connection.sendall(data + data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def ask(port: int, data: bytes) -> bytes:
    """Sends, closes its half, and reads to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while piece := connection.recv(1 << 16):
                found += piece
        except ConnectionResetError:
            pass  # it was closed before it had read everything
        return found


def test_port_of_this_machine_leads_to_the_pod_for_every_connection(client: Client) -> None:
    echo, failed = Echo(), list[KtrainError]()
    echo_port = echo.port

    def connect_pod() -> Any:
        source = remote.find_pod(client, "default", "net", logs.of_rank(1))
        return remote.connect_port(client, "default", source, echo_port)

    with remote.Forwarder(connect_pod, host="127.0.0.1", port=0, report=failed.append) as forwarder:
        serving = threading.Thread(target=forwarder.serve, args=(Deadline.after(60.0),))
        serving.start()
        assert ask(forwarder.port, b"one.") == b"one.one."
        assert ask(forwarder.port, b"x" * 5000 + b".") == 2 * (b"x" * 5000 + b".")
        echo.close()
        assert ask(forwarder.port, b"two.") == b"", "nobody listens there any more"
        forwarder.stop()
        serving.join()
    (error,) = failed
    assert f"error forwarding port {echo_port}" in str(error)


def test_port_that_is_taken_or_no_port_is_bad_input(cluster: FakeCluster, client: Client, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = f"{taken.getsockname()[1]}:80"
        assert ktrain(cluster, tmp_path, "port-forward", "net", ports) == contract.EXIT_USAGE
    for text in ("80:0", "a:80", "70000", ""):
        assert ktrain(cluster, tmp_path, "port-forward", "net", text) == contract.EXIT_USAGE
    assert ktrain(cluster, tmp_path, "port-forward", "--timeout", "0", "net", "0:80") == contract.EXIT_OK


# launch --follow


def test_launch_follow_prints_the_ranks_and_the_states_and_leaves_with_the_job_s_code(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thread plays the cluster: once the job is there its pods are, and then it has failed with the head's code."""

    def play() -> None:
        deadline = Deadline.after(30.0)
        while not cluster.store.list(known.JOB_SET, "default").items:
            deadline.check("the job")
            SYSTEM_CLOCK.sleep(0.02)
        for index in range(2):
            make_worker(cluster, index, f"rank {index} says\n", state="terminated")
        ended = {"type": "Failed", "status": "True", "reason": "FailedJobs", "message": "container head exited"}
        status = {"conditions": [{**ended, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}
        cluster.store.mutate(known.JOB_SET, "default", "net", lambda obj: obj.update(status=status), status=True)

    player = threading.Thread(target=play)
    player.start()
    code = ktrain(cluster, tmp_path, "launch", "--backend", "kubernetes", "--follow", *JOB, "train.py")
    player.join()

    printed = capsys.readouterr().out
    assert code == contract.EXIT_FAILED
    assert "[net-worker-0-0-abcde] rank 0 says" in printed and "[net-worker-0-1-abcde] rank 1 says" in printed
    assert "default/net: failed (exit code 1)" in printed


def test_launch_that_is_to_stay_and_to_go_is_refused(cluster: FakeCluster, tmp_path: Path) -> None:
    both = ("--follow", "--detach")
    assert ktrain(cluster, tmp_path, "launch", "--backend", "kubernetes", *both, *JOB, "x.py") == contract.EXIT_USAGE
    assert cluster.requests() == []
