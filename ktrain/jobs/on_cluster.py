"""Jobs on a cluster, as the calls of the Kubernetes backend show and change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ktrain.base import settings
from ktrain.base.clock import Clock, Deadline
from ktrain.base.urls import without_slash
from ktrain.errors import ConfigError, NotFoundError
from ktrain.jobs import run_records
from ktrain.jobs.look import Look, Node
from ktrain.jobs.run_logs import read_logs
from ktrain.launcher.backends.kubernetes import act, stored
from ktrain.launcher.backends.kubernetes import logs as kept
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.find import find_job, is_of_run
from ktrain.launcher.backends.kubernetes.resume import find_last, resume
from ktrain.launcher.backends.kubernetes.status import Pod, Status, assess, run_of
from ktrain.launcher.backends.kubernetes.submission import changes
from ktrain.launcher.backends.kubernetes.submit import submit, try_job, try_successor
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.code.archive import CodeArchive
from ktrain.launcher.places import Kubernetes
from ktrain.launcher.spec import JobSpec
from ktrain.run.code import send_code

_NAMESPACE = "default"


def client_of(place: Kubernetes) -> Client:
    """A client of the cluster that is meant."""
    kubeconfig = None if place.kubeconfig is None else Path(place.kubeconfig)
    return Client(connect(kubeconfig, place.context))


def send(client: Client, spec: JobSpec, archive: CodeArchive | None) -> tuple[ClusterHost, tuple[str, ...]]:
    """Tries a job whole, and submits it; returns it, and what the cluster lost of it.

    Raises:
        ConfigError: the cluster cannot run the job, or refuses an object.
        ConflictError: a job of that name is there.
        KtrainError: a step failed; nothing is left, or the error names what is.
    """
    data = None if archive is None else archive.data
    tried = try_job(client, spec, data)
    if spec.code.is_in_bucket:
        send_code(spec, archive)
    sent = submit(client, tried, data)
    gang = tried.rendered.gang
    packed = () if archive is None else archive.warnings
    said = (*packed, *tried.warnings, *filter(None, (gang.warning, sent.left)))
    return ClusterHost(client, spec.namespace, spec.name, spec.run), said


def find(client: Client, job: str, namespace: str | None, *, run: str | None = None) -> ClusterHost:
    """A job that is there, by its name or by its run's URL; with `run` it has to be that run's: names are used again.

    Raises:
        NotFoundError: there is no such job.
        ConfigError: several jobs are of that run; they are named.
    """
    namespace = namespace or _NAMESPACE
    name = find_job(client, namespace, job)
    jobset = look(client, namespace, name).jobset
    found = run_of(jobset)
    if found is None:
        raise NotFoundError(f"namespace {namespace}: JobSet {name!r} was not made by ktrain")
    if run is not None and not is_of_run(jobset, run):
        raise NotFoundError(
            f"namespace {namespace}: job {name!r}, the last that is recorded of run {run}, is of run {found} now; "
            "if the run has another job, say where: attach(run, on=ktrain.Kubernetes(namespace=...))"
        )
    return ClusterHost(client, namespace, name, found)


class ClusterHost:
    """One job of a cluster. Call from one thread."""

    def __init__(self, client: Client, namespace: str, name: str, run: str) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self._run = run

    @property
    def run(self) -> str:
        return self._run

    @property
    def name(self) -> str:
        return self._name

    @property
    def where(self) -> str:
        return f"on Kubernetes, namespace {self._namespace}"

    @property
    def clock(self) -> Clock:
        return self._client.clock

    def look(self) -> Look:
        return _shown(assess(look(self._client, self._namespace, self._name)))

    def logs(self, rank: int | None, attempt: int | None) -> str:
        """Of containers what the cluster keeps; of an attempt what the run keeps."""
        if attempt is not None:
            return read_logs(self._run, rank, attempt, timeouts=settings.timeouts())
        view = look(self._client, self._namespace, self._name)
        if rank is not None:
            kept.of_rank(rank)(view)  # refuses a rank that the job does not have
        sources = kept.workers(view)
        missing = NotFoundError(f"job {self._name}: no container has started; job.status() says what it waits for")
        found: dict[str, str] = {}
        for source in sources:
            try:
                found[source.pod] = b"".join(kept.read(self._client, self._namespace, source)).decode(errors="replace")
            except (ConfigError, NotFoundError) as error:  # gone meanwhile: the others are shown
                missing = NotFoundError(str(error))
        if not found:
            raise missing
        if rank is not None:
            return _lines_of_rank(self._name, rank, found.values())
        if len(found) == 1:
            return next(iter(found.values()))
        return "".join(f"[{pod}] {line}\n" for pod, text in found.items() for line in text.splitlines())

    def wait(self, deadline: Deadline, observe: Callable[[Look], None]) -> Look:
        found = act.wait(
            self._client, self._namespace, self._name, deadline=deadline, observe=lambda status: observe(_shown(status))
        )
        return _shown(found)

    def cancel(self, deadline: Deadline) -> None:
        act.cancel(self._client, self._namespace, self._name, deadline=deadline)

    def resume(self, deadline: Deadline) -> tuple[str, ...]:
        """As `ktrain resume` without options."""
        client = self._client
        from_run = partial(run_records.last, self._run)
        last = find_last(client, self._namespace, self._name, run=self._run, from_run=from_run)
        spec = last.submission.job
        if (spec.namespace, spec.name, spec.run) != (self._namespace, self._name, without_slash(self._run)):
            raise NotFoundError(
                f"job {self._name} of run {self._run}: the last one is job {spec.name} of run {spec.run} in namespace "
                f"{spec.namespace}; attach to that"
            )
        if last.is_sent:  # by a resume that died before it could say so
            stored.drop_ticket(client, self._namespace, self._name)
            return ()
        data = stored.carried_code(client, spec)
        tried = try_successor(client, spec, data)
        gang = tried.rendered.gang
        said = changes(last.submission, spec, tried.facts, gang)
        if spec.code.is_in_bucket:
            send_code(spec, None)
        done = resume(client, last, tried, data, keep=run_records.try_keep, deadline=deadline)
        return (*said, *tried.warnings, *filter(None, (gang.warning, done.unkept, done.sent.left)))


def _lines_of_rank(name: str, rank: int, texts: Iterable[str]) -> str:
    """The lines of a rank, which agents mark with it: whichever pods it has been in, one after the other."""
    mark = f"[{rank}] "
    lines = [line.removeprefix(mark) for text in texts for line in text.splitlines() if line.startswith(mark)]
    if not lines:
        raise NotFoundError(f"job {name}: rank {rank} has written nothing that its containers still have")
    return "".join(f"{line}\n" for line in lines)


def _shown(status: Status) -> Look:
    return Look(
        state=status.state,
        reasons=tuple(map(str, status.reasons)),
        nodes=None if status.pods is None else tuple(map(_node, status.pods)),
        exit_code=status.exit_code,
        message=status.message or None,
    )


def _node(pod: Pod) -> Node:
    said = [pod.phase.lower(), *(["ready"] if pod.ready else [])]
    said += [f"started again {pod.restarts} times"] if pod.restarts else []
    return Node(pod.name, pod.node, ", ".join(said))
