"""Local launch: plays the part of the machines. Starts head, agents and supervisors, and starts them again.

Every "node" has a directory, a volume folder and an address of its own. The processes die with this one (parent death
signal), so that nothing is left when it is killed; the same command then continues the run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

from ktrain.base import atomic, contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.job import NODE_ROLES, HeadCaller, LaunchSpec, WorkDir
from ktrain.base.process import ProcessId
from ktrain.base.settings import Timeouts
from ktrain.errors import ConflictError, DeadlineError, InternalError, KtrainError, UnavailableError
from ktrain.launcher.faults import Fault, due, parse_fault

_LOG = logging.getLogger(__name__)
_TICK_S = 0.1
_MOST_STARTS = 5  # of one process ...
_STARTS_WINDOW_S = 60.0  # ... within this time, beyond the first
_END_S = 8.0  # from SIGTERM to SIGKILL for agents and supervisors
_KILL_S = 10.0  # for killed processes to vanish


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended."""

    exit_code: int
    reason: str
    outcome: str = "failed"
    step: int | None = None


@dataclass(slots=True)
class _Child:
    """A process of ours; node is None for the head."""

    role: str
    node_index: int | None
    process: subprocess.Popen[bytes]
    starts_s: deque[float] = field(default_factory=deque)

    @property
    def node(self) -> str:
        return contract.node_name(self.node_index) if self.node_index is not None else ""

    def describe(self) -> str:
        return f"{self.role} of {self.node}" if self.node else self.role


