"""One slot of a node's volume: a payload file, its manifest, and the two locks that say who may touch it.

Invariant: a manifest lies beside a payload only while the payload is whole and nobody writes into it.

The payload of the manifest is the rank's share of the job. Behind it, from the next chunk border on, the file may have
a second payload with a manifest of its own: copies, for this node alone (ADR 0015). They are an extra. A slot holds its
snapshot with or without them, and they count only beside a share of the same snapshot.

`slot-K.lock` is held exclusively by the process that has the slot mapped for writing, for as long as any
mapping lives: in that process, in its forked children, and also while it is stopped. The system lets it go
when the last of them is dead, and that is the proof of death. `slot-K.lease` is held shared by readers, and
exclusively by the writer between taking and sealing. Both are flock(2): they need no clean-up and no clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ktrain import native
from ktrain.errors import (
    CapacityError,
    CorruptionError,
    ForbiddenError,
    InternalError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.format.digest import digest_text
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import copies_begin
from ktrain.snapshot import numa

_LOG = logging.getLogger(__name__)
_LOCK_TRIES = 3  # somebody who only looks holds a lock for microseconds; that is no writer
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM})
_PAGE_THREADS = 8
_SLOT_FILE = re.compile(r"slot-(0|[1-9][0-9]*)\.(?:safetensors|lock)")


@dataclass(frozen=True, slots=True)
class Held:
    """A sealed slot. What it says comes from the manifest, which is proven; the payload was not read."""

    rank: int
    identity: Identity
    nbytes: int
    manifest_digest: str
    slot: str


@dataclass(frozen=True, slots=True)
class SlotFiles:
    """The names of one slot's files."""

    folder: Path
    index: int

    @property
    def name(self) -> str:
        """The slot for people and reports: `rank-00003/slot-0`."""
        return f"{self.folder.name}/slot-{self.index}"

    @property
    def payload(self) -> Path:
        return self.folder / f"slot-{self.index}.safetensors"

    @property
    def manifest(self) -> Path:
        return self.folder / f"slot-{self.index}.manifest.json"

    @property
    def copies(self) -> Path:
        """The manifest of the copies behind the payload."""
        return self.folder / f"slot-{self.index}.copies.json"

    @property
    def unfinished_manifest(self) -> Path:
        """Where a manifest is written before it gets its name; only the slot's one writer touches it."""
        return self.folder / f".slot-{self.index}.manifest.tmp"

    @property
    def bad(self) -> Path:
        """The manifest of a copy that was proven bad."""
        return self.folder / f"slot-{self.index}.bad.json"

    @property
    def reason(self) -> Path:
        """Why the copy is bad, for people."""
        return self.folder / f"slot-{self.index}.bad.txt"

    @property
    def lock(self) -> Path:
        return self.folder / f"slot-{self.index}.lock"

    @property
    def lease(self) -> Path:
        return self.folder / f"slot-{self.index}.lease"


class SlotCalls:
    """The border to the system that tests replace: a full volume, and a stop after any step of a writer."""

    def near(self) -> frozenset[int]:
        """The processors to make a slot's pages on, asked each time that there are some to make; nothing for any."""
        return frozenset()

    def back(self, fd: int, begin: int, end: int) -> int:
        """Makes huge pages for that part of the file, as far as the system has them; the bytes that lie in them now.

        The file may be longer afterwards; what it lacks still is for `reserve`.
        """
        stat = os.fstatvfs(fd)
        if end - begin > stat.f_bavail * stat.f_frsize:
            return 0  # nothing is taken from others for what will not be whole
        os.ftruncate(fd, max(end, os.fstat(fd).st_size))
        return native.back_huge(fd, begin, end, num_threads=_threads())

    def reserve(self, fd: int, nbytes: int) -> None:
        """Makes the file at least `nbytes` long with every byte backed, or raises OSError."""
        os.posix_fallocate(fd, 0, nbytes)

    def reached(self, step: str) -> None:
        """Called after each step of a writer that a crash may follow."""


