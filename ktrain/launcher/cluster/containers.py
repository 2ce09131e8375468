"""One container of a pod: its runs one after the other, its probes, and the status that tells of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from ktrain.base.clock import Clock
from ktrain.launcher.cluster.probes import PROBES, Attempt, Probe
from ktrain.launcher.cluster.processes import EXIT_KILLED, EXIT_NOT_STARTED, Ended, Process
from ktrain.launcher.cluster.restarts import BackOff
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.times import timestamp

_MOST_MESSAGE = 4096  # bytes of last words
_MOST_LOG = 2048  # bytes of the log that stand in for them
_STARTUP, _READINESS, _LIVENESS = PROBES


class Kind(Enum):
    """What a container is to its pod."""

    INIT = "init"
    SIDECAR = "sidecar"
    MAIN = "main"


class Starter(Protocol):
    """What a container needs of its pod to run."""

    def start(self, container: Mapping[str, Any], log: Path) -> tuple[Process, Path]:
        """Starts a run; returns it and the file of its last words.

        Raises:
            NotStartedError: something that it needs is missing.
        """

    def ask(self, container: Mapping[str, Any], probe: Mapping[str, Any]) -> Attempt:
        """Begins one attempt of a probe."""


class ContainerRun:
    """The runs of one container. Call from one thread."""

    def __init__(
        self, spec: Mapping[str, Any], kind: Kind, starter: Starter, clock: Clock, back_off: BackOff, logs: Path
    ) -> None:
        """`logs` is the folder of the container's log files, one for each run: `0.log`."""
        self.spec = spec
        self.kind = kind
        self.name: str = spec["name"]
        self.restarts = 0
        self.exit_code: int | None = None  # of the last run; None while it runs and before the first
        self.ended_s = 0.0
        self.back_off = back_off
        self._starter = starter
        self._clock = clock
        self._logs = logs
        self._process: Process | None = None
        self._message_file: Path | None = None
        self._started_at = ""
        self._state: Object = {"waiting": {"reason": "PodInitializing"}}
        self._last_state: Object = {}
        self._probes: dict[str, Probe] = {}
        self._killed_by_probe = ""

    # What is

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def was_started(self) -> bool:
        return self._process is not None or self.exit_code is not None

    @property
    def started(self) -> bool:
        """Whether it runs and its startup probe, if it has one, has passed."""
        startup = self._probes.get(_STARTUP)
        return self.running and (startup is None or startup.passed)

    @property
    def ready(self) -> bool:
        """Whether it may be relied on; an init container is ready once it has succeeded."""
        if self.kind is Kind.INIT:
            return self.exit_code == 0
        readiness = self._probes.get(_READINESS)
        return self.started and (readiness is None or readiness.passed)

    def pid(self) -> int | None:
        """Of its first process."""
        return None if self._process is None else self._process.pid()

    def log(self, *, previous: bool = False) -> Path:
        """The log of its present run, or of the one before; the file may not be there."""
        return self._logs / f"{self.restarts - previous}.log"

    def status(self) -> Object:
        """Its entry in `containerStatuses` or `initContainerStatuses`."""
        return {
            "name": self.name,
            "state": self._state,
            "lastState": self._last_state,
            "ready": self.ready,
            "restartCount": self.restarts,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "started": self.started,
        }

    def due_s(self) -> float | None:
        """When its probes have to be looked at, unless something happens before."""
        return min((probe.due_s() for probe in self._active_probes()), default=None)

    # What happens

    def start(self) -> None:
        """Starts it, for the first time or again.

        Raises:
            NotStartedError: something that it needs is missing.
        """
        restarts = self.restarts + 1 if self.exit_code is not None else self.restarts
        self._process, self._message_file = self._starter.start(self.spec, self._logs / f"{restarts}.log")
        if self.exit_code is not None:
            self.back_off.restarted(self._clock.monotonic())
        self.restarts, self.exit_code = restarts, None
        self._started_at = timestamp(self._clock.wall())
        self._leave_end()
        self._state = {"running": {"startedAt": self._started_at}}
        self._probes = {
            name: Probe(self.spec[name], self._asker(), self._clock, passed=name == _LIVENESS)
            for name in (_STARTUP, _READINESS, _LIVENESS)
            if name in self.spec
        }

    def observe(self) -> None:
        """Takes notice of its end, and of its probes' answers while it runs."""
        ended = self._process.ended() if self._process is not None else None
        if ended is not None:
            self._end(ended)
            return
        for probe in self._active_probes():
            probe.advance()
        for name in (_STARTUP, _LIVENESS):
            probe_failed = name in self._probes and self._probes[name].failed
            if probe_failed and self._process is not None and not self._killed_by_probe:
                self._killed_by_probe = name
                self._process.kill()

    def wait_for(self, reason: str, message: str = "") -> None:
        """Says why it does not run."""
        self._leave_end()
        self._state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def lost(self) -> None:
        """Its last run vanished with the node that ran it."""
        self._process = None
        self._state = _terminated(EXIT_KILLED, "ContainerStatusUnknown", "", "", self._started_at)
        self.exit_code = EXIT_KILLED
        self.ended_s = self._clock.monotonic()

    def reset(self) -> None:
        """Makes it as if the pod had just begun; the count of restarts, logs and back-off stay."""
        self.restarts += 1 if self.exit_code is not None else 0
        self.exit_code = None
        self.wait_for("PodInitializing")

    def _leave_end(self) -> None:
        if "terminated" in self._state:
            self._last_state = self._state

    def _asker(self) -> Callable[[Mapping[str, Any]], Attempt]:
        return lambda probe: self._starter.ask(self.spec, probe)

    def _active_probes(self) -> list[Probe]:
        """The startup probe until it has passed, the others after it."""
        if not self.running:
            return []
        startup = self._probes.get(_STARTUP)
        if startup is not None and not startup.passed:
            return [startup]
        return [probe for name, probe in self._probes.items() if name != _STARTUP]

    def _end(self, ended: Ended) -> None:
        for probe in self._probes.values():
            probe.stop()
        reason = "Completed" if ended.exit_code == 0 else "Error"
        if ended.exit_code == EXIT_NOT_STARTED and ended.message:
            reason = "StartError"
        now = timestamp(self._clock.wall())
        self._state = _terminated(ended.exit_code, reason, self._last_words(ended), now, self._started_at)
        self._process, self._killed_by_probe = None, ""
        self.exit_code = ended.exit_code
        self.ended_s = self._clock.monotonic()

    def _last_words(self, ended: Ended) -> str:
        if ended.message:
            return ended.message
        words = b""
        if self._message_file is not None and self._message_file.is_file():
            words = self._message_file.read_bytes()[:_MOST_MESSAGE]
        falls_back = self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not words and falls_back and ended.exit_code != 0:
            words = (self._logs / f"{self.restarts}.log").read_bytes()[-_MOST_LOG:]
        return words.decode(errors="replace")


def _terminated(exit_code: int, reason: str, message: str, finished_at: str, started_at: str) -> Object:
    said = {"message": message} if message else {}
    return {
        "terminated": {
            "exitCode": exit_code,
            "reason": reason,
            **said,
            "startedAt": started_at or None,
            "finishedAt": finished_at or None,
        }
    }
