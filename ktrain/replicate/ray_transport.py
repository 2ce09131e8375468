"""The agent's end of the Ray wire: owns a child process that is in Ray, and is in no Ray itself.

Invariant: whatever Ray does, this process neither ends, blocks nor raises for it outside of `pull`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.abc.transport import PartialRead, Receipt
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.control import Client
from ktrain.errors import KtrainError, UnavailableError
from ktrain.format.manifest import Identity
from ktrain.replicate import ray_settings
from ktrain.replicate.ray_cluster import Cluster, write_token
from ktrain.replicate.ray_keeper import finish
from ktrain.replicate.ray_wire import WireConfig

_LOG = logging.getLogger(__name__)
_STOP_S = 5.0
_RELEASE_S = 1.0
_BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 30.0)  # between two attempts to join the same cluster
_GRACE_S = 1.0  # the child keeps the deadline itself; the call waits this much longer for its words


@dataclass(frozen=True, slots=True)
class NodeWire:
    """What a transport has to know about its node."""

    node: str
    host: str  # the node's own address: 127.0.0.2, 127.0.0.3, ... where nodes share a machine
    run: str  # the run's id
    volume_root: Path
    work_dir: Path
    slots: int = 2  # of the volume, per rank that is kept for another node


@dataclass(slots=True)
class _Watched:
    """What a child has told so far."""

    kept: tuple[int, Path] | None = None  # its keeper's session and link
    served: bool = False
    reason: str = "its process ended without a word"


class RayTransport:
    """Pulls through the run's Ray cluster, whichever generation of it there is. Safe from any thread.

    `on_lost(reason)` is called once per loss, from a thread of this object; it must not block or raise.
    """

    name = "ray"

    def __init__(
        self,
        wire: NodeWire,
        *,
        token: str,
        on_lost: Callable[[str], None] = lambda reason: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._wire = wire
        self._token = token
        self._token_file = write_token(wire.work_dir, token)
        self._on_lost = on_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: Cluster | None = None  # these five guarded by _lock
        self._joined: Cluster | None = None  # the cluster that the child was started for
        self._child: subprocess.Popen[str] | None = None
        self._serving: dict[str, str] | None = None
        self._closed = False
        self._changed = threading.Event()
        # One thread for life: the children's parent death signal follows the thread that started them.
        self._thread = threading.Thread(target=self._run, name="ktrain-ray-transport", daemon=True)
        self._thread.start()

    def connect(self, cluster: dict[str, Any] | None) -> None:
        """Says which cluster to be in (`Cluster.to_json()`), None for none.

        Returns at once; saying the same again is free.
        """
        wanted = None if cluster is None else Cluster.from_json(cluster)
        with self._lock:
            if self._closed or wanted == self._wanted:
                return
            self._wanted = wanted
            self._serving = None
        self._wake()

    def address(self) -> str | None:
        with self._lock:
            return None if self._serving is None else self._serving["address"]

    def pull(
        self,
        source: str,
        rank: int,
        identity: Identity,
        *,
        protect: Sequence[tuple[int, int]],
        deadline: Deadline,
    ) -> Receipt:
        params = {
            "source": source,
            "rank": rank,
            "identity": identity.to_json(),
            "protect": [list(pair) for pair in protect],
        }
        answer = self._call("pull", params, f"pull of rank {rank}, step {identity.step}", deadline)
        return Receipt.from_json(answer)

    def read(self, source: str, wanted: PartialRead, *, deadline: Deadline) -> int:
        params = {"source": source, "wanted": wanted.to_json()}
        return int(self._call("read", params, f"read of {wanted}", deadline)["wire_nbytes"])

    def release(self, rank: int) -> None:
        try:
            self._call("release", {"rank": rank}, f"release of rank {rank}", Deadline.after(_RELEASE_S, self._clock))
        except KtrainError as error:  # a child that is gone holds nothing
            _LOG.info("%s", error)

    def _call(self, name: str, params: dict[str, Any], what: str, deadline: Deadline) -> dict[str, Any]:
        """What the child answers."""
        with self._lock:
            serving = self._serving
        if serving is None:
            raise UnavailableError(f"{what}: node {self._wire.node} is in no Ray cluster now")
        timeout_s = deadline.remaining_s()
        client = Client(serving["control"], self._token)
        return client.call(name, {**params, "timeout_s": timeout_s}, timeout_s=timeout_s + _GRACE_S)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._wanted = None
            self._serving = None
        self._wake()
        self._thread.join(3 * _STOP_S)
        self._token_file.unlink(missing_ok=True)

    def _wake(self) -> None:
        """Lets the thread look again: ends its wait, and the child if that is in another cluster."""
        self._changed.set()
        with self._lock:
            child = self._child if self._joined != self._wanted else None
            if child is not None and child.stdin is not None:
                child.stdin.close()

    def _run(self) -> None:
        failures = 0
        said_lost = False
        while True:
            self._changed.clear()
            with self._lock:
                closed, cluster = self._closed, self._wanted
            if closed:
                return
            if cluster is None:
                self._clock.wait(self._changed, 3600.0)  # for ever, in bounded pieces
                continue
            served, reason = self._stay(cluster)
            with self._lock:
                replaced = self._wanted != cluster
            failures = 0 if served or replaced else failures + 1
            said_lost = said_lost and not (served or replaced)
            if not replaced:
                if not said_lost:
                    _LOG.warning("node %s: no Ray cluster at %s: %s", self._wire.node, cluster.address, reason)
                    self._on_lost(reason)
                    said_lost = True
                self._clock.wait(self._changed, _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    def _stay(self, cluster: Cluster) -> tuple[bool, str]:
        """Is in one cluster until it is lost or another is wanted; whether it served at all, and what ended it."""
        try:
            child = self._start_child(cluster)
        except OSError as error:
            return False, f"its process did not start: {error}"
        watched = _Watched()
        try:
            self._listen(child, cluster, watched)
        except (OSError, ValueError, KeyError) as error:
            watched.reason = f"its process said what nobody understands: {error!r}"
        finally:
            with self._lock:
                self._serving = None
                self._child = None
            self._end_child(child, watched.kept)
        return watched.served, watched.reason

    def _listen(self, child: subprocess.Popen[str], cluster: Cluster, watched: _Watched) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                watched.kept = int(event["session"]), Path(event["link"])
            elif event["event"] == "lost":
                watched.reason = str(event["reason"])
            elif event["event"] == "serving":
                watched.served = True
                with self._lock:
                    if self._wanted == cluster:
                        self._serving = {"address": event["address"], "control": event["control"]}

    def _start_child(self, cluster: Cluster) -> subprocess.Popen[str]:
        wire = self._wire
        config = WireConfig(
            node=wire.node,
            host=wire.host,
            run=wire.run,
            volume_root=str(wire.volume_root),
            work_dir=str(wire.work_dir),
            token_file=str(self._token_file),
            slots=wire.slots,
            cluster_address=cluster.address,
            generation=cluster.generation,
        )
        with open(wire.work_dir / "ray-wire.log", "ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "ktrain.replicate.ray_wire", config.to_argument()],
                stdin=subprocess.PIPE,  # held open by us alone: its end tells the child to end
                stdout=subprocess.PIPE,
                stderr=log,
                env=ray_settings.environment(self._token_file),
                text=True,
            )
        with self._lock:
            self._child, self._joined = child, cluster
            if self._wanted != cluster and child.stdin is not None:
                child.stdin.close()
        return child

    def _end_child(self, child: subprocess.Popen[str], kept: tuple[int, Path] | None) -> None:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(_STOP_S)
        if kept is not None:
            try:
                finish(*kept)  # already done, unless the child was killed
            except KtrainError:
                _LOG.exception("node %s: processes of Ray are left", self._wire.node)
