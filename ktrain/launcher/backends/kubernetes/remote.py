"""Into a job's containers: a command in one, a port of one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError, KtrainError, NotFoundError, UnavailableError
from ktrain.launcher.backends.kubernetes.client import Client, path_of
from ktrain.launcher.backends.kubernetes.connect import DATA, ERROR, PROBLEM, STDERR, STDIN, STDOUT, Channels
from ktrain.launcher.backends.kubernetes.logs import Choice, Source
from ktrain.launcher.backends.kubernetes.view import look

_LOOK_S = 1.0  # between two looks at the time
_PIECE = 1 << 16
_PORT_BYTES = 2  # with which each channel of a port begins


@dataclass(frozen=True, slots=True)
class Streams:
    """What a command reads and writes: files of this process. `stdin` None: nothing is sent."""

    stdin: int | None
    out: BinaryIO
    err: BinaryIO


def find_pod(client: Client, namespace: str, name: str, choose: Choice) -> Source:
    """The pod that a choice means, as the job is now.

    Raises:
        NotFoundError: there is no such job or rank, or its container has not started.
    """
    found = choose(look(client, namespace, name))
    if not found:
        raise NotFoundError(f"job {name}: that container has not started; `ktrain status` says what it waits for")
    return found[0]


def run_command(
    client: Client, namespace: str, source: Source, command: Sequence[str], *, streams: Streams, deadline: Deadline
) -> int:
    """Runs a command in a container, its output passed on as it comes; returns its exit code.

    Raises:
        ConfigError: it could not be started there, or the cluster refuses.
        BusyError: the connection broke; the command may still run.
        DeadlineError: it has not ended in time; it may still run.
    """
    query = [("command", word) for word in command]
    query += [("container", source.container), ("stdout", "true"), ("stderr", "true")]
    query += [("stdin", "true")] if streams.stdin is not None else []
    path = path_of("v1", "pods", namespace, source.pod) + "/exec"
    with contextlib.closing(client.attach(path, query)) as channels:
        verdict = _follow(channels, streams, deadline, what=f"command in {source.pod}")
    return _exit_code(verdict, what=f"{source.pod}, container {source.container}")


def _follow(channels: Channels, streams: Streams, deadline: Deadline, *, what: str) -> bytes:
    """Passes bytes on until the other end closes; returns what came on the error channel."""
    verdict, stdin = b"", streams.stdin
    while True:
        is_open = channels.is_open
        if stdin is not None:
            ready = _ready([channels, stdin], _LOOK_S)
            if stdin in ready:
                stdin = _send(channels, stdin)
        for channel, data in channels.read(0.0 if stdin is not None else _LOOK_S):
            if channel == ERROR:
                verdict += data
            elif channel in (STDOUT, STDERR):
                sink = streams.out if channel == STDOUT else streams.err
                sink.write(data)
                sink.flush()
        if not is_open:
            return verdict
        deadline.check(what)


def _ready(files: list[Any], timeout_s: float) -> list[Any]:
    """Those of some files, sockets and channels that can be read."""
    return select.select(files, [], [], timeout_s)[0]


def _send(channels: Channels, stdin: int) -> int | None:
    """Sends what there is to read; None at its end."""
    data = os.read(stdin, _PIECE)
    if data:
        channels.write(STDIN, data)
        return stdin
    channels.finish(STDIN)
    return None


def _exit_code(verdict: bytes, *, what: str) -> int:
    """The command's exit code, from the Status that ends the stream."""
    try:
        said = json.loads(verdict)
        status, message = said["status"], str(said.get("message", ""))
        causes = {item.get("reason"): item.get("message") for item in (said.get("details") or {}).get("causes") or ()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BusyError(f"{what}: the connection ended without a verdict; the command may still run") from None
    if status == "Success":
        return 0
    code = str(causes.get("ExitCode", ""))
    if said.get("reason") == "NonZeroExitCode" and code.isdigit():
        return int(code)
    raise ConfigError(f"{what}: the command was not run: {message}")


class Forwarder:
    """A port of this machine that leads to a port of a pod. Use it in a `with`.

    Every connection looks for the pod anew, so that it reaches the one that was made for a lost one.
    """

    def __init__(
        self, connect: Callable[[], Channels], *, host: str, port: int, report: Callable[[KtrainError], None]
    ) -> None:
        """`connect` opens a connection to the pod's port, and is called from other threads; so is `report`.

        Raises:
            ConfigError: the port of this machine is taken.
        """
        self._connect = connect
        self._report = report
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} of {host}: {error.strerror}; take another, or 0 for a free one") from error

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._listener.close()
        for thread in self._threads:
            thread.join(2 * _LOOK_S)  # one that waits for the cluster is a daemon, and does not keep the command

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def stop(self) -> None:
        """Ends `serve` and what it carries, soon. Safe from any thread."""
        self._closed.set()

    def serve(self, deadline: Deadline) -> None:
        """Takes connections until the deadline or `stop`; each has a thread."""
        while not (deadline.expired() or self._closed.is_set()):
            ready, _, _ = select.select([self._listener], [], [], min(_LOOK_S, deadline.remaining_s()))
            if not ready:
                continue
            here, _ = self._listener.accept()
            thread = threading.Thread(target=self._carry, args=(here,), name="ktrain-forward", daemon=True)
            self._threads = [item for item in self._threads if item.is_alive()] + [thread]
            thread.start()

    def _carry(self, here: socket.socket) -> None:
        with contextlib.closing(here):
            try:
                with contextlib.closing(self._connect()) as channels:
                    self._pump(here, channels)
            except KtrainError as error:
                self._report(error)
            except OSError:
                pass  # whoever connected here has gone

    def _pump(self, here: socket.socket, channels: Channels) -> None:
        """Bytes both ways until the pod's end closes; ours may close its half before."""
        begins = dict.fromkeys((DATA, PROBLEM), _PORT_BYTES)
        listening: list[Any] = [here, channels]
        while not self._closed.is_set():
            is_open = channels.is_open
            ready = _ready(listening, _LOOK_S if is_open else 0.0)
            if here in ready and is_open and not self._send(here, channels):
                listening.remove(here)
            for channel, data in channels.read(0.0):
                data, begins[channel] = data[begins[channel] :], max(0, begins[channel] - len(data))
                if channel == PROBLEM and data:
                    raise UnavailableError(data.decode(errors="replace"))
                here.sendall(data)
            if not is_open:
                return

    def _send(self, here: socket.socket, channels: Channels) -> bool:
        """Sends what there is; false where there will be no more, or nobody takes it (the other end says why)."""
        data = here.recv(_PIECE)
        try:
            if data:
                channels.write(DATA, data)
        except BusyError:
            return False
        return bool(data)


def connect_port(client: Client, namespace: str, source: Source, port: int) -> Channels:
    """Channels to a port of a pod."""
    return client.attach(path_of("v1", "pods", namespace, source.pod) + "/portforward", [("ports", str(port))])
