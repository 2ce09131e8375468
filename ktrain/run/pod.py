"""A container of a job's pods, as the rendered manifests start it (ADR 0038).

    python -P -m ktrain.run.pod head|agent|trainer

Learns the job and its own place in it from environment and files, writes them where head, agent and supervisor look
for them, and runs one of these below an init. Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base import atomic, contract, ids, settings
from ktrain.base.control import Client
from ktrain.base.exits import exit_code
from ktrain.base.faults import FaultPoints
from ktrain.base.job import LaunchSpec, PodPlace, WorkDir, canonical_url, local_path
from ktrain.base.process import ProcessId
from ktrain.base.settings import PodSettings, Timeouts
from ktrain.errors import ConfigError, KtrainError
from ktrain.launcher import spec as cluster
from ktrain.launcher import spec_file
from ktrain.run.init import Ended, run_as_init

_LOG = logging.getLogger(__name__)
_ROLES = {"head": "head", "agent": "worker", "trainer": "worker"}  # container -> role of its pod
_MODULES = {"head": "head", "agent": "agent", "trainer": "supervisor"}


@dataclass(frozen=True, slots=True)
class Container:
    """One container of the job, ready to run."""

    name: str
    spec: LaunchSpec
    work: WorkDir
    head: str  # address
    node_index: int | None  # None for the head

    @property
    def node(self) -> str:
        return "" if self.node_index is None else contract.node_name(self.node_index)

    def child_of(self, name: str) -> Path:
        """Which process ran last below process 1 of a container of this pod; absent before the first."""
        return self.work.path / f"child-{name}.json"

    def command(self) -> list[str]:
        """What runs below this process."""
        place = [] if self.node_index is None else [str(self.node_index)]
        module = f"ktrain.run.{_MODULES[self.name]}"
        return [self.spec.python, "-P", "-m", module, str(self.work.path), *place, str(os.getpid())]


def read_job(path: Path) -> cluster.JobSpec:
    """The job, as it was submitted.

    Raises:
        ConfigError: the file cannot be read, or is not a job that this version can run.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"job file {path}: cannot be read as JSON: {error}; submit the job again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"job file {path}: expected an object, found {type(value).__name__}; submit the job again")
    try:
        job = spec_file.from_value(value)
    except ConfigError as error:
        raise ConfigError(f"job file {path}: {error}; the image may have another version of ktrain") from error
    return job


def read_token(path: Path) -> str:
    """The run's own token.

    Raises:
        ConfigError: there is none.
    """
    try:
        token = path.read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"token file {path}: cannot be read ({type(error).__name__}); submit the job again") from None
    if not token:
        raise ConfigError(f"token file {path}: it is empty; submit the job again")
    return token


def node_index(place: PodSettings, job: cluster.JobSpec) -> int:
    """Which of the job's nodes this pod is: slices one after another, the pods of each in order.

    Raises:
        ConfigError: the job has no such pod.
    """
    num_jobs = 1 if job.tpus is None else job.tpus.num_slices
    num_pods = job.num_nodes // num_jobs + job.spares  # a job in slices has none
    for name, index, count in (
        (contract.ENV_JOB_INDEX, place.job_index, num_jobs),
        (contract.ENV_POD_INDEX, place.pod_index, num_pods),
    ):
        if index >= count:
            raise ConfigError(f"environment variable {name}: expected less than {count} for this job, found {index}")
    return place.job_index * num_pods + place.pod_index


def launch_of(job: cluster.JobSpec, place: PodSettings, token: str) -> LaunchSpec:
    """The job as head, agents and supervisors read it, seen from this pod.

    The token is made at submission, so a name made of it tells one submission from another, and its pods agree on it.
    """
    run = canonical_url(_run_here(job))
    path = local_path(run)
    waits_s = max(float(job.limits.gang_wait_s), Timeouts(job.limits.patience_s).start_s)
    return LaunchSpec(
        launch_id=ids.text_digest(f"launch {token}"),
        run=run,
        script=job.command[0],
        args=tuple(_argument_here(text, job) for text in job.command[1:]),
        nodes=job.num_nodes,
        spares=job.spares,
        workers_per_node=job.num_workers,
        max_restarts=job.limits.max_restarts,
        patience_s=job.limits.patience_s,
        python=sys.executable,
        cwd=os.getcwd(),
        volume_root=str(place.volume),
        log_dir=str((place.work if path is None else path) / contract.LOGS_DIR),
        pod=PodPlace(
            host=place.host,
            address=place.address,
            head_port=place.head_port,
            join_s=waits_s,
            ready_file=str(_ready_file(place)),
        ),
    )


def _run_here(job: cluster.JobSpec) -> str:
    """The run's URL; one on a volume by the path at which this container has that."""
    path = local_path(job.run)
    return job.run if path is None else str(settings.path_in_pod(str(path)))


def _is_run(told: str, job: cluster.JobSpec) -> bool:
    path = local_path(told)
    return told == job.run or (path is not None and str(path.resolve()) == _run_here(job))


def _argument_here(text: str, job: cluster.JobSpec) -> str:
    """An argument that is a path on one of the job's volumes, likewise; any other as it is."""
    on_volume = any(f"{text}/".startswith(f"{volume.path}/") for volume in job.volumes)
    return str(settings.path_in_pod(text)) if on_volume else text


