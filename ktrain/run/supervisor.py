"""A node's supervisor: starts and ends the node's workers as the head wants them, and says how they ended.

    python -P -m ktrain.run.supervisor WORK_DIR NODE_INDEX LAUNCHER_PID

The workers are started by torch's elastic machinery and die with this process. Several times a second the supervisor
tells the head what is and hears what should be; while the head is away everything goes on as it was.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, PContext, start_processes

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.exits import exit_code
from ktrain.base.job import HeadCaller, LaunchSpec, WorkDir, local_path
from ktrain.base.process import ProcessId
from ktrain.base.settings import Timeouts
from ktrain.errors import ConfigError, KtrainError
from ktrain.run import log_drain, worker

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1
_GRACE_S = 1.0  # from SIGTERM to SIGKILL: a worker's state is safe in its sealed snapshots, not in its last words
_TAIL_BYTES = 3000


class _OneLogPerRank(LogsSpecs):
    """Names the log and the error file of every rank; the worker itself joins stderr to stdout.

    `is_shown`: what is written there is written to our own output too, by threads of torch's.
    """

    def __init__(self, folder: Path, ranks: list[int], *, is_shown: bool) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._ranks = ranks
        self._is_shown = is_shown

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        logs = {local: str(log_path(self._folder, rank)) for local, rank in enumerate(self._ranks)}
        errors = {local: str(error_path(self._folder, rank)) for local, rank in enumerate(self._ranks)}
        shown = logs if self._is_shown else {}
        return LogsDest(stdouts=logs, stderrs=dict.fromkeys(envs, ""), tee_stdouts=shown, error_files=errors)

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)


def log_path(folder: Path, rank: int) -> Path:
    """Output of one rank in an attempt's log folder."""
    return folder / f"rank-{rank}.log"


def error_path(folder: Path, rank: int) -> Path:
    """Error file of one rank, in torch's form."""
    return folder / f"rank-{rank}.error.json"