def slot_indices(folder: Path) -> list[int]:
    """The slots that a rank's folder has, in order; none where there is no folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted({int(match[1]) for name in names if (match := _SLOT_FILE.fullmatch(name))})


def is_full(error: OSError) -> bool:
    """Whether the error says that there is no room."""
    return error.errno in _FULL


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Gives the system's errors the class that says what the caller can do about them."""
    try:
        yield
    except OSError as error:
        if isinstance(error, KtrainError):
            raise  # a DeadlineError is a TimeoutError too
        code = errno.errorcode.get(error.errno or 0, "no code")
        said = f"{what}: {error.strerror or type(error).__name__} ({code})"
        if is_full(error):
            raise CapacityError(f"{said}; free space in the volume or use fewer slots") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ForbiddenError(f"{said}; the volume must belong to the user who trains") from error
        raise UnavailableError(f"{said}; see what holds the volume, then try again") from error


def try_flock(path: Path, operation: int) -> int | None:
    """A descriptor that holds the lock until it and its copies are closed, or None where another holds it."""
    for _ in range(_LOCK_TRIES):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            os.sched_yield()
            continue
        except BaseException:
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink > 0:
            return fd
        os.close(fd)  # the file was removed between opening and locking: this lock would guard nothing
    return None


def _threads() -> int:
    """Threads that make pages at a time."""
    return min(_PAGE_THREADS, len(os.sched_getaffinity(0)))


def allocated_nbytes(path: Path) -> int:
    """Bytes that the file takes from its file system; 0 where there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def payload_nbytes(files: SlotFiles) -> int:
    """The size of a slot's file; 0 where there is none."""
    try:
        return files.payload.stat().st_size
    except FileNotFoundError:
        return 0


