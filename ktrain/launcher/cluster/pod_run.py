"""One pod on its node: from its volumes over init containers, sidecars and main containers to its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ktrain.base.clock import Clock
from ktrain.launcher.cluster.containers import ContainerRun, Kind, Starter
from ktrain.launcher.cluster.environment import NotStartedError
from ktrain.launcher.cluster.probes import PROBES
from ktrain.launcher.cluster.restarts import After, BackOff, after_exit
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.volumes import Places

_LOG = logging.getLogger(__name__)
_DEFAULT_GRACE_S = 30


@dataclass(frozen=True, slots=True)
class Delays:
    """The kubelet's back-off between restarts of one container, and a bound for the periods of probes."""

    first_s: float = 10.0
    longest_s: float = 300.0
    probe_s: float = math.inf  # at most, whatever a manifest says; a probe's time as a whole stays what it is


class Stage(Enum):
    """How far a pod has come."""

    INITIALISING = "initialising"
    RUNNING = "running"
    RESTARTING_ALL = "restarting-all"
    ENDING = "ending"
    ENDED = "ended"


class PodRun:
    """A pod's containers and what follows when. Call from one thread.

    `advance` moves on what can move; `due_s` says when it has to be called though nothing has happened.
    """

    def __init__(self, pod: Object, starter: Starter, places: Places, clock: Clock, delays: Delays) -> None:
        self.pod = pod
        self.places = places
        self.stage = Stage.INITIALISING
        self.initialised = False  # all init containers have done their part
        self.reason = ""  # why it was ended, where that was not for its containers' sake
        self.message = ""
        self._clock = clock
        self._policy: str = pod["spec"].get("restartPolicy") or "Always"
        self._begun_s = clock.monotonic()
        self._kill_at_s: float | None = None
        self._stopping: list[list[ContainerRun]] = []  # what is asked to end next, the first group already was
        self.containers = [
            ContainerRun(
                _paced(spec, delays.probe_s),
                kind,
                starter,
                clock,
                BackOff(delays.first_s, delays.longest_s),
                places.pod / "logs" / spec["name"],
            )
            for spec, kind in _kinds(pod["spec"])
        ]
        has_inits = any(container.kind is not Kind.MAIN for container in self.containers)
        for container in self.of(Kind.MAIN):
            container.wait_for("PodInitializing" if has_inits else "ContainerCreating")

    def of(self, *kinds: Kind) -> list[ContainerRun]:
        return [container for container in self.containers if container.kind in kinds]

    def container(self, name: str) -> ContainerRun | None:
        return next((container for container in self.containers if container.name == name), None)

    def phase(self) -> str:
        """The pod's phase; Succeeded and Failed only when everything has ended."""
        mains = self.of(Kind.MAIN)
        if self.stage is Stage.ENDED:
            succeeded = not self.reason and all(main.exit_code == 0 for main in mains)
            return "Succeeded" if succeeded else "Failed"
        return "Running" if any(main.was_started or main.restarts for main in mains) else "Pending"

    def adopt_lost(self) -> None:
        """The node came back without the containers: those that ran have ended, nobody knows how."""
        known = {
            entry["name"]: entry
            for key in ("initContainerStatuses", "containerStatuses")
            for entry in self.pod.get("status", {}).get(key) or ()
        }
        for container in self.containers:
            entry = known.get(container.name)
            if entry is not None and "running" in entry["state"]:
                container.restarts = entry["restartCount"]
                container.lost()
        if any(main.exit_code is not None and self._after(main) is After.STAY for main in self.of(Kind.MAIN)):
            self.stop(0)

    # Moving on

    def advance(self) -> None:
        """Does what is due. Never waits."""
        for container in self.containers:
            container.observe()
        self._check_deadline()
        if self.stage is Stage.RESTARTING_ALL and not any(container.running for container in self.containers):
            for container in self.containers:
                container.reset()
            self.stage, self.initialised = Stage.INITIALISING, False
        if self.stage is Stage.INITIALISING:
            self._initialise()
        if self.stage is Stage.RUNNING:
            self._run()
        if self.stage is Stage.ENDING:
            self._end()

    def due_s(self) -> float | None:
        """The monotonic time of the next thing that comes by itself."""
        return min(self._dues(), default=None)

    def stop(self, grace_s: float, *, reason: str = "", message: str = "") -> None:
        """Ends the pod: main containers first, then sidecars, all killed after the grace. A later call may only
        shorten the grace.
        """
        until_s = self._clock.monotonic() + grace_s
        if self.stage in (Stage.ENDING, Stage.ENDED):
            self._kill_at_s = min(until_s, self._kill_at_s) if self._kill_at_s is not None else until_s
            return
        self.stage = Stage.ENDING
        self.reason, self.message = reason, message
        self._kill_at_s = until_s
        self._stopping = [self.of(Kind.MAIN, Kind.INIT), *([sidecar] for sidecar in reversed(self.of(Kind.SIDECAR)))]
        self._ask_first()

    def kill(self) -> None:
        """Kills everything at once."""
        for container in self.containers:
            container.kill()

    def reap(self) -> bool:
        """Kills what runs, and starts nothing; true when nothing runs any more."""
        self.kill()
        for container in self.containers:
            container.observe()
        return not any(container.running for container in self.containers)

    def _dues(self) -> Iterator[float]:
        for container in self.containers:
            due_s = container.due_s()
            if due_s is not None:
                yield due_s
            if container.exit_code is not None and not container.running and self._is_alive():
                yield container.back_off.due_s(container.ended_s)
        if self._kill_at_s is not None and self.stage is Stage.ENDING:
            yield self._kill_at_s
        limit_s = self.pod["spec"].get("activeDeadlineSeconds")
        if limit_s and self._is_alive():
            yield self._begun_s + limit_s

    def _is_alive(self) -> bool:
        return self.stage in (Stage.INITIALISING, Stage.RUNNING)

    def _check_deadline(self) -> None:
        limit_s = self.pod["spec"].get("activeDeadlineSeconds")
        if limit_s and self._is_alive() and self._clock.monotonic() >= self._begun_s + limit_s:
            words = "Pod was active on the node longer than the specified deadline"
            self.stop(self.grace_s, reason="DeadlineExceeded", message=words)

    @property
    def grace_s(self) -> int:
        """Its own grace."""
        grace_s = self.pod["spec"].get("terminationGracePeriodSeconds")
        return _DEFAULT_GRACE_S if grace_s is None else int(grace_s)

    def _initialise(self) -> None:
        for container in self.of(Kind.INIT, Kind.SIDECAR):
            if container.kind is Kind.INIT and container.exit_code == 0:
                continue
            if not container.running:
                self._bring_up(container)
            if container.kind is Kind.INIT or not container.started:
                return
        self.stage, self.initialised = Stage.RUNNING, True

    def _run(self) -> None:
        mains = self.of(Kind.MAIN)
        for container in (*self.of(Kind.SIDECAR), *mains):
            if not container.running:
                self._bring_up(container)
            if self.stage is not Stage.RUNNING:
                return
        if all(main.exit_code is not None and self._after(main) is After.STAY for main in mains):
            self.stop(self.grace_s)

    def _bring_up(self, container: ContainerRun) -> None:
        """Starts a container that does not run, if it should and may; or ends or restarts the pod for its sake."""
        after = After.RESTART if container.exit_code is None else self._after(container)
        if after is After.RESTART_ALL:
            self.stage = Stage.RESTARTING_ALL
            self.kill()
        elif after is After.RESTART:
            self._try_start(container)
        elif container.kind is Kind.INIT:
            self.stop(self.grace_s)

    def _try_start(self, container: ContainerRun) -> None:
        if container.exit_code is not None and self._clock.monotonic() < container.back_off.due_s(container.ended_s):
            container.wait_for("CrashLoopBackOff", self._back_off_words(container))
            return
        try:
            container.start()
        except NotStartedError as error:
            container.wait_for(error.reason, error.message)

    def _after(self, container: ContainerRun) -> After:
        if container.kind is Kind.SIDECAR:
            return After.RESTART
        assert container.exit_code is not None
        policy = "OnFailure" if container.kind is Kind.INIT and self._policy == "Always" else self._policy
        return after_exit(container.spec, policy, container.exit_code, is_init=container.kind is Kind.INIT)

    def _back_off_words(self, container: ContainerRun) -> str:
        metadata = self.pod["metadata"]
        whole = f"{metadata['name']}_{metadata['namespace']}({metadata['uid']})"
        return f"back-off {container.back_off.delay_s:g}s restarting failed container={container.name} pod={whole}"

    # The end

    def _ask_first(self) -> None:
        for container in self._stopping[0]:
            container.terminate()

    def _end(self) -> None:
        if self._kill_at_s is not None and self._clock.monotonic() >= self._kill_at_s:
            self.kill()
        while self._stopping and not any(container.running for container in self._stopping[0]):
            self._stopping.pop(0)
            if self._stopping:
                self._ask_first()
        if not self._stopping:
            self.stage = Stage.ENDED


def _paced(spec: Mapping[str, Any], probe_s: float) -> Mapping[str, Any]:
    """A container whose probes are asked again after `probe_s` at the latest, so many times more often."""
    found = dict(spec)
    for name in (name for name in PROBES if name in spec):
        period_s = float(spec[name].get("periodSeconds") or 10)
        times = max(math.ceil(period_s / probe_s), 1)
        least = times * int(spec[name].get("failureThreshold") or 3)
        found[name] = {**spec[name], "periodSeconds": period_s / times, "failureThreshold": least}
    return found


def _kinds(spec: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Kind]]:
    for init in spec.get("initContainers") or ():
        yield init, Kind.SIDECAR if init.get("restartPolicy") == "Always" else Kind.INIT
    for main in spec["containers"]:
        yield main, Kind.MAIN
