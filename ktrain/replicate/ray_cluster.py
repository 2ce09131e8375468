"""The Ray cluster of a run: a head that runs nothing, owned by the run's head process.

Invariant: a head that was restarted is another cluster with a higher generation; nothing of it is reused.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.errors import UnavailableError
from ktrain.replicate import ray_settings
from ktrain.replicate.ray_keeper import KeptRay

_ATTEMPTS = 3
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a generation of the run's Ray cluster is; crosses the control channel."""

    address: str  # host:port of the GCS
    generation: int

    def to_json(self) -> dict[str, Any]:
        return {"address": self.address, "generation": self.generation}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cluster:
        return cls(address=str(value["address"]), generation=int(value["generation"]))

    def answers(self, timeout_s: float = 1.0) -> bool:
        """Whether somebody listens at the address."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout_s).close()
        except OSError:
            return False
        return True


def write_token(work_dir: Path, token: str) -> Path:
    """Puts the run's token where Ray reads it, for this user alone."""
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = work_dir / f"ray-token-{ids.random_id(4)}"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    return path


class RayHead:
    """Starts and ends the head of the run's Ray cluster. Use from one thread."""

    def __init__(self, work_dir: Path, *, host: str, token: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._work_dir = work_dir
        self._host = host
        self._token_file = write_token(work_dir, token)
        self._clock = clock
        self._generation = 0
        self._kept: KeptRay | None = None
        self.cluster: Cluster | None = None  # None while there is none

    def start(self, *, deadline: Deadline) -> Cluster:
        """Starts a new generation, after ending the last one; returns once nodes can join (about 1 s).

        Raises:
            UnavailableError: Ray did not start.
            DeadlineError: it did not answer in time.
        """
        self.stop()
        reason = ""
        for _ in range(_ATTEMPTS):  # the port may be taken between our look and Ray's
            self._generation += 1
            cluster = Cluster(f"{self._host}:{_free_port(self._host)}", self._generation)
            try:
                if self._try_start(cluster, deadline):
                    self.cluster = cluster
                    return cluster
                assert self._kept is not None
                reason = self._kept.reason()
            finally:
                if self.cluster is None:
                    self.stop()
        raise UnavailableError(f"Ray head on {self._host}: did not start in {_ATTEMPTS} attempts; it said: {reason}")

    def alive(self) -> bool:
        """Whether the head's processes run and its port answers."""
        return self._kept is not None and self._kept.alive() and self.cluster is not None and self.cluster.answers()

    def stop(self) -> None:
        """Ends all its processes. May be called again."""
        self.cluster = None
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.stop()

    def close(self) -> None:
        """Stops, and removes the token from disk."""
        self.stop()
        self._token_file.unlink(missing_ok=True)

    def _try_start(self, cluster: Cluster, deadline: Deadline) -> bool:
        kept = KeptRay(
            self._work_dir,
            f"ray-head-{cluster.generation}-{ids.random_id(3)}",
            environment=ray_settings.environment(self._token_file),
        )
        self._kept = kept
        port = int(cluster.address.rpartition(":")[2])
        kept.start(ray_settings.head_arguments(host=self._host, port=port, folder=kept.folder))
        while kept.alive():
            if cluster.answers():
                return True
            deadline.check(f"Ray head at {cluster.address}: start")
            self._clock.sleep(_POLL_S)
        return False


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