class Slot:
    """A slot as its one writer has it. Locks, descriptors and mapping are kept between snapshots.

    Pages that exist already are what makes a snapshot fast, so a slot is only given up on purpose. Not safe
    for threads by itself: the volume lets one thread at a time have it.
    """

    def __init__(self, files: SlotFiles, calls: SlotCalls) -> None:
        self.files = files
        self._calls = calls
        self._lock_fd: int | None = None
        self._lease_fd: int | None = None
        self._payload_fd: int | None = None
        self._mapping: native.MappedFile | None = None
        self._leased = False
        self._beside: list[Path] = []

    @property
    def mapped_nbytes(self) -> int:
        """Size of the mapping; 0 while there is none."""
        return 0 if self._mapping is None else len(self._mapping)

    def try_lock(self) -> bool:
        """Makes this process the slot's writer; false where another living process is."""
        if self._lock_fd is None:
            self._lock_fd = try_flock(self.files.lock, fcntl.LOCK_EX)
        return self._lock_fd is not None

    def try_lease(self) -> bool:
        """Keeps readers out until `unlease`; false where one is reading."""
        if self._lease_fd is None:
            self._lease_fd = try_flock(self.files.lease, fcntl.LOCK_EX)
        else:
            try:
                fcntl.flock(self._lease_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        self._leased = self._lease_fd is not None
        if self._leased:
            self._calls.reached("leased")
            beside = self.files.copies, self.files.bad, self.files.reason
            self._beside = [path for path in beside if path.exists()]  # under the lease nobody adds one
        return self._leased

    def unlease(self) -> None:
        """Lets readers in again."""
        if self._leased and self._lease_fd is not None:
            fcntl.flock(self._lease_fd, fcntl.LOCK_UN)
            self._leased = False
            self._calls.reached("unleased")

    def map(self, nbytes: int) -> None:
        """Makes exactly `nbytes` of the payload file writable memory, with room for every byte.

        What can fail comes while a snapshot that lies here is still sealed; growing the file keeps its bytes.
        """
        assert self._lock_fd is not None
        if self.is_mapped(nbytes):
            return
        if self._payload_fd is not None and os.fstat(self._payload_fd).st_nlink == 0:
            os.close(self._payload_fd)  # removed behind our back: what is written there nobody would find
            self._payload_fd, self._mapping = None, None
        if self._payload_fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._payload_fd = os.open(self.files.payload, flags, 0o600)
        self._reserve(self._payload_fd, nbytes)
        self._calls.reached("grown")
        self._mapping = None
        mapping = native.map_file(self._payload_fd, nbytes, writable=True)
        # Every mapping keeps the lock by a descriptor of its own, closed when the last view of it is gone.
        weakref.finalize(mapping, os.close, os.dup(self._lock_fd)).atexit = False
        self._mapping = mapping
        self._calls.reached("mapped")

    def is_mapped(self, nbytes: int) -> bool:
        """Whether that much is mapped, of a file that is still there and that nobody has cut.

        To write behind the end of a file would end this process by SIGBUS.
        """
        if self._payload_fd is None or self.mapped_nbytes != nbytes:
            return False
        stat = os.fstat(self._payload_fd)
        return stat.st_nlink > 0 and stat.st_size >= nbytes

    def _reserve(self, fd: int, nbytes: int) -> None:
        before = os.fstat(fd)
        # Asking again for what is there would cost a walk over all pages: 0.1 s and more per 10 GB.
        if before.st_size >= nbytes and before.st_blocks * 512 >= nbytes:
            return
        try:
            with numa.running_on(self._calls.near()):
                huge = self._calls.back(fd, before.st_blocks * 512, nbytes)
                self._calls.reserve(fd, nbytes)
            _LOG.info("%s grew to %d bytes, of which %d lie in new huge pages", self.files.name, nbytes, huge)
        except OSError as error:
            os.ftruncate(fd, before.st_size)  # where the file system has no such call, half of it was written
            stat = os.fstatvfs(fd)
            error.strerror = (
                f"{error.strerror}: needs {nbytes} bytes, {before.st_blocks * 512} are its own "
                f"and {stat.f_bavail * stat.f_frsize} are free"
            )
            raise

    def unseal(self) -> None:
        """Takes back the promise that lay here, then cuts the file to the mapping's size."""
        assert self._leased and self._payload_fd is not None
        self.files.manifest.unlink(missing_ok=True)
        self._calls.reached("unsealed")
        for path in self._beside:
            path.unlink(missing_ok=True)
        if os.fstat(self._payload_fd).st_size > self.mapped_nbytes:
            os.ftruncate(self._payload_fd, self.mapped_nbytes)
            self._calls.reached("cut")

    def seal(self, data: bytes, copies: bytes | None = None) -> None:
        """Gives the manifests their names, each in one step, after the payloads are complete: the share's last."""
        if copies is not None:
            self._write(copies, self.files.copies)
            self._calls.reached("copies-sealed")
        self._write(data, self.files.manifest)
        self._calls.reached("sealed")

    def _write(self, data: bytes, manifest: Path) -> None:
        try:
            self.files.unfinished_manifest.write_bytes(data)
        except OSError:
            self.files.unfinished_manifest.unlink(missing_ok=True)
            raise
        self._calls.reached("manifest-written")
        os.replace(self.files.unfinished_manifest, manifest)

    def prefault(self) -> None:
        """Makes every mapped page present; changes no byte."""
        if self._mapping is not None:
            native.prefault(self._mapping, num_threads=_threads())

    def view(self) -> memoryview:
        assert self._mapping is not None
        return memoryview(self._mapping)

    def close(self) -> None:
        """Gives the slot up. The lock goes when the last view of its memory is gone."""
        self._mapping = None
        self._leased = False
        for fd in (self._payload_fd, self._lease_fd, self._lock_fd):
            if fd is not None:
                os.close(fd)
        self._payload_fd = self._lease_fd = self._lock_fd = None


class SlotWriter:
    """A slot between taking and sealing; nobody else reads or writes it meanwhile. From one thread at a time.

    As a context manager it abandons what was not sealed.
    """

    def __init__(self, slot: Slot, rank: int, run: str, *, ended: Callable[[Held | None], None]) -> None:
        self._slot = slot
        self._rank = rank
        self._run = run
        self._ended = ended
        self._open = True
        self.memory = slot.view()
        """Writable, exactly as long as asked for; not to be touched after `seal` or `abandon`."""

    @property
    def slot(self) -> str:
        return self._slot.files.name

    def seal(self, manifest: Manifest, copies: Manifest | None = None) -> Held:
        """Makes the snapshot exist; the payload is complete before the call.

        Args:
            copies: of the payload that lies behind the share, from `copies_begin` on.

        Raises:
            CapacityError: the volume has no room for the manifest.
            InternalError: a manifest is of another snapshot, or the writer has ended.
            In each case nothing is sealed and the slot is abandoned.
        """
        self._require_open()
        expected = (self._rank, self._run, len(self.memory))
        try:
            found = (manifest.rank, manifest.identity.run, _slot_nbytes(manifest, copies))
            if found != expected or (copies is not None and _is_of(copies) != _is_of(manifest)):
                raise InternalError(f"seal {self.slot}: expected rank, run, bytes {expected}, found {found}")
            data, beside = manifest.to_bytes(), None if copies is None else copies.to_bytes()
            with translated(f"seal step {manifest.identity.step} of rank {self._rank} in {self.slot}"):
                self._slot.seal(data, beside)
        except KtrainError:
            self.abandon()
            raise
        held = Held(self._rank, manifest.identity, manifest.nbytes, digest_text(data), self.slot)
        self._end(held)
        return held

    def abandon(self) -> None:
        """Leaves the slot without a snapshot. Ending twice, or after `seal`, is fine."""
        if self._open:
            self._end(None)

    def _end(self, held: Held | None) -> None:
        self._open = False
        with contextlib.suppress(BufferError):  # a caller's own views of it are the caller's to keep unused
            self.memory.release()
        self._slot.unlease()
        self._ended(held)

    def _require_open(self) -> None:
        if not self._open:
            raise InternalError(f"{self.slot}: its writer was sealed or abandoned before; acquire a slot again")

    def __enter__(self) -> SlotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _slot_nbytes(manifest: Manifest, copies: Manifest | None) -> int:
    """Bytes of a slot with these payloads."""
    if copies is None:
        return manifest.nbytes
    return copies_begin(manifest.nbytes, manifest.chunk_nbytes) + copies.nbytes


def _is_of(manifest: Manifest) -> tuple[int, Identity]:
    return manifest.rank, manifest.identity


def read_copies(files: SlotFiles, share: Manifest) -> Manifest:
    """The manifest of the copies behind a share, while the slot is under lease.

    Raises:
        NotFoundError: there are none, or they are of another snapshot: whoever wrote the share knew nothing of copies.
        CorruptionError: the manifest is damaged.
    """
    try:
        copies = Manifest.from_bytes(files.copies.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{files.name}: it has no copies") from None
    if _is_of(copies) != _is_of(share):
        raise NotFoundError(f"{files.name}: its copies are of rank {copies.rank}, {copies.identity}")
    return copies


class SlotReader:
    """A payload of a sealed slot under lease: nobody overwrites it until this is closed and all its views are gone.

    `begin` is where the payload of the manifest begins in the slot's file.
    """

    def __init__(self, files: SlotFiles, manifest: Manifest, lease_fd: int, begin: int = 0) -> None:
        """Takes over `lease_fd`, also when it raises."""
        try:
            fd = os.open(files.payload, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                nbytes = os.fstat(fd).st_size
                if nbytes < begin + manifest.nbytes:
                    raise CorruptionError(
                        f"{files.payload}: expected a payload of {manifest.nbytes} bytes at byte {begin}, the file has "
                        f"{nbytes}; try another copy"
                    )
                mapping = native.map_file(fd, begin + manifest.nbytes, writable=False)
            finally:
                os.close(fd)
        except BaseException:
            os.close(lease_fd)
            raise
        weakref.finalize(mapping, os.close, lease_fd).atexit = False
        self.manifest = manifest
        self.slot = files.name
        self._memory: memoryview | None = memoryview(mapping)[begin:]

    @property
    def memory(self) -> memoryview:
        """The payload, read-only and not verified: a digest proves it, not the lease."""
        if self._memory is None:
            raise InternalError(f"{self.slot}: read after its reader was closed")
        return self._memory

    def close(self) -> None:
        """Ends the lease, as soon as no view of the memory is left. Closing twice is fine."""
        self._memory = None

    def __enter__(self) -> SlotReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
