"""Who launched a run last, kept in the run: any process that can read the run finds its job again (ADR 0042).

A launch on this machine writes it when it holds the run's lock, and its outcome before it lets go: so whoever reads a
record without an outcome, whose process is gone, knows that the launch was killed.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from ktrain.base import contract, ids
from ktrain.base.clock import Deadline
from ktrain.base.job import LaunchSpec, WorkDir
from ktrain.base.process import ProcessId
from ktrain.base.settings import Timeouts
from ktrain.base.urls import local_path
from ktrain.errors import CorruptionError, KtrainError, NotFoundError
from ktrain.launcher.backends.local import Outcome
from ktrain.tier.location import open_tier

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_RECORD_PATIENCE_S = 10.0  # a bucket that only the pods can reach may not hold up a launch


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A launch that is a process of one machine."""

    host: str
    pid: int
    start_ticks: int
    work: str  # its work directory, where its lock and its head's address are
    log: str  # what the launch itself said

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.pid, self.start_ticks)


@dataclass(frozen=True, slots=True)
class ClusterPlace:
    """A job on a cluster; how it is reached is known to whoever attaches."""

    namespace: str
    name: str
    context: str | None


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """One launch of a run; exactly one of the places is there."""

    launch_id: str
    local: LocalPlace | None = None
    kubernetes: ClusterPlace | None = None
    ended: Outcome | None = None  # of a local launch; a cluster tells it itself

    def to_bytes(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> LaunchRecord:
        """Raises CorruptionError where it is none of this version."""
        try:
            value: dict[str, Any] = json.loads(data)
            if value.pop("format") != _FORMAT:
                raise ValueError(f"expected format {_FORMAT}")
            kinds = {"local": LocalPlace, "kubernetes": ClusterPlace, "ended": Outcome}
            parts = {name: None if value[name] is None else kind(**value.pop(name)) for name, kind in kinds.items()}
            return cls(**{**value, **parts})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptionError(
                f"{contract.LAUNCH_FILE}: cannot be read ({error}); launch the run again, or remove the file"
            ) from error


def of_this_process(spec: LaunchSpec, log: str = "") -> LaunchRecord:
    """The record of a launch that runs in this process."""
    me = ProcessId.current()
    place = LocalPlace(ids.host_name(), me.pid, me.start_ticks, str(WorkDir.of_run(spec.run).path), log)
    return LaunchRecord(spec.launch_id, local=place)


def read(run: str, *, timeouts: Timeouts) -> LaunchRecord:
    """The record of a run's last launch.

    Raises:
        NotFoundError: the run was never launched, or there is no such run.
        KtrainError: the run cannot be read.
    """
    try:
        with closing(open_tier(run, timeouts=timeouts)) as tier:
            data = tier.read(contract.LAUNCH_FILE, deadline=Deadline.after(timeouts.storage_s))
        return LaunchRecord.from_bytes(data)
    except NotFoundError:
        raise NotFoundError(
            f"run {run}: no launch of it is recorded there (in {os.getcwd()}); check the name, or say where its job "
            "is: attach(run, on=ktrain.Kubernetes(namespace=...))"
        ) from None


def write(run: str, record: LaunchRecord, *, timeouts: Timeouts) -> None:
    """Puts the record in place of an older one. Raises KtrainError where the run cannot be written."""
    with closing(open_tier(run, timeouts=timeouts)) as tier:
        tier.write(contract.LAUNCH_FILE, record.to_bytes(), deadline=Deadline.after(timeouts.storage_s))


def record_on_cluster(run: str, place: ClusterPlace) -> tuple[str, ...]:
    """Records a job of a cluster as the run's last launch, whoever sent it; where the run cannot be written from here,
    which costs the launch nothing, a warning says how the job is found."""
    if local_path(run) is not None:
        return ()  # a path below a volume of the cluster: another thing than the same path here
    try:
        write(run, LaunchRecord(ids.random_id(), kubernetes=place), timeouts=Timeouts(_RECORD_PATIENCE_S))
    except KtrainError as error:
        how = f"attach({place.name!r}, on=ktrain.Kubernetes(namespace={place.namespace!r}))"
        return (f"the job is not recorded in its run; from Python {how} finds it: {error}",)
    return ()


class Recorder:
    """Keeps the record of one launch of this process: `LocalLaunch` tells it when it begins and ends."""

    def __init__(self, spec: LaunchSpec, record: LaunchRecord) -> None:
        self._run = spec.run
        self._record = record
        self._timeouts = Timeouts(spec.patience_s)

    def __call__(self, outcome: Outcome | None) -> None:
        """Writes it; where the run cannot be written the launch goes on, and will say so itself."""
        try:
            write(self._run, replace(self._record, ended=outcome), timeouts=self._timeouts)
        except KtrainError as error:
            _LOG.warning("the launch is not recorded in its run, and can only be found from here: %s", error)
