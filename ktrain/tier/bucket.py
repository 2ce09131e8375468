"""Tiers in any store that fsspec reaches.

A filesystem object of fsspec is owned by one call at a time and used by the next one only after a clean
answer: all of them share one event loop and hold sessions, so one that hangs would take the others with it.
Each has a loop of its own here, and a call that ran late is cancelled by ending its loop. No instance cache,
no listings cache: what another process wrote a second ago must be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import fsspec.config

from ktrain.abc.tier import Buffer, Stored, Tier, check_name, check_prefix
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.base.urls import public_url
from ktrain.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.tier.answers import showable, translate, translate_write
from ktrain.tier.deadline import BoundedCalls, Call

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_S3 = ("s3", "s3a")
_PART_NBYTES = 16 << 20  # a part is copied once to bytes; parts in flight bound the copy
_NUM_PARTS_IN_FLIGHT = 8
_MAX_NUM_PARTS = 9_000  # S3 takes 10,000
_CLOSE_S = 1.0
_CANCEL_S = 0.05
_MEMORY = threading.Lock()  # memory:// hands one seekable object to all its readers


def open_bucket(url: str, protocol: str, *, kind: str, timeouts: Timeouts) -> Tier:
    """The tier at a URL of a store that is not the local file system.

    Raises:
        ConfigError: fsspec knows no such protocol, or the package for it is not installed.
    """
    try:
        filesystem = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{public_url(url)}: {error}; install the package for {protocol}:// or correct it") from error
    return BucketTier(url, filesystem, kind=kind, timeouts=timeouts)


class BucketTier:
    """Objects below a URL of fsspec.

    An upload in parts that was cut off leaves parts behind that no listing shows: give the bucket a
    lifecycle rule that ends unfinished uploads after some days.
    """

    def __init__(self, url: str, filesystem: Any, *, kind: str, timeouts: Timeouts) -> None:
        self.kind = kind
        self.url = public_url(url).rstrip("/")
        self._protocol = url.partition(":")[0]
        self._root = str(filesystem._strip_protocol(url)).rstrip("/")
        self._new = _factory(url, filesystem, timeouts)
        self._is_async = bool(filesystem.async_impl)
        self._calls = BoundedCalls()
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._creates: bool | None = None  # None: not probed yet

    @property
    def supports_create(self) -> bool:
        return bool(self._creates)

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        path = self._path(check_name(name))
        view = memoryview(data).cast("B")
        if self._protocol in _S3:
            part = max(_PART_NBYTES, -(-view.nbytes // _MAX_NUM_PARTS))
            body: Any = bytes(view) if view.nbytes < 2 * part else _Parts(view)
            options = {"chunksize": part, "max_concurrency": _NUM_PARTS_IN_FLIGHT}
            self._ask("write", name, lambda fs, call: fs.pipe_file(path, body, **options), deadline)
        elif view.nbytes <= 2 * _PART_NBYTES:
            self._ask("write", name, lambda fs, call: _pipe(fs, path, bytes(view)), deadline)
        else:
            self._ask("write", name, lambda fs, call: _stream(fs, call, path, view), deadline)

    def create(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        check_name(name)
        if self._protocol in _S3 and self._creates is None:
            self._creates = self._probe(deadline)
        if self._creates:
            self._create(name, bytes(data), deadline)
            return
        try:
            self.read(name, deadline=deadline)
        except NotFoundError:
            pass
        else:
            raise ConflictError(f"{self.kind} tier {self.url}: create {name}: the object is there already")
        self.write(name, data, deadline=deadline)
        if self.read(name, deadline=deadline) != data:
            raise ConflictError(f"{self.kind} tier {self.url}: create {name}: another writer's bytes are there now")

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        path = self._path(check_name(name))
        # One request: s3fs otherwise asks for the size first, and that answer cannot tell a lost bucket from
        # a lost key.
        options = {"max_concurrency": 1} if self._protocol in _S3 else {}
        return bytes(self._ask("read", name, lambda fs, call: fs.cat_file(path, **options), deadline))

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        path = self._path(check_name(name))
        if begin == end:
            return b""
        verb = f"read [{begin}, {end}) of"
        data: bytes = self._ask(verb, name, lambda fs, call: fs.cat_file(path, start=begin, end=end), deadline)
        if len(data) != end - begin:
            raise CorruptionError(
                f"{self.kind} tier {self.url}: {verb} {name}: expected {end - begin} bytes,"
                f" found {len(data)}; try another copy"
            )
        return data

    def list(self, prefix: str, *, deadline: Deadline) -> list[Stored]:
        prefix = check_prefix(prefix)
        path = self._path(prefix)
        find = _find if self._protocol in (*_S3, "memory") else _descend
        found = self._ask("list", prefix or "all", lambda fs, call: find(fs, call, path), deadline)
        start = f"{self._root}/"
        below = path + "/" if prefix else start
        return sorted(
            (Stored(name[len(start) :], nbytes) for name, nbytes in found if name.startswith(below)),
            key=lambda stored: stored.name,
        )

    def delete(self, name: str, *, deadline: Deadline) -> None:
        path = self._path(check_name(name))
        try:
            self._ask("delete", name, lambda fs, call: fs.rm_file(path), deadline)
        except NotFoundError:
            return

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._calls.close()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, verb: str, name: str, work: Callable[[Any, Call], _T], deadline: Deadline) -> _T:
        """One call on a filesystem object that nobody else uses meanwhile."""
        what = f"{self.kind} tier {self.url}: {verb} {name}"
        with self._lock:
            connection = self._idle.pop() if self._idle else _Connection(self._new, is_async=self._is_async)
        meaning = translate_write if verb in ("write", "create") else translate
        clean = False
        try:
            result = self._calls.run(what, lambda call: self._work(connection, work, call, meaning), deadline=deadline)
            clean = True
            return result
        except (NotFoundError, ConflictError):
            clean = True
            raise
        finally:
            self._put_back(connection, clean)

    def _work(
        self,
        connection: _Connection,
        work: Callable[[Any, Call], _T],
        call: Call,
        meaning: Callable[[Exception, str], KtrainError],
    ) -> _T:
        connection.free.clear()
        try:
            call.check()
            if self._protocol == "memory":
                with _MEMORY:
                    return work(connection.filesystem(), call)
            return work(connection.filesystem(), call)
        except KtrainError:
            raise
        except Exception as error:  # noqa: BLE001 -- top of the call's thread; any client library may stand behind it
            raise meaning(error, call.what) from showable(error)
        finally:
            connection.free.set()

    def _put_back(self, connection: _Connection, clean: bool) -> None:
        with self._lock:
            keep = clean and not self._closed
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def _create(self, name: str, data: bytes, deadline: Deadline) -> None:
        path = self._path(name)
        self._ask("create", name, lambda fs, call: fs.pipe_file(path, data, mode="create"), deadline)

    def _probe(self, deadline: Deadline) -> bool:
        """Whether the store refuses the second of two creates. Some take the condition and overwrite."""
        name = f".ktrain-probe-{ids.random_id()}"
        try:
            self._create(name, b"first", deadline)
            self._create(name, b"second", deadline)
            refuses = False
        except ConflictError:
            refuses = True
        except ConfigError:
            return False  # the store says that it does not know the condition; nothing was written
        with contextlib.suppress(KtrainError):  # a bucket that forbids deletion keeps the probe
            self.delete(name, deadline=deadline)
        return refuses


class _Parts:
    """A buffer that is copied one part at a time: botocore takes bytes only, and a snapshot is large."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def __len__(self) -> int:
        return self._view.nbytes

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._view[part])


