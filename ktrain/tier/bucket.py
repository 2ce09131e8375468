"""Tiers in any store that fsspec reaches.

A filesystem object of fsspec is owned by one call at a time and used by the next one only after a clean
answer: all of them share one event loop and hold sessions, so one that hangs would take the others with it.
Each has a loop of its own here, and a call that ran late is cancelled by ending its loop. No instance cache,
no listings cache: what another process wrote a second ago must be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import fsspec.config

from ktrain.abc.proven import Chunks, Terms
from ktrain.abc.tier import Buffer, Stored, Tier, check_name, check_prefix
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError, Retries, RetryBudget
from ktrain.base.settings import Timeouts
from ktrain.base.urls import public_url
from ktrain.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    KtrainError,
    NotFoundError,
)
from ktrain.tier.answers import showable, translate, translate_write
from ktrain.tier.connection import Connection
from ktrain.tier.deadline import BoundedCalls, Call
from ktrain.tier.parts import copy_proven, part_nbytes, sample_chunks
from ktrain.tier.s3 import PART_NBYTES, Upload
from ktrain.tier.s3_reads import RangeRead
from ktrain.tier.s3_store import S3Store

_T = TypeVar("_T")
_S3 = ("s3", "s3a")
_PAYLOADS_PER_READ_BACK = 8
_RANGE_NBYTES = 32 << 20
S3_RANGE_NBYTES = 96 << 20
"""Of one read, which may become several requests: a server near by may digest a whole object for each (rclone)."""
_CALL_TRIES = 4  # of one small call; what lasts longer is for its caller to judge
_PART_TRIES = 8  # of one request of a large write: some 10 s in all
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
        self._shows_whole = getattr(filesystem, "shows_whole", self._protocol in (*_S3, "memory"))
        self._calls = BoundedCalls()
        self._lock = threading.Lock()
        self._idle: list[Connection] = []  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._creates: bool | None = None  # None: not probed yet
        self._num_proven = 0  # payloads written with their proof; guarded by _lock
        self._patience_s = timeouts.storage_s
        self.s3 = S3Store(self._root.partition("/")[2])  # what is known of it, where it is one
        self._retries = Retries(RetryBudget(), max_tries=_CALL_TRIES)

    @property
    def supports_create(self) -> bool:
        return bool(self._creates)

    @property
    def shows_whole(self) -> bool:
        """True where an object is seen whole or not at all, so that writing equal bytes twice is seen by nobody."""
        return bool(self._shows_whole)

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        self._write(name, memoryview(data).cast("B"), None, deadline)

    def write_proven(self, name: str, data: Buffer, terms: Terms, *, deadline: Deadline) -> None:
        """See `ktrain.abc.proven.ProvesWrites`."""
        view = memoryview(data).cast("B")
        self._write(name, view, terms, deadline)
        if self._protocol in _S3 or not self._is_read_back():
            return  # S3: done by the upload, where the store does not compare digests itself
        size, what = terms.chunks.chunk_nbytes, f"{self.kind} tier {self.url}: {name}"
        for index in sample_chunks(view.nbytes, size):
            begin, end = index * size, min((index + 1) * size, view.nbytes)
            terms.pace.take(end - begin, deadline=deadline)
            terms.chunks.check_stored(self.read_range(name, begin, end, deadline=deadline), begin, view.nbytes, what)

    def _write(self, name: str, view: memoryview, terms: Terms | None, deadline: Deadline) -> None:
        path = self._path(check_name(name))
        if self._protocol in _S3:
            upload = functools.partial(self._upload, path=path, view=view, terms=terms, deadline=deadline)
            self._ask_once("write", name, upload, deadline)
        elif terms is None and view.nbytes <= 2 * PART_NBYTES:
            self._ask("write", name, lambda fs, call: _pipe(fs, path, bytes(view)), deadline)
        else:
            self._ask_once("write", name, lambda fs, call: _stream(fs, call, path, view, terms, deadline), deadline)

    def _upload(
        self, fs: Any, call: Call, *, path: str, view: memoryview, terms: Terms | None, deadline: Deadline
    ) -> None:
        bucket, _, key = path.partition("/")
        retries = self._retries if terms is None else Retries(terms.retries, max_tries=_PART_TRIES)
        checked = terms is not None and self.s3.compares_digests(fs, call, bucket, self._retries, deadline)
        requests = self.s3.requests(fs, call) if terms is None else self.s3.payload_requests(fs, call)
        upload = Upload(bucket, key, call, terms, retries, self.s3.shapes, deadline, checked, self._patience_s)
        try:
            upload.put(requests, view)
            if terms is not None and not checked and self._is_read_back():
                upload.read_back(requests, view.nbytes)
        except NotFoundError as error:  # of an upload or a bucket: nothing is "not found" by a write
            raise translate_write(error, call.what) from error

    def _is_read_back(self) -> bool:
        """Whether a sample of the payload just written is to be read back: of the first one, then of each eighth.

        What a store does wrong by habit shows in the first. Some stores digest the whole object before its first byte
        is read, which took as long as the upload (rclone, 2026-11-25).
        """
        with self._lock:
            self._num_proven += 1
            return self._num_proven % _PAYLOADS_PER_READ_BACK == 1

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

    @property
    def range_nbytes(self) -> int:
        """See `ktrain.abc.tier.ReadsInPieces`."""
        return S3_RANGE_NBYTES if self._protocol in _S3 else _RANGE_NBYTES

    def read_pieces(
        self,
        name: str,
        bounds: tuple[int, int],
        take: Callable[[int, memoryview], None],
        *,
        piece_nbytes: int,
        deadline: Deadline,
    ) -> None:
        """See `ktrain.abc.tier.ReadsInPieces`. From S3 a piece is taken as soon as it has arrived."""
        begin, end = bounds
        if begin == end:
            return
        if self._protocol not in _S3:
            data = memoryview(self.read_range(name, begin, end, deadline=deadline))
            for at in range(0, data.nbytes, piece_nbytes):
                take(begin + at, data[at : at + piece_nbytes])
            return
        bucket, _, key = self._path(check_name(name)).partition("/")

        def read(fs: Any, call: Call) -> None:
            requests = self.s3.requests(fs, call)
            reading = RangeRead(requests, {"Bucket": bucket, "Key": key}, call, take, piece_nbytes)
            reading.run(bounds, self.s3.streams, self._retries, deadline)

        self._ask_once(f"read [{begin}, {end}) of", name, read, deadline)

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
        self.s3.close()
        self._calls.close()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, verb: str, name: str, work: Callable[[Any, Call], _T], deadline: Deadline) -> _T:
        """A call that may be made again where the store was busy."""
        return self._retries.run(lambda: self._ask_once(verb, name, work, deadline), deadline=deadline)

    def _ask_once(self, verb: str, name: str, work: Callable[[Any, Call], _T], deadline: Deadline) -> _T:
        """One call on a filesystem object that nobody else uses meanwhile."""
        what = f"{self.kind} tier {self.url}: {verb} {name}"
        with self._lock:
            connection = self._idle.pop() if self._idle else Connection(self._new, is_async=self._is_async)
        meaning = translate_write if verb in ("write", "create") else translate
        clean = False
        try:
            result = self._calls.run(what, lambda call: self._work(connection, work, call, meaning), deadline=deadline)
            clean = True
            return result
        except (NotFoundError, ConflictError):
            clean = True
            raise
        except BusyError as error:
            clean = error.answered
            raise
        finally:
            self._put_back(connection, clean)

    def _work(
        self,
        connection: Connection,
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

    def _put_back(self, connection: Connection, clean: bool) -> None:
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
            **configured,
            "retries": {"total_max_attempts": 1},  # the tier tries again itself, under a budget (ADR 0013)
        }

    def new(loop: asyncio.AbstractEventLoop | None) -> Any:
        made = filesystem(**options) if loop is None else filesystem(loop=loop, **options)
        if "retries" in vars(type(made)):
            made.retries = 1  # s3fs's own tries; the tier tries again itself
        return made

    return new


def _pipe(fs: Any, path: str, data: bytes) -> None:
    fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, data)


def _stream(fs: Any, call: Call, path: str, view: memoryview, terms: Terms | None, deadline: Deadline) -> None:
    """Writes in pieces: the whole must not be copied."""
    chunks: Chunks | None = None if terms is None else terms.chunks
    size = part_nbytes(1, PART_NBYTES, 1, 1 if chunks is None else chunks.chunk_nbytes)
    fs.makedirs(fs._parent(path), exist_ok=True)
    file = fs.open(path, "wb")
    try:
        for begin in range(0, view.nbytes, size):
            call.check()
            source = view[begin : begin + size]
            piece = bytearray(source.nbytes)  # a new one for each: the client may keep it
            copy_proven(memoryview(piece), source, begin, chunks=chunks, of=(view.nbytes, call.what))
            if terms is not None:
                terms.pace.take(source.nbytes, deadline=deadline)
            file.write(piece)
            if terms is not None:
                terms.sent(source.nbytes)
        call.check()
    except BaseException:
        _abandon(file)
        raise
    file.close()


def _abandon(file: Any) -> None:
    """Has a file end without being closed, at the end of its life either: that would show a part as the whole."""
    with contextlib.suppress(Exception):  # most have nothing to throw away; what the store keeps of it is invisible
        file.discard()
    with contextlib.suppress(AttributeError):  # a file of the system, in which the part is seen already
        file.closed = True


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
