"""Jobs on this machine: a launch is a process of its own, which the process that asked for it need not outlive."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ktrain.base import atomic, contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.job import HeadCaller, LaunchSpec, WorkDir, canonical_url, local_path
from ktrain.base.settings import Timeouts
from ktrain.errors import (
    ConfigError,
    DeadlineError,
    InternalError,
    KtrainError,
    NotFoundError,
    UnavailableError,
    from_kind,
)
from ktrain.jobs import record as records
from ktrain.jobs.look import FINAL, Look, Node, State
from ktrain.jobs.record import LaunchRecord
from ktrain.jobs.run_logs import read_logs
from ktrain.launcher.backends.local import Outcome
from ktrain.launcher.code.function import ShippedFunction

_TICK_S = 0.2
_AWAY_S = 5.0  # between two looks at the record of a launch elsewhere
_TAIL_LINES = 3


def log_path(spec: LaunchSpec) -> Path:
    """Where a launch that nobody watches says what it would show: in its run, or beside its work directory."""
    if local_path(spec.run) is not None:
        return Path(spec.log_dir) / "launcher.log"
    work = WorkDir.of_run(spec.run).path
    return work.with_name(f"{work.name}-launcher.log")


def put_function(function: ShippedFunction, run: str) -> Path:
    """Writes a function where the launch's workers read it; returns its script.

    Raises:
        ConfigError: it cannot be written there.
    """
    path, work = local_path(run), WorkDir.of_run(run).path
    root = path / contract.FUNCTION_DIR if path is not None else work.with_name(f"{work.name}-{contract.FUNCTION_DIR}")
    folder = root / function.sha256[:16]
    try:
        if path is None:
            WorkDir(work).make()  # private to this user, and so is what lies beside it
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in function.files.items():
            atomic.write_bytes(folder / name, data)
    except OSError as error:
        raise ConfigError(f"run {run}: {folder} cannot be written ({error.strerror}); choose another run") from error
    return folder / function.command[0]


def start(spec: LaunchSpec) -> LaunchRecord:
    """Starts a launch as a process of its own; returns when the run is its own, which takes a fraction of a second.

    Raises:
        ConflictError: the run is live already.
        UnavailableError: the process ended, and the message has its last words.
        DeadlineError: it said nothing in time.
    """
    log, timeout_s = log_path(spec), Timeouts(spec.patience_s).start_s
    WorkDir.of_run(spec.run).make()  # private to this user, and so is what lies beside it
    log.parent.mkdir(parents=True, exist_ok=True)
    reads, writes = os.pipe()
    with open(reads, "rb") as told:
        with open(log, "ab") as output, os.fdopen(writes, "wb") as end:
            process = subprocess.Popen(
                [spec.python, "-P", "-m", "ktrain.cli.detached", str(end.fileno()), str(log)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # whoever ends this process's group does not mean the launch
                pass_fds=(end.fileno(),),
                env=settings.child_environment({}),
            )
        try:  # it forks, and what was started here ends at once
            process.communicate(json.dumps(spec.to_json()).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DeadlineError(f"start of the launch: not done within {timeout_s:g} s (see {log})") from None
        said = _heard(told.fileno(), timeout_s, log)
    if "error" in said:
        raise from_kind(said["error"]["kind"], said["error"]["message"])
    return LaunchRecord.from_bytes(json.dumps(said).encode())


def _heard(fd: int, timeout_s: float, log: Path) -> dict[str, Any]:
    """The one line that a launch says when the run is its own, or when it cannot be."""
    deadline, data = Deadline.after(timeout_s), b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], deadline.remaining_s())
        if not ready:
            deadline.check(f"start of the launch (see {log})")
            continue
        more = os.read(fd, 1 << 16)
        if not more:
            raise UnavailableError(f"the launch ended before it held the run; the end of {log}:\n{_tail(log)}")
        data += more
    value: dict[str, Any] = json.loads(data)
    return value


class LocalHost:
    """One launch on this machine, found through its run's record, or read from its record where it was elsewhere."""

    def __init__(self, run: str, record: LaunchRecord, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._run = canonical_url(run)
        self._record = record
        self._clock = clock
        self._timeouts = settings.timeouts()
        if record.local is None:
            raise InternalError(f"run {run}: its launch is not one of this machine")
        self._place = record.local
        self._work = WorkDir(Path(self._place.work))
        self._head = HeadCaller(self._work)

    @property
    def run(self) -> str:
        return self._run

    @property
    def name(self) -> str:
        from ktrain.launcher.spec import default_name  # the description of cluster jobs: none of this needs it else

        return default_name(self._run)

    @property
    def where(self) -> str:
        return f"on {self._place.host}, process {self._place.pid}"

    @property
    def clock(self) -> Clock:
        return self._clock

    def look(self) -> Look:
        if self._record.ended is None and not self._may_live():
            self._read_again()
        if self._record.ended is not None:
            return _ended(self._record.ended)
        if not self._is_here():
            return Look(State.RUNNING, (f"it was launched on {self._place.host}, and that host alone can tell more",))
        if not self._may_live():
            return Look(State.FAILED, exit_code=contract.EXIT_FAILED, message=self._last_words())
        try:
            return _alive(self._ask("status"), self._place.host)
        except KtrainError:
            return self._without_head()

    def logs(self, rank: int | None, attempt: int | None) -> str:
        work = Path(self._place.work) if self._is_here() else None
        return read_logs(self._run, rank, attempt, work=work, timeouts=self._timeouts)

    def wait(self, deadline: Deadline, observe: Callable[[Look], None]) -> Look:
        while True:
            look = self.look()
            observe(look)
            if look.state in FINAL:
                return look
            deadline.check(f"run {self._run} ({'; '.join([look.state.value, *look.reasons])})")
            pause_s = _TICK_S if self._is_here() else _AWAY_S
            self._clock.sleep(min(pause_s, deadline.remaining_s()))

    def cancel(self, deadline: Deadline) -> None:
        """As `ktrain cancel`: a head that does not answer yet is asked again.

        Raises:
            ConfigError: it was launched on another machine.
        """
        told = False
        while self.look().state not in FINAL:
            if not self._is_here():
                raise ConfigError(f"run {self._run}: it runs {self.where}; cancel it there")
            if not told:
                told = self._tell_stop()
            deadline.check(f"stop of {self._run}")
            self._clock.sleep(min(_TICK_S, deadline.remaining_s()))

    def resume(self, deadline: Deadline) -> tuple[str, ...]:
        """What was launched is known to whoever launched it.

        Raises:
            ConfigError: always; it says how the run is continued.
        """
        raise ConfigError(
            f"run {self._run}: a job of this machine is resumed by launching the same again: ktrain.launch(..., "
            f"run={self._run!r})"
        )

    def _without_head(self) -> Look:
        """Of a live launch whose head does not answer: it has not begun, has ended, or is gone or busy."""
        self._read_again()
        if self._record.ended is not None:
            return _ended(self._record.ended)
        if self._work.verdict.exists():
            return Look(State.STOPPING, ("its head has its verdict, and its processes end",))
        if self._work.head.exists():
            return Look(State.RECOVERING, ("its head does not answer",))
        return Look(State.STARTING, ("its head has not begun yet",))

    def _tell_stop(self) -> bool:
        try:
            self._ask("stop", reason="job.cancel()")
        except (UnavailableError, DeadlineError, NotFoundError):
            return False
        return True

    def _ask(self, name: str, **params: object) -> dict[str, Any]:
        return self._head.call(name, params, timeout_s=self._timeouts.call_s)

    def _is_here(self) -> bool:
        return self._place.host == ids.host_name()

    def _may_live(self) -> bool:
        return self._is_here() and self._place.process.alive()

    def _read_again(self) -> None:
        """The record of this launch as it is now; of a later launch it tells nothing."""
        try:
            found = records.read(self._run, timeouts=self._timeouts)
        except NotFoundError:
            return
        if found.launch_id == self._record.launch_id:
            self._record = found

    def _last_words(self) -> str:
        said = "its launch ended without a verdict, as one that is killed does; the same launch continues the run"
        tail = _tail(Path(self._place.log)) if self._place.log else ""
        return f"{said}; the end of {self._place.log}:\n{tail}" if tail else said


def _ended(outcome: Outcome) -> Look:
    states = {contract.EXIT_OK: State.DONE, contract.EXIT_STOPPED: State.CANCELLED}
    state = states.get(outcome.exit_code, State.FAILED)
    return Look(state, exit_code=outcome.exit_code, message=outcome.reason or None)


def _alive(status: Mapping[str, Any], host: str) -> Look:
    """What a head says of its job."""
    now = status["state"]
    if now == "ended" or status["stop"] is not None:
        state = State.STOPPING
    elif now == "running":
        state = State.RUNNING
    elif now == "stopping" or any(status["spent"].values()):  # its workers end, or it has failed before
        state = State.RECOVERING
    else:
        state = State.STARTING
    return Look(state, nodes=tuple(_nodes(status["ranks"], host)))


def _nodes(ranks: Mapping[str, Mapping[str, Any]], host: str) -> Iterable[Node]:
    said: dict[str, list[str]] = {}
    for rank, item in ranks.items():
        said.setdefault(item["node"], []).append(f"rank {rank}: {item['phase']}, step {item['step']}")
    for name in sorted(said, key=lambda text: (len(text), text)):
        yield Node(name, host, "; ".join(said[name]))


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
    except OSError:
        return ""