class _Connection:
    """A filesystem object with an event loop of its own, so that it can be ended without hurting another."""

    def __init__(self, new: Callable[[asyncio.AbstractEventLoop | None], Any], *, is_async: bool) -> None:
        self._new = new
        self._is_async = is_async
        self._loop: asyncio.AbstractEventLoop | None = None  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self.free = threading.Event()  # no call's thread is using the object
        self.free.set()

    def filesystem(self) -> Any:
        """The object, made at its first use: that may take a while, so it happens on the call's thread."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the connection is closed")
            if self._is_async and self._loop is None:
                self._loop = asyncio.new_event_loop()
                turn = threading.Thread(target=self._turn, args=(self._loop,), name="ktrain-tier-loop", daemon=True)
                turn.start()
        if self._filesystem is None:
            self._filesystem = self._new(self._loop)
        return self._filesystem

    def close(self) -> None:
        """Cancels what still runs and ends the loop; returns at once. A thread that waits for it wakes up."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._closed = True

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()  # until close()
        try:
            loop.run_until_complete(self._cancel_until_free())
            client = getattr(self._filesystem, "_s3", None)
            if client is not None:
                loop.run_until_complete(asyncio.wait_for(client.close(), _CLOSE_S))
        except Exception:  # noqa: BLE001 -- top of a thread; the process's end closes what is left open
            _LOG.debug("a connection was not closed in order", exc_info=True)
        finally:
            self._filesystem = None
            loop.close()

    async def _cancel_until_free(self) -> None:
        """Cancels also what begins late: a call that was still making the object would wait for ever otherwise."""
        await _cancel_all()
        while not self.free.is_set():
            await asyncio.sleep(_CANCEL_S)
            await _cancel_all()


