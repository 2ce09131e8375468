"""Where the logs of containers come from, and how a request for them is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.launcher.cluster.resources import POD
from ktrain.launcher.cluster.store import Store
from ktrain.testing.fake_cluster.status import FieldError, Refusal, bad_request, invalid_value

Object = dict[str, Any]

_LOOK_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line with its line feed, if it has one yet, and when it was written (UTC seconds)."""

    text: bytes
    wall_s: float


class LogSource(Protocol):
    """Whoever has the containers' output: a pod runner, or a test."""

    def lines(self, pod: Object, container: str, run: int, begin: int) -> Sequence[LogLine]:
        """Returns the lines from number `begin` on that the container's run (0 for the first) has written.

        The last may lack its line feed: it is then asked for again until it has one, or the container has ended.
        """


class PodLogs:
    """Logs kept in memory, written by the test. Safe from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[tuple[str, str, int], list[LogLine]] = {}  # guarded by _lock

    def write(self, pod: Object, container: str, text: str, *, run: int = 0) -> None:
        """Adds lines to what a container's run has written."""
        now_s = self._clock.wall()
        key = pod["metadata"]["uid"], container, run
        with self._lock:
            lines = self._lines.setdefault(key, [])
            lines.extend(LogLine(line, now_s) for line in text.encode().splitlines(keepends=True))

    def lines(self, pod: Object, container: str, run: int, begin: int) -> Sequence[LogLine]:
        with self._lock:
            return self._lines.get((pod["metadata"]["uid"], container, run), [])[begin:]


class FileLogs:
    """Logs in files, as a pod runner leaves them; all lines carry the time of the file's last change.

    `path_of(pod, container, run)` is the file of a run; None where there is none (yet).
    """

    def __init__(self, path_of: Callable[[Object, str, int], Path | None]) -> None:
        self._path_of = path_of

    def lines(self, pod: Object, container: str, run: int, begin: int) -> Sequence[LogLine]:
        path = self._path_of(pod, container, run)
        if path is None or not path.is_file():
            return []
        changed_s = path.stat().st_mtime
        return [LogLine(text, changed_s) for text in path.read_bytes().splitlines(keepends=True)[begin:]]


@dataclass(frozen=True, slots=True)
class LogQuery:
    """The options of a request for a log."""

    container: str | None
    previous: bool
    follow: bool
    timestamps: bool
    tail_lines: int | None
    limit_bytes: int | None

    @classmethod
    def of(cls, query: dict[str, str], pod: str) -> LogQuery:
        """Raises:
        Refusal: 422, a number that may not be.
        """
        numbers = {key: int(query[key]) if query.get(key) else None for key in ("tailLines", "limitBytes")}
        for key, value in numbers.items():
            least = 0 if key == "tailLines" else 1
            if value is not None and value < least:
                error = invalid_value(key, value, f"must be greater than or equal to {least}")
                raise _invalid(pod, error)
        flags = {key: query.get(key) in ("true", "1") for key in ("previous", "follow", "timestamps")}
        return cls(query.get("container"), **flags, tail_lines=numbers["tailLines"], limit_bytes=numbers["limitBytes"])


def _invalid(pod: str, error: FieldError) -> Refusal:
    message = f'PodLogOptions "{pod}" is invalid: {error.path}: {error.text}'
    return Refusal(422, message, "Invalid", {"name": pod, "kind": "PodLogOptions", "causes": [error.cause()]})


class LogReader:
    """Answers requests for logs: what a source has, for as long as the store says that the container runs."""

    def __init__(self, store: Store, source: LogSource, clock: Clock) -> None:
        self._store = store
        self._source = source
        self._clock = clock

    def read(self, pod: Object, query: LogQuery) -> Iterator[bytes] | None:
        """Returns the log in pieces, to its present end or, when followed, to the container's; None without a node.

        Raises:
            Refusal: 400, the container is not the pod's, or has no run that was asked for.
        """
        name = _container(pod, query)
        if not pod["spec"].get("nodeName"):
            return None
        restarts = _status(pod, name).get("restartCount", 0)
        if query.previous and restarts == 0:
            raise bad_request(f'previous terminated container "{name}" in pod "{pod["metadata"]["name"]}" not found\n')
        run = restarts - 1 if query.previous else restarts
        return _limited(self._pieces(pod, name, run, query), query.limit_bytes)

    def _pieces(self, pod: Object, container: str, run: int, query: LogQuery) -> Iterator[bytes]:
        begin = 0
        if query.tail_lines is not None:
            begin = max(0, len(self._source.lines(pod, container, run, 0)) - query.tail_lines)
        while True:
            # Asked before reading: what was written until the end is then surely read.
            ended = not query.follow or self._has_ended(pod, container, run)
            lines = self._source.lines(pod, container, run, begin)
            if lines and not ended and not lines[-1].text.endswith(b"\n"):
                lines = lines[:-1]
            begin += len(lines)
            yield b"".join(_stamped(line) if query.timestamps else line.text for line in lines)
            if ended:
                return
            if not lines:
                self._clock.wait(threading.Event(), _LOOK_AGAIN_S)

    def _has_ended(self, pod: Object, container: str, run: int) -> bool:
        metadata = pod["metadata"]
        found = self._store.list(POD, metadata["namespace"], fields=f"metadata.name={metadata['name']}").items
        if not found or found[0]["metadata"]["uid"] != metadata["uid"]:
            return True
        status = _status(found[0], container)
        return status.get("restartCount", 0) > run or "terminated" in (status.get("state") or {})


def _container(pod: Object, query: LogQuery) -> str:
    spec, pod_name = pod["spec"], pod["metadata"]["name"]
    names = [container["name"] for container in spec["containers"]]
    if query.container is None:
        if len(names) == 1:
            return str(names[0])
        listed = " ".join(names)
        initial = " ".join(container["name"] for container in spec.get("initContainers") or [])
        more = f" or one of the init containers: [{initial}]" if initial else ""
        raise bad_request(f"a container name must be specified for pod {pod_name}, choose one of: [{listed}]{more}")
    if query.container not in [*names, *(container["name"] for container in spec.get("initContainers") or [])]:
        raise bad_request(f"container {query.container} is not valid for pod {pod_name}")
    return query.container


def _status(pod: Object, container: str) -> Object:
    status = pod.get("status", {})
    found = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return next((entry for entry in found if entry["name"] == container), {})


def _stamped(line: LogLine) -> bytes:
    time = datetime.fromtimestamp(line.wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return time.encode() + b" " + line.text


def _limited(pieces: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    for piece in pieces:
        if limit is not None:
            piece, limit = piece[:limit], limit - len(piece[:limit])
        yield piece
        if limit == 0:
            return
