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
from ktrain.base.job import LaunchSpec, PodPlace, WorkDir, canonical_url, local_path
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
    begins_pod: bool = False  # nothing of this pod ran before

    @property
    def node(self) -> str:
        return "" if self.node_index is None else contract.node_name(self.node_index)

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
    if job.spares:
        raise ConfigError(f"job file {path}: spares: this version runs none in pods, found {job.spares}; use 0")
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
    num_pods = job.num_nodes // num_jobs
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
    run = canonical_url(job.run)
    path = local_path(run)
    waits_s = max(float(job.limits.gang_wait_s), Timeouts(job.limits.patience_s).start_s)
    return LaunchSpec(
        launch_id=ids.text_digest(f"launch {token}"),
        run=run,
        script=job.command[0],
        args=job.command[1:],
        nodes=job.num_nodes,
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
    if place.run != job.run:
        raise ConfigError(f"environment variable {contract.ENV_RUN}: expected {job.run!r}, found {place.run!r}")
    token = read_token(place.token_file)
    index = None if name == "head" else node_index(place, job)
    work = WorkDir(place.work / "launch")
    begins_pod = name == "agent" and not work.path.exists()
    made = Container(name, launch_of(job, place, token), work, place.head, index, begins_pod)
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
    """A pod that is new in its place says that the one before it is gone, so that nobody waits or listens for that."""
    if container.begins_pod:
        _tell(container, {"node": container.node, "role": "node", "pid": 0})


def tell_end(container: Container, ended: Ended) -> None:
    """Spares the head the wait for a lease."""
    if container.node_index is None or ended.process is None:
        return
    role = _MODULES[container.name]
    if container.name == "agent" and ended.told:
        role = "node"  # a sidecar is told to end when its pod goes, and the volume goes with it
    said = {"node": container.node, "role": role, "pid": ended.process.number, "exitcode": ended.exit_code}
    _tell(container, said)


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
    tell_begin(container)
    ended = run_as_init(container.command())
    tell_end(container, ended)
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