async def _cancel_all() -> None:
    """Cancels what has begun: a task cancelled before it began runs no `finally`, so it never wakes its thread."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and _has_begun(task)]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_S)


def _has_begun(task: asyncio.Task[Any]) -> bool:
    coroutine = task.get_coro()
    return not inspect.iscoroutine(coroutine) or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED


def _factory(url: str, filesystem: Any, timeouts: Timeouts) -> Callable[[asyncio.AbstractEventLoop | None], Any]:
    options = dict(filesystem._get_kwargs_from_urls(url))
    options.update(skip_instance_cache=True, use_listings_cache=False)
    if filesystem.protocol in _S3 or set(_S3) & set(filesystem.protocol):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {
            # Digests of ours cover every byte. Stores that do not know the checksums of newer clients send
            # back bytes that these clients then refuse (rclone, 2026-11-23).
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "connect_timeout": max(1.0, timeouts.storage_s / 3),
            "read_timeout": timeouts.storage_s,
            "retries": {"max_attempts": 2, "mode": "standard"},
            **configured,
        }

    def new(loop: asyncio.AbstractEventLoop | None) -> Any:
        return filesystem(**options) if loop is None else filesystem(loop=loop, **options)

    return new


def _pipe(fs: Any, path: str, data: bytes) -> None:
    fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, data)


def _stream(fs: Any, call: Call, path: str, view: memoryview) -> None:
    """Writes in pieces: the whole must not be copied."""
    fs.makedirs(fs._parent(path), exist_ok=True)
    file = fs.open(path, "wb")
    for begin in range(0, view.nbytes, _PART_NBYTES):
        call.check()  # on the way out the file stays open: closing it would show a part as the whole
        file.write(bytes(view[begin : begin + _PART_NBYTES]))
    call.check()
    file.close()


def _find(fs: Any, call: Call, path: str) -> list[tuple[str, int]]:
    try:
        found = fs.find(path, detail=True)
    except FileNotFoundError as error:
        _raise_unless_absent(error, call)
        return []
    return [(name, int(info["size"])) for name, info in found.items() if info["type"] == "file"]


def _descend(fs: Any, call: Call, path: str) -> list[tuple[str, int]]:
    """Like `_find` for stores whose own `find` leaves out folders that it could not read."""
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError as error:
        _raise_unless_absent(error, call)
        return []
    found: list[tuple[str, int]] = []
    for entry in entries:
        call.check()
        if entry["type"] == "directory" and entry["name"].rstrip("/") != path:
            found.extend(_descend(fs, call, entry["name"].rstrip("/")))
        elif entry["type"] == "file":
            found.append((entry["name"], int(entry["size"])))
    return found


def _raise_unless_absent(error: FileNotFoundError, call: Call) -> None:
    """A folder that is not there is empty; a bucket that is not there is not."""
    meant = translate(error, call.what)
    if not isinstance(meant, NotFoundError):
        raise meant from showable(error)