@dataclass(slots=True)
class WorkerGroup:
    """The workers of one attempt on this node."""

    epoch: int
    ranks: list[int]
    folder: Path
    context: PContext
    exits: dict[int, dict[str, Any]] = field(default_factory=dict)  # local rank -> how it ended, in order
    ending: bool = False

    @property
    def state(self) -> str:
        if len(self.exits) < len(self.ranks):
            return "running"
        codes = {item["exitcode"] for item in self.exits.values()}
        if codes == {contract.EXIT_OK}:
            return "succeeded"
        if codes <= {contract.EXIT_OK, contract.EXIT_STOPPED}:
            return "stopped"
        if all(item["ended_by_us"] or item["exitcode"] in (0, contract.EXIT_STOPPED) for item in self.exits.values()):
            return "stopped"
        return "failed"

    def poll(self) -> None:
        """Looks for workers that ended; a failed one takes its siblings on this node with it."""
        self._collect()
        failed = [item for item in self.exits.values() if item["exitcode"] not in (0, contract.EXIT_STOPPED)]
        if failed and len(self.exits) < len(self.ranks):
            self.end()
        elif len(self.exits) == len(self.ranks):
            self.context.close(signal.SIGTERM, timeout=int(_GRACE_S))  # ends the threads that show their output

    def end(self) -> None:
        """Ends all workers, by force where need be; bounded by twice the grace."""
        self._collect()
        self.ending = True
        self.context.close(signal.SIGTERM, timeout=int(_GRACE_S))
        self._collect()

    def dump_stacks(self) -> None:
        """Has every worker write the stacks of its threads to its log."""
        for pid in self._living().values():
            os.kill(pid, signal.SIGQUIT)

    def _living(self) -> dict[int, int]:
        return {local: pid for local, pid in self.context.pids().items() if local not in self.exits}

    def _collect(self) -> None:
        for local, pid in self._living().items():
            process = self.context.subprocess_handlers[local].proc  # type: ignore[attr-defined]
            if process.returncode is None:
                seen = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if seen is None:
                    continue
                # Still a zombie, so the group's number cannot belong to anybody else: end what the worker left.
                _kill_group(pid)
                process.wait()
            self.exits[local] = self._describe(local, pid, process.returncode)

    def _describe(self, local: int, pid: int, exitcode: int) -> dict[str, Any]:
        rank = self.ranks[local]
        kind, reason = (
            ("signal", f"killed by signal {-exitcode}") if exitcode < 0 else ("exit", f"exit code {exitcode}")
        )
        try:
            said = json.loads(error_path(self.folder, rank).read_text())
            kind, reason = str(said["kind"]), str(said["message"]["message"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no error file: it was killed, or left by sys.exit
        return {
            "rank": rank,
            "pid": pid,
            "exitcode": exitcode,
            "kind": kind,
            "reason": reason[:2000],
            "ended_by_us": self.ending,
            "log_tail": _tail(log_path(self.folder, rank)) if exitcode not in (0, contract.EXIT_STOPPED) else "",
        }


def interface_of(address: str) -> str:
    """The network interface that has the address; loopback has them all."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    for name, found in psutil.net_if_addrs().items():
        if any(item.address == address for item in found):
            return str(name)
    raise ConfigError(f"address {address}: no network interface of this node has it; set GLOO_SOCKET_IFNAME")


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-20:])
    except OSError:
        return ""


class Supervisor:
    """One node's supervisor. `run` belongs to the main thread: workers die with the thread that started them."""

    def __init__(self, spec: LaunchSpec, work: WorkDir, node_index: int) -> None:
        self._spec = spec
        self._work = work
        self._node = contract.node_name(node_index)
        self._address = spec.node_address(node_index)
        self._number = os.getpid() if spec.pod is None else ProcessId.current().number
        self._head = HeadCaller(work)
        self._timeouts = Timeouts(spec.patience_s)
        self._group: WorkerGroup | None = None
        self._store: Any = None
        self._store_epoch = 0
        self._store_address: str | None = None
        self._leaving = threading.Event()
        self._exit_code = contract.EXIT_STOPPED  # the head may say another; a signal may come from anybody

    def run(self) -> int:
        """Follows the head until it says exit (code 0) or that the node be replaced (74), or a signal does (130)."""
        self._take_signals()
        while not self._leaving.is_set():
            if self._group is not None and self._group.state == "running":
                self._group.poll()
            desired = self._report()
            if desired is not None and self._follow(desired):
                continue  # something changed: the head should know at once
            SYSTEM_CLOCK.wait(self._leaving, _POLL_S)
        self._end_workers()
        return self._exit_code

    def _take_signals(self) -> None:
        def leave(signum: int, frame: FrameType | None) -> None:
            del signum, frame
            self._leaving.set()

        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, leave)

    def _report(self) -> dict[str, Any] | None:
        group = self._group
        current = group if group is not None and group.epoch >= self._store_epoch else None
        said = {
            "node": self._node,
            "host": self._spec.host,
            "pid": self._number,
            "epoch": current.epoch if current else self._store_epoch,
            "state": current.state if current else "idle",
            "ranks": current.ranks if current else [],
            "pids": [pid for _, pid in sorted(current.context.pids().items())] if current else [],
            "exits": list(current.exits.values()) if current else [],
            "store": self._store_address,
        }
        try:
            return self._head.call("supervise", said, timeout_s=self._timeouts.call_s)
        except KtrainError as error:
            _LOG.debug("head: %s", error)  # it is away: what runs goes on
            return None

    def _follow(self, desired: dict[str, Any]) -> bool:
        """Brings about what the head wants; true when that changed something."""
        action, epoch = desired["action"], desired["epoch"]
        if action in ("exit", "replace"):
            self._exit_code = contract.EXIT_OK if action == "exit" else contract.EXIT_BAD_NODE
            self._leaving.set()
            return False
        running = self._group is not None and self._group.state == "running"
        if (
            running
            and self._group is not None
            and (action == "stop" or (action == "run" and epoch > self._group.epoch))
        ):
            if desired.get("dump_stacks"):
                self._group.dump_stacks()
                SYSTEM_CLOCK.sleep(_POLL_S)
            self._end_workers()
            return True
        if action != "run" or (self._group is not None and self._group.epoch >= epoch):
            return False
        if desired["hosts_store"] and self._store_epoch < epoch:
            self._open_store(epoch)
            return True
        if desired["store"] is None:
            return False
        self._start_workers(desired)
        return True

    def _end_workers(self) -> None:
        if self._group is None:
            return
        if self._group.state == "running":
            self._group.end()

    def _open_store(self, epoch: int) -> None:
        """Hosts the attempt's rendezvous store on this node's own address, on a port that the system picks."""
        self._store = None
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((self._address, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            self._address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store owns it from here on
            timeout=timedelta(seconds=self._timeouts.start_s),
        )
        self._store_epoch = epoch
        self._store_address = f"{self._address}:{port}"

    def _start_workers(self, desired: dict[str, Any]) -> None:
        epoch, ranks = desired["epoch"], list(desired["ranks"])
        folder = Path(self._spec.log_dir) / f"attempt-{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        command = (
            "-P",
            "-u",
            "-m",
            "ktrain.run.worker",
            "--parent",
            str(os.getpid()),
            self._spec.script,
            *self._spec.args,
        )
        context = start_processes(
            name="worker",
            entrypoint=self._spec.python,
            args={local: command for local in range(len(ranks))},
            envs={local: self._environment(desired, local, folder) for local in range(len(ranks))},
            logs_specs=_OneLogPerRank(folder, ranks, is_shown=self._spec.pod is not None),
            log_line_prefixes={local: f"[{rank}] " for local, rank in enumerate(ranks)},
        )
        self._take_signals()  # torch's context has put its own in their place
        if not desired["hosts_store"]:
            self._store, self._store_address = None, None
        self._group = WorkerGroup(epoch, ranks, folder, context)
        if local_path(self._spec.run) is None:
            log_drain.announce(self._work.node(self._node), epoch, ranks, folder)

    def _environment(self, desired: dict[str, Any], local_rank: int, folder: Path) -> dict[str, str]:
        spec, rank, epoch = self._spec, desired["ranks"][local_rank], desired["epoch"]
        host, _, port = desired["store"].rpartition(":")
        values = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": desired["world_size"],
            "LOCAL_WORLD_SIZE": len(desired["ranks"]),
            "GROUP_RANK": desired["group_rank"],
            "GROUP_WORLD_SIZE": spec.nodes,
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": desired["world_size"],
            "ROLE_NAME": "worker",
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": spec.launch_id,
            "TORCHELASTIC_RESTART_COUNT": epoch,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_ERROR_FILE": error_path(folder, rank),
            "OMP_NUM_THREADS": settings.env("OMP_NUM_THREADS", "1"),
            "GLOO_SOCKET_IFNAME": settings.env("GLOO_SOCKET_IFNAME") or interface_of(self._address),
            contract.ENV_RUN: spec.run,
            contract.ENV_EPOCH: epoch,
            contract.ENV_NODE: self._node,
            contract.ENV_AGENT: f"unix:{self._work.agent_socket(self._node)}",
            contract.ENV_TOKEN_FILE: self._work.token,
            contract.ENV_VOLUME: spec.volume_root,
            contract.ENV_PATIENCE: spec.patience_s,
        }
        return {name: str(value) for name, value in values.items()}


def main(argv: list[str]) -> int:
    work = WorkDir(Path(argv[0]))
    worker.die_with_parent(int(argv[2]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a container's log shows the ranks' lines as they come
    try:
        return Supervisor(work.read_spec(), work, int(argv[1])).run()
    except KtrainError as error:
        _LOG.error("%s", error)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