def _ready_file(place: PodSettings) -> Path:
    return place.work / contract.POD_READY_FILE.rpartition("/")[2]


def prepare(name: str, place: PodSettings) -> Container:
    """Reads what there is to know and puts it where the processes look for it.

    Raises:
        ConfigError: something is missing or does not fit.
    """
    if place.role != _ROLES[name]:
        raise ConfigError(
            f"environment variable {contract.ENV_ROLE}: expected {_ROLES[name]} for container {name}, "
            f"found {place.role!r}"
        )
    job = read_job(place.job_file)
    if not _is_run(place.run, job):
        raise ConfigError(f"environment variable {contract.ENV_RUN}: expected {job.run!r}, found {place.run!r}")
    token = read_token(place.token_file)
    index = None if name == "head" else node_index(place, job)
    made = Container(name, launch_of(job, place, token), WorkDir(place.work / "launch"), place.head, index)
    _write(made, place)
    return made


def _write(container: Container, place: PodSettings) -> None:
    """Fills the work directory; agent and trainer share it and write the same."""
    work = container.work
    try:
        work.path.mkdir(mode=0o700, exist_ok=True)
        if container.node:
            work.node(container.node).mkdir(mode=0o700, exist_ok=True)
            atomic.write_json(work.head, {"address": container.head})
        submission = place.job_file.with_name(contract.SUBMISSION_FILE)
        if container.name == "head" and submission.is_file():
            atomic.write_bytes(work.path / contract.SUBMISSION_FILE, submission.read_bytes())
        link = work.path / f"token-{container.name}"
        link.unlink(missing_ok=True)
        link.symlink_to(place.token_file)  # the token stays in memory, where the Secret lies
        link.replace(work.token)
        atomic.write_json(work.spec, container.spec.to_json())
        if container.name == "agent":
            _ready_file(place).unlink(missing_ok=True)  # of a predecessor in this pod
    except OSError as error:
        raise ConfigError(f"work folder {place.work}: it cannot be written: {error}; mount a volume there") from error


def tell_begin(container: Container) -> None:
    """What is new in its place says that what was before it is gone, so that nobody waits or listens for that.

    A pod says it of the pod before, again and again until its trainer starts: nothing of this pod is known before that,
    which would be taken for gone as well. A container says it of the one before, whose process 1 may have died without
    a word.
    """
    if container.name == "agent" and not container.child_of("trainer").exists():
        _tell(container, {"node": container.node, "role": "node", "pid": 0})
    before = atomic.try_read_json(container.child_of(container.name))
    if before is not None and container.node:
        _tell(container, {"node": container.node, "role": _MODULES[container.name], "pid": before["number"]})


def note_child(container: Container, child: ProcessId) -> None:
    """For the next start of the container: which process is gone by then."""
    try:
        atomic.write_json(container.child_of(container.name), {"number": child.number})
    except OSError as error:
        _LOG.warning("%s: its process is not noted: %s", container.name, error)


def tell_end(container: Container, ended: Ended) -> None:
    """Spares the head the wait for a lease."""
    if container.node_index is None:
        return
    if container.name == "agent" and ended.told:
        # A sidecar is told to end when its pod goes, and what it served goes with it. The node's next pod may be heard
        # already: the supervisor's number says which of them ends, -1 that this one had none.
        role, number = "node", (atomic.try_read_json(container.child_of("trainer")) or {}).get("number", -1)
    elif ended.process is not None:
        role, number = _MODULES[container.name], ended.process.number
    else:
        return
    said = {"node": container.node, "role": role, "pid": number, "exitcode": ended.exit_code}
    _tell(container, {**said, "told": ended.told})


def _tell(container: Container, said: dict[str, Any]) -> None:
    """To the head; where it is away it finds out by itself."""
    try:
        caller = Client(container.head, container.work.read_token())
        caller.call("process_exited", {"processes": [said]}, timeout_s=Timeouts(container.spec.patience_s).call_s)
    except KtrainError as error:
        _LOG.info("head: %s", error)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if len(argv) != 1 or argv[0] not in _ROLES:
            raise ConfigError(f"ktrain.run.pod: expected one of {', '.join(_ROLES)}, found {' '.join(argv)!r}")
        container = prepare(argv[0], settings.pod_settings())
    except KtrainError as error:
        _LOG.error("%s", error)
        return exit_code(error)
    faults = _fault_points(container)
    faults.reached("pod.prepared", rank=container.node_index)

    def begin() -> None:
        tell_begin(container)
        faults.reached("pod.begun", rank=container.node_index)

    ended = run_as_init(container.command(), lambda child: note_child(container, child), begin)
    faults.reached("pod.ended", rank=container.node_index)
    tell_end(container, ended)
    return ended.exit_code


def _fault_points(container: Container) -> FaultPoints:
    """The plan of this start: the epochs of process 1 are the starts of its container in the life of the pod."""
    if settings.env(contract.ENV_FAULTS) is None:
        return FaultPoints([], epoch=0)
    path = container.work.path / f"starts-{container.name}.json"
    starts = 1 + int((atomic.try_read_json(path) or {}).get("starts", 0))
    atomic.write_json(path, {"starts": starts})
    return FaultPoints.from_environment(starts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
