"""What a job's containers wrote, as far as the cluster keeps it: of each pod the last container and the one before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError
from ktrain.errors import KtrainError, NotFoundError
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.status import FINAL, Status, assess, pod_place, role_of
from ktrain.launcher.backends.kubernetes.view import View, look
from ktrain.launcher.render.common import HEAD, TRAINER, WORKER

_READ_S = 3600.0  # one log
_LOOK_S = 2.0  # between two looks for new pods while following
_MOST_LINES = 4096  # read ahead of whoever prints; then the readers wait


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """One container's run in one pod."""

    node: int  # index of the pod among those of its role
    pod: str
    container: str
    run: int  # how often it was started again
    uid: str


Choice = Callable[[View], tuple[Source, ...]]


def head(view: View) -> tuple[Source, ...]:
    """The head's container."""
    return _sources(view, HEAD, HEAD)


def workers(view: View) -> tuple[Source, ...]:
    """The trainers, in the order of their pods."""
    return _sources(view, WORKER, TRAINER)


def of_rank(rank: int, container: str = TRAINER) -> Choice:
    """A container of the pod at the rank's place; all ranks of that node write to its trainer.

    The choice raises NotFoundError where the job has no such rank, or its size cannot be read.
    """

    def choose(view: View) -> tuple[Source, ...]:
        if view.spec is None:
            raise NotFoundError(f"job {view.name}: its specification cannot be read, so rank {rank} has no known pod")
        spec = spec_file.from_value(view.spec)
        if not 0 <= rank < spec.num_nodes * spec.num_workers:
            raise NotFoundError(
                f"job {view.name}: ranks are 0 to {spec.num_nodes * spec.num_workers - 1}, found {rank}"
            )
        return tuple(source for source in _sources(view, WORKER, container) if source.node == rank // spec.num_workers)

    return choose


def read(client: Client, namespace: str, source: Source, *, previous: bool = False) -> Iterator[bytes]:
    """The lines so far, of the container's last run or of the one before.

    Raises:
        RejectedError: there was none before, or the container has not started.
        NotFoundError: the pod is gone.
    """
    query = {"container": source.container, "previous": "true" if previous else ""}
    return client.lines(_path(namespace, source), query, deadline=Deadline.after(_READ_S, client.clock))


def follow(
    client: Client,
    namespace: str,
    name: str,
    choose: Choice,
    *,
    deadline: Deadline,
    observe: Callable[[Status], None] = lambda status: None,
) -> Iterator[tuple[Source, bytes]]:
    """Lines of all chosen containers as they come, through restarts and new pods, until the job has ended.

    `observe` is called with every look at the job, in the thread of whoever reads the lines; the last one is final.

    One thread reads each container. A stream that breaks is taken up where it was; of a container that is gone
    meanwhile the rest is lost here, and is in the run's own logs.

    Raises:
        NotFoundError: there is no such job.
        DeadlineError: the job goes on.
    """
    lines: queue.Queue[tuple[Source, bytes]] = queue.Queue(_MOST_LINES)
    stop = threading.Event()
    readers: dict[Source, threading.Thread] = {}
    try:
        while True:
            status = None
            try:
                view = look(client, namespace, name)
                status = assess(view)
                observe(status)
                for source in choose(view):
                    if source not in readers:
                        reader = _Reader(client, namespace, source, lines, stop, deadline)
                        readers[source] = reader.start()
            except BusyError:
                pass  # asked again below
            yield from _drain(lines)
            if status is not None and status.state in FINAL and not any(item.is_alive() for item in readers.values()):
                yield from _rest(lines)
                return
            deadline.check(f"logs of {name}")
    finally:
        stop.set()


def _drain(lines: queue.Queue[tuple[Source, bytes]]) -> Iterator[tuple[Source, bytes]]:
    """What comes until it is time for another look at the job, which may have new pods by then."""
    until = Deadline.after(_LOOK_S)
    while not until.expired():
        try:
            yield lines.get(timeout=max(0.01, until.remaining_s()))
        except queue.Empty:
            return


def _rest(lines: queue.Queue[tuple[Source, bytes]]) -> Iterator[tuple[Source, bytes]]:
    """What is left, once nobody adds to it."""
    while True:
        try:
            yield lines.get_nowait()
        except queue.Empty:
            return


class _Reader:
    """One thread that follows one container and never ends the program."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        source: Source,
        lines: queue.Queue[tuple[Source, bytes]],
        stop: threading.Event,
        deadline: Deadline,
    ) -> None:
        self._client = client
        self._path = _path(namespace, source)
        self._source = source
        self._lines = lines
        self._stop = stop
        self._deadline = deadline

    def start(self) -> threading.Thread:
        # A daemon: whoever interrupts the command does not wait for a silent container.
        thread = threading.Thread(target=self._run, name=f"logs-{self._source.pod}", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        last = b""  # time of the last line: where a broken stream is taken up
        while not self._stop.is_set():
            query = {"container": self._source.container, "follow": "true", "timestamps": "true"}
            query |= {"sinceTime": last.decode()} if last else {}
            known = last
            try:
                for line in self._client.lines(self._path, query, deadline=self._deadline):
                    stamp, _, text = line.partition(b" ")
                    if stamp > known:
                        last = stamp
                        self._put(text)
                return
            except BusyError:  # silent for long, or cut off
                if self._deadline.expired():
                    return
                self._client.clock.wait(self._stop, _LOOK_S)
            except KtrainError as error:
                self._put(f"ktrain: {error}\n".encode())
                return

    def _put(self, text: bytes) -> None:
        while not self._stop.is_set():
            try:
                self._lines.put((self._source, text), timeout=_LOOK_S)
                return
            except queue.Full:
                continue


def _path(namespace: str, source: Source) -> str:
    return path_of("v1", "pods", namespace, source.pod) + "/log"


def _sources(view: View, role: str, container: str) -> tuple[Source, ...]:
    """Of pods whose container has started."""
    found = []
    for pod in view.pods or ():
        status = _container(pod, container)
        if role_of(pod) == role and status is not None and (status.get("restartCount") or _has_started(status)):
            job, index = pod_place(pod)
            node = job * _num_pods(view, role) + index
            about = pod["metadata"]
            found.append(Source(node, about["name"], container, int(status.get("restartCount", 0)), about["uid"]))
    return tuple(sorted(found))


def _has_started(status: Object) -> bool:
    state = status.get("state") or {}
    return "running" in state or "terminated" in state


def _container(pod: Object, name: str) -> Object | None:
    """Its status; the agent is a sidecar, which Kubernetes counts among the init containers."""
    status = pod.get("status") or {}
    found = (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ()))
    return next((item for item in found if item["name"] == name), None)


def _num_pods(view: View, role: str) -> int:
    jobs = {job["name"]: job for job in view.jobset["spec"]["replicatedJobs"]}
    return int(jobs[role]["template"]["spec"].get("parallelism", 1))