def lock_work_dir(work: WorkDir) -> IO[str]:
    """Takes the run's work directory for one launch; held as long as the file is open.

    Raises:
        ConflictError: another launch of this run lives on this machine.
    """
    while True:
        work.make()
        try:
            file = open(work.lock, "a+")  # noqa: SIM115 -- held open by the caller
        except FileNotFoundError:
            continue  # a launch that has just ended removed the directory under us
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            file.close()
            raise ConflictError(
                f"this run is live already, launched by process {holder} on host {ids.host_name()}; "
                "wait for it, `ktrain cancel` it, or name another run"
            ) from None
        if _is_at(file, work.lock):
            break
        file.close()  # locked, but removed meanwhile by the launch that held it: somebody else may hold the new one
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class LocalLaunch:
    """One launch on this machine. Use from the main thread: the children die with the thread that starts them."""

    def __init__(
        self,
        spec: LaunchSpec,
        *,
        observe: Callable[[], None] = lambda: None,
        record: Callable[[Outcome | None], None] = lambda outcome: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`observe` is called several times a second and at the end; `record` while the run is this launch's alone.

        That is once with None, before anything starts, and once with the outcome, after everything has ended. Both
        must return soon, and not raise.
        """
        self._spec = spec
        self._observe = observe
        self._record = record
        self._clock = clock
        self._work = WorkDir.of_run(spec.run)
        self._timeouts = Timeouts(spec.patience_s)
        self._head = HeadCaller(self._work)
        self._children: list[_Child] = []
        self._dismissed: list[_Child] = []  # supervisors that the head has sent home: its verdict is near
        self._verdict_due = Deadline.after(0.0, clock)  # counts while any is dismissed
        self._faults = [parse_fault(text, nodes=spec.nodes, world_size=spec.world_size) for text in spec.faults]
        self._signals: list[int] = []
        self._stop_told = False
        self._exited: list[dict[str, Any]] = []  # what the head has to hear yet

    def run(self) -> Outcome:
        """Runs the job to its verdict; leaves no process, socket or file of the launch behind.

        Raises:
            ConflictError: the run is live already.
        """
        lock = lock_work_dir(self._work)
        ended: Outcome | None = None
        old = {
            signum: signal.signal(signum, self._take_signal)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            self._record(None)
            self._prepare()
            ended = self._follow()
            return ended
        finally:
            self._end_children()
            for signum, handler in old.items():
                signal.signal(signum, handler)
            self._observe()
            if ended is not None:
                self._record(ended)
            self._clean(keep_logs=ended is None or ended.exit_code != contract.EXIT_OK)
            lock.close()

    # Start

    def _take_signal(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self._signals.append(signum)

    def _prepare(self) -> None:
        for leftover in self._work.path.iterdir():
            if leftover != self._work.lock:
                _remove(leftover)
        Path(self._spec.log_dir).mkdir(parents=True, exist_ok=True)
        for node in self._spec.node_names:
            self._work.node(node).mkdir(mode=0o700)
        self._work.write_token()
        atomic.write_json(self._work.spec, self._spec.to_json())
        self._start("head", None)
        for node_index in range(len(self._spec.node_names)):
            self._start_node(node_index)

    def _start_node(self, node_index: int) -> None:
        for role in NODE_ROLES:
            self._start(role, node_index)

    def _start(self, role: str, node_index: int | None, starts_s: deque[float] | None = None) -> None:
        place = [] if node_index is None else [str(node_index)]
        command = [self._spec.python, "-P", "-m", f"ktrain.run.{role}", str(self._work.path), *place, str(os.getpid())]
        with open(self._log_path(role, node_index), "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._spec.cwd,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the head to stop
            )
        self._children.append(_Child(role, node_index, process, starts_s if starts_s is not None else deque()))

    def _log_path(self, role: str, node_index: int | None) -> Path:
        name = role if node_index is None else f"{contract.node_name(node_index)}-{role}"
        return Path(self._spec.log_dir) / f"{name}.log"

    # The loop

    def _follow(self) -> Outcome:
        while True:
            ended = self._reap()
            if ended is not None:
                return ended
            self._tell_exits()
            if len(self._signals) > 1:
                return Outcome(
                    contract.EXIT_STOPPED, "killed by a second signal: nothing was saved after the last step", "stopped"
                )
            if self._signals and not self._stop_told:
                self._ask_to_stop()
            if self._faults:
                self._try_faults()
            self._observe()
            self._clock.sleep(_TICK_S)

    def _reap(self) -> Outcome | None:
        """Looks for processes that ended: the head with its verdict, anything else is started again."""
        for child in list(self._children):
            exitcode = child.process.poll()
            if exitcode is None:
                continue
            verdict = self._verdict() if child.role == "head" else None
            if verdict is not None:
                self._children.remove(child)
                return verdict
            self._children.remove(child)
            if child.role == "supervisor" and exitcode == contract.EXIT_OK:
                self._dismissed.append(child)
                self._verdict_due = Deadline.after(self._timeouts.drain_s, self._clock)
                continue
            now = self._clock.monotonic()
            child.starts_s.append(now)
            while child.starts_s and now - child.starts_s[0] > _STARTS_WINDOW_S:
                child.starts_s.popleft()
            if len(child.starts_s) > _MOST_STARTS:
                times = f"{len(child.starts_s)} times within {_STARTS_WINDOW_S:g} s"
                log = self._log_path(child.role, child.node_index)
                said = f"{child.describe()} ended {times}, last with {exitcode}; the end of {log}:"
                return Outcome(
                    contract.EXIT_FAILED, "\n".join([said, *log.read_text(errors="replace").splitlines()[-5:]])
                )
            _LOG.info("%s ended with %d; started again", child.describe(), exitcode)
            if child.node_index is not None:
                self._exited.append(
                    {"node": child.node, "role": child.role, "pid": child.process.pid, "exitcode": exitcode}
                )
            self._start(child.role, child.node_index, child.starts_s)
            if child.role == "head":
                self._call_back()
        if self._dismissed and self._verdict_due.expired():
            self._call_back()  # dismissed by a head that died in that very moment
        return None

    def _call_back(self) -> None:
        """A head that died without a verdict is followed by one that needs the dismissed supervisors again."""
        dismissed, self._dismissed = self._dismissed, []
        for child in dismissed:
            self._start(child.role, child.node_index, child.starts_s)

    def _verdict(self) -> Outcome | None:
        found = atomic.try_read_json(self._work.verdict)
        if found is None or found["launch_id"] != self._spec.launch_id:
            return None
        return Outcome(found["exit_code"], found["reason"], found["outcome"], found["step"])

    def _tell_exits(self) -> None:
        """Spares the head the wait for a lease; while it is away it is told later."""
        if not self._exited:
            return
        try:
            self._head.call("process_exited", {"processes": self._exited}, timeout_s=self._timeouts.call_s)
        except (UnavailableError, DeadlineError):
            return
        self._exited = []

    def _ask_to_stop(self) -> None:
        reason = f"signal {signal.Signals(self._signals[0]).name}"
        try:
            self._head.call("stop", {"reason": reason}, timeout_s=self._timeouts.call_s)
        except (UnavailableError, DeadlineError):
            return  # asked again at the next tick
        self._stop_told = True

    # Faults

    def _try_faults(self) -> None:
        try:
            status = self._head.call("status", {}, timeout_s=self._timeouts.call_s)
        except KtrainError:
            return  # the head is away or busy: the fault waits
        fault = due(self._faults, status)
        if fault is None:
            return
        count = status["fired"].get(fault.spec, 0) + 1
        said = {"spec": fault.spec, "step": status["step"], "count": count}
        try:
            if not self._head.call("fault", said, timeout_s=self._timeouts.call_s)["fire"]:
                return
        except KtrainError as error:
            _LOG.warning("fault %s: %s", fault.spec, error)
            return
        self._inject(fault, status)

    def _inject(self, fault: Fault, status: dict[str, Any]) -> None:
        if fault.action in ("kill-worker", "stop-worker"):
            signum = signal.SIGKILL if fault.action == "kill-worker" else signal.SIGSTOP
            _signal(status["pids"][str(fault.rank)], signum)
        elif fault.action == "kill-agent":
            self._kill(role="agent", node_index=fault.node)
        elif fault.action == "kill-head":
            self._kill(role="head", node_index=None)
        elif fault.action == "lose-node":
            assert fault.node is not None
            self._lose_nodes([fault.node], status["run_id"])
        elif fault.action == "lose-all":
            self._lose_nodes(list(range(len(self._spec.node_names))), status["run_id"])
        else:
            raise InternalError(f"fault {fault.spec!r}: nobody knows how to inject {fault.action!r}")

    def _kill(self, *, role: str, node_index: int | None) -> None:
        for child in self._children:
            if child.role == role and child.node_index == node_index:
                child.process.kill()  # reaped, told and started again like any other death

    def _lose_nodes(self, node_indexes: list[int], run_id: str) -> None:
        """What a machine's end means: all its processes and its memory are gone; an empty machine takes its place."""
        lost = [child for child in self._children if child.node_index in node_indexes]
        family = [process for child in lost for process in _family(child.process.pid)]
        for child in lost:
            child.process.kill()
        for process in family:
            _signal(process.pid, signal.SIGKILL)
        nodes = [contract.node_name(index) for index in node_indexes]
        self._exited += [{"node": node, "role": "node", "pid": 0} for node in nodes]
        self._tell_exits()
        for child in lost:
            child.process.wait()
        psutil.wait_procs(family, timeout=_KILL_S)
        for child in lost:
            self._children.remove(child)
        for node in nodes:
            _remove(Path(self._spec.volume_root) / run_id / node)
            if (disk := settings.env(contract.ENV_DISK)) is not None:
                _remove(Path(disk) / run_id / node)
            _remove(self._work.node(node))
            self._work.node(node).mkdir(mode=0o700)
        for node_index in node_indexes:
            self._start_node(node_index)

    # End

    def _end_children(self) -> None:
        family = [process for child in self._children for process in _family(child.process.pid)]
        for child in self._children:
            child.process.send_signal(signal.SIGTERM if len(self._signals) < 2 else signal.SIGKILL)
        deadline = Deadline.after(_END_S if len(self._signals) < 2 else 0.0, self._clock)
        for child in self._children:
            try:
                child.process.wait(deadline.remaining_s())
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        gone, left = psutil.wait_procs(family, timeout=1.0)
        del gone
        for process in left:
            _signal(process.pid, signal.SIGKILL)
        psutil.wait_procs(left, timeout=_KILL_S)
        self._children = []

    def _clean(self, *, keep_logs: bool) -> None:
        """Removes the work directory; where the logs of a failure are nowhere else they stay."""
        logs = Path(self._spec.log_dir)
        if not keep_logs or not logs.is_relative_to(self._work.path):
            _remove(self._work.path)
            return
        for leftover in self._work.path.iterdir():
            if leftover != logs:
                _remove(leftover)


def _family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass  # it was faster


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def wait_for_head(
    work: WorkDir, *, launcher: ProcessId, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK
) -> dict[str, Any]:
    """The status of a launch's head, once it answers.

    Raises:
        UnavailableError: the launcher ended before.
        DeadlineError: it did not answer in time.
    """
    deadline = Deadline.after(timeouts.start_s, clock)
    head = HeadCaller(work)
    while True:
        if not launcher.alive():
            raise UnavailableError("the launcher ended before the head answered")
        try:
            return head.call("status", {}, timeout_s=timeouts.call_s)
        except (KtrainError, json.JSONDecodeError):
            deadline.check("start of the head")
        clock.sleep(_TICK_S)
