"""What a launch is, and where its processes meet: written by the launcher, read by head, agents and supervisors.

The work directory holds files of one launch on one machine: the specification, the token, the head's address,
sockets. It is short, because socket paths are bounded, private (0700), and derived from the run, so that a command
finds a live launch by the run alone.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ktrain.base import atomic, contract, ids
from ktrain.base.control import Client
from ktrain.base.settings import Timeouts
from ktrain.base.urls import local_path as local_path
from ktrain.base.urls import require_public, without_slash
from ktrain.errors import ConfigError, NotFoundError, UnavailableError

NODE_ROLES = ("agent", "supervisor")


def canonical_url(url: str) -> str:
    """One text per run: an absolute path for local runs, the URL without a trailing slash for others.

    Raises:
        ConfigError: the URL holds a secret.
    """
    path = local_path(require_public(url))
    return str(path) if path is not None else without_slash(url)


@dataclass(frozen=True, slots=True)
class PodPlace:
    """Where one process of a launch is, when every node is a pod with an address of its own (ADR 0038)."""

    host: str  # name of the machine below it
    address: str  # of this pod: what its processes listen on, and what peers reach
    head_port: int  # on which the head listens
    join_s: float  # for all nodes to be there, before their pods are given back
    ready_file: str  # made by the agent once it has joined the head


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One launch (of a job, on this machine or in pods), as every process of it reads it."""

    launch_id: str
    run: str  # canonical
    script: str  # absolute path
    args: tuple[str, ...]
    nodes: int
    workers_per_node: int
    max_restarts: int
    patience_s: float
    python: str
    cwd: str
    volume_root: str
    log_dir: str
    faults: tuple[str, ...] = ()
    pod: PodPlace | None = None  # None: all nodes are this machine
    spares: int = 0  # nodes more than the ranks need, to take a lost one's place

    @property
    def world_size(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def node_names(self) -> tuple[str, ...]:
        """All nodes, the spares last."""
        return tuple(contract.node_name(index) for index in range(self.nodes + self.spares))

    @property
    def join_s(self) -> float:
        """Seconds that the head waits for all nodes, and a node for the head."""
        return Timeouts(self.patience_s).start_s if self.pod is None else self.pod.join_s

    def unjoined_exit(self, *, taken: bool) -> int:
        """The head's exit code when nodes do not come: where others can be had, all are asked for anew.

        `taken` says that those which are away were told to end from outside: that is not counted.
        """
        if self.pod is None:
            return contract.EXIT_FAILED
        return contract.EXIT_AGAIN_FREE if taken else contract.EXIT_AGAIN

    @property
    def host(self) -> str:
        """Name of the machine that this process is on."""
        return ids.host_name() if self.pod is None else self.pod.host

    @property
    def head_address(self) -> str:
        """What the head listens on; where that is a free port, it says in the work directory which."""
        return "tcp:127.0.0.1:0" if self.pod is None else f"tcp:{self.pod.address}:{self.pod.head_port}"

    def node_address(self, node_index: int) -> str:
        """A node's own address: every node of a local launch has one, though they share the machine."""
        return f"127.0.0.{2 + node_index}" if self.pod is None else self.pod.address

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LaunchSpec:
        known = {item.name for item in fields(cls)}
        if set(value) != known:
            odd = ", ".join(sorted(set(value) ^ known))
            raise ConfigError(f"launch specification: fields differ from this version's: {odd}; start the job again")
        lists = {name: tuple(value[name]) for name in ("args", "faults")}
        return cls(**{**value, **lists, "pod": _place(value["pod"])})


def _place(value: Mapping[str, Any] | None) -> PodPlace | None:
    return None if value is None else PodPlace(**value)


@dataclass(frozen=True, slots=True)
class WorkDir:
    """The files through which the processes of one launch find each other."""

    path: Path

    @classmethod
    def of_run(cls, run: str) -> WorkDir:
        """The directory of a run on this machine; it need not exist."""
        name = ids.text_digest(canonical_url(run), 10)
        return cls(Path(tempfile.gettempdir()) / f"ktrain-{os.getuid()}" / name)

    def make(self) -> None:
        """Makes the directory, private to this user.

        Raises:
            ConfigError: another user owns it, or it cannot be made.
        """
        for folder in (self.path.parent, self.path):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                info = folder.lstat()
            except OSError as error:
                raise ConfigError(
                    f"work directory {folder}: {error.strerror}; set TMPDIR to a writable place"
                ) from error
            if info.st_uid != os.getuid() or info.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
                raise ConfigError(
                    f"work directory {folder}: expected a directory of user {os.getuid()} with mode 0700, found owner "
                    f"{info.st_uid} and mode {info.st_mode & 0o7777:o}; remove it or set TMPDIR"
                )

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def head(self) -> Path:
        """Address and process of the live head."""
        return self.path / "head.json"

    @property
    def head_state(self) -> Path:
        """What a new head of the same launch must know: budgets that are spent."""
        return self.path / "head-state.json"

    @property
    def verdict(self) -> Path:
        return self.path / "verdict.json"

    @property
    def lock(self) -> Path:
        """Held by the launcher as long as it lives."""
        return self.path / "launch.lock"

    def node(self, name: str) -> Path:
        return self.path / name

    def agent_socket(self, node: str) -> Path:
        return self.node(node) / "agent.sock"

    def read_spec(self) -> LaunchSpec:
        value = atomic.try_read_json(self.spec)
        if value is None:
            raise NotFoundError(f"work directory {self.path}: no specification; the launch has ended")
        return LaunchSpec.from_json(value)

    def read_token(self) -> str:
        try:
            return self.token.read_text().strip()
        except FileNotFoundError:
            raise UnavailableError(f"work directory {self.path}: no token; the launch has ended") from None

    def write_token(self) -> None:
        """Makes a fresh token, readable by this user alone."""
        self.token.unlink(missing_ok=True)
        fd = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, ids.random_id(16).encode())
        finally:
            os.close(fd)


class HeadCaller:
    """Calls the head wherever it is now: the address is read again whenever a call does not reach it.

    Safe from any thread.
    """

    def __init__(self, work: WorkDir) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._client: Client | None = None  # guarded by _lock

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        client = self._current()
        try:
            return client.call(name, params, timeout_s=timeout_s)
        except UnavailableError:
            self._forget(client)
            raise

    def _current(self) -> Client:
        with self._lock:
            if self._client is not None:
                return self._client
        found = atomic.try_read_json(self._work.head)
        if found is None:
            raise UnavailableError(f"head of {self._work.path}: no address yet, or the launch has ended")
        client = Client(found["address"], self._work.read_token())
        with self._lock:
            self._client = client
        return client

    def _forget(self, client: Client) -> None:
        with self._lock:
            if self._client is client:
                self._client = None
