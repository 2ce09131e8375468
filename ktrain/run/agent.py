"""A node's agent: outlives workers, owns the node's volume, carries its snapshots.

    python -P -m ktrain.run.agent WORK_DIR NODE_INDEX LAUNCHER_PID

What it does is in `checkpoint.node`; here it is given its place, its wire and its socket. Imports no torch and is in
no Ray: Ray lives in a child of its transport.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.control import Caller, Server
from ktrain.base.job import HeadCaller, LaunchSpec, WorkDir, local_path
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.node import NodeKeeper, NodePlace
from ktrain.errors import KtrainError, UnavailableError
from ktrain.run import worker
from ktrain.run.log_drain import LogDrain, drain_for

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1


class Agent:
    """One node's agent, from start to end."""

    def __init__(self, spec: LaunchSpec, work: WorkDir, node_index: int) -> None:
        self._spec = spec
        self._work = work
        self._node = contract.node_name(node_index)
        self._address = spec.node_address(node_index)
        self._timeouts = Timeouts(spec.patience_s)
        self._leaving = threading.Event()
        self._keeper: NodeKeeper | None = None

    def run(self) -> int:
        """Serves until a signal ends it."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._leave)
        head = HeadCaller(self._work)
        run_id = self._learn_run(head)
        if run_id is None:
            return contract.EXIT_OK
        transport = self._open_transport(run_id)
        root = Path(self._spec.volume_root)
        place = NodePlace(node=self._node, member=self._node, volume_root=root, host=self._spec.host)
        keeper = NodeKeeper(self._spec.run, place=place, head=head, transport=transport, timeouts=self._timeouts)
        if transport is not None:
            keeper.on_wire = transport.connect
        self._keeper = keeper
        address = f"unix:{self._work.agent_socket(self._node)}"
        server = Server(keeper.handlers(), address=address, token=self._work.read_token())
        keeper.start()
        logs = self._open_logs(keeper)
        self._say_ready(keeper)
        while not self._leaving.is_set():
            SYSTEM_CLOCK.wait(self._leaving, 60.0)
        if logs is not None:
            logs.leave()
        server.close()
        keeper.close()
        if logs is not None:
            logs.close()
        return contract.EXIT_OK

    def _open_logs(self, keeper: NodeKeeper) -> LogDrain | None:
        """The way of the ranks' output to the run; None where they write there themselves."""
        if local_path(self._spec.run) is not None:
            return None
        logs = drain_for(
            self._spec.run,
            self._work.node(self._node),
            token=self._work.read_token(),
            secrets=settings.secret_values(),
            emit=keeper.emit,
            timeouts=self._timeouts,
        )
        logs.start()
        return logs

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._leaving.set()

    def _learn_run(self, head: Caller) -> str | None:
        """The run's id, as soon as the head answers; None when told to leave before."""
        deadline = Deadline.after(self._spec.join_s)
        while not self._leaving.is_set():
            try:
                return str(head.call("status", {}, timeout_s=self._timeouts.call_s)["run_id"])
            except KtrainError as error:
                if deadline.expired():
                    raise UnavailableError(
                        f"agent of {self._node}: no head within {deadline.total_s:g} s: {error}"
                    ) from error
            SYSTEM_CLOCK.wait(self._leaving, _POLL_S)
        return None

    def _say_ready(self, keeper: NodeKeeper) -> None:
        """In a pod the trainer's container is started by this file."""
        if self._spec.pod is None:
            return
        deadline = Deadline.after(self._spec.join_s)
        while not keeper.joined:
            if SYSTEM_CLOCK.wait(self._leaving, _POLL_S):
                return
            deadline.check(f"agent of {self._node}: the head's first word")
        Path(self._spec.pod.ready_file).touch()

    def _open_transport(self, run_id: str) -> Any:
        """The wire to the peers; None where there is no peer or no Ray (the head says so once)."""
        if self._spec.nodes == 1:
            return None
        try:
            from ktrain.replicate.ray_transport import NodeWire, RayTransport
        except ImportError as error:
            _LOG.warning("no wire to the peers: %s", error)
            return None
        wire = NodeWire(
            node=self._node,
            host=self._address,
            run=run_id,
            volume_root=Path(self._spec.volume_root),
            work_dir=self._work.node(self._node),
        )
        return RayTransport(wire, token=self._work.read_token(), on_lost=self._say_lost)

    def _say_lost(self, reason: str) -> None:
        if self._keeper is not None:
            self._keeper.emit("notice", message=f"{self._node} lost its wire to the peers: {reason}")


def main(argv: list[str]) -> int:
    work = WorkDir(Path(argv[0]))
    worker.die_with_parent(int(argv[2]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return Agent(work.read_spec(), work, int(argv[1])).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
