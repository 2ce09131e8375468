"""Archives of code beside the run, named by their digests: sent, fetched, removed (ADR 0043).

Invariant: an archive is taken for whole only where its record says so, which is written after every byte was read back;
and whoever fetches one proves its digest all the same. Order is told by numbers in the records, never by clocks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.faults import FaultPoints
from ktrain.errors import ConflictError, CorruptionError, NotFoundError
from ktrain.launcher.code.archive import CodeArchive

KEEP = 5  # archives that stay: the newest ones, whatever is collected
_FORMAT = 1
_PIECE = 16 << 20
_NAME = re.compile(rf"{contract.CODE_DIR}/([0-9a-f]{{64}})\.(zip|json|doomed)")


class Listed(Protocol):
    """One object of a listing."""

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


class Store(Protocol):
    """What is asked of the run's storage; `ktrain.abc.tier.Tier` is one. Errors are ktrain's."""

    def write(self, name: str, data: bytes, *, deadline: Deadline) -> None: ...
    def read(self, name: str, *, deadline: Deadline) -> bytes: ...
    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes: ...
    def list(self, prefix: str, *, deadline: Deadline) -> Sequence[Listed]: ...
    def delete(self, name: str, *, deadline: Deadline) -> None: ...


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one archive."""

    sha256: str
    size: int
    number: int  # of the launch that sent or used it last: more than that of every launch before
    is_whole: bool  # False from before the first byte is sent

    def to_bytes(self) -> bytes:
        value = {"format": _FORMAT, "size": self.size, "number": self.number, "whole": self.is_whole}
        return json.dumps(value).encode()


@dataclass(frozen=True, slots=True)
class Shelf:
    """What lies there. `doubts`: objects that this ktrain cannot read, or did not name."""

    records: Mapping[str, Record]  # by digest
    archives: Mapping[str, int]  # bytes, by digest
    doomed: frozenset[str] = frozenset()  # digests that a collector is about to remove
    doubts: tuple[str, ...] = ()

    @property
    def next_number(self) -> int:
        return 1 + max((record.number for record in self.records.values()), default=0)

    def is_whole(self, sha256: str, size: int) -> bool:
        record = self.records.get(sha256)
        return record is not None and record.is_whole and record.size == size == self.archives.get(sha256)


@dataclass(frozen=True, slots=True)
class Removal:
    """Archives that no launch of late has used."""

    records: tuple[Record, ...] = ()  # as they were seen
    doubts: tuple[str, ...] = ()  # where there are any nothing is removed

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(record.sha256 for record in self.records)


def archive_name(sha256: str) -> str:
    """`code/<digest>.zip`."""
    return f"{contract.CODE_DIR}/{sha256}.zip"


def record_name(sha256: str) -> str:
    """`code/<digest>.json`."""
    return f"{contract.CODE_DIR}/{sha256}.json"


def _doomed_name(sha256: str) -> str:
    return f"{contract.CODE_DIR}/{sha256}.doomed"


def send(store: Store, archive: CodeArchive, *, faults: FaultPoints, deadline: Deadline) -> bool:
    """Makes sure that the archive is there, whole; returns whether its bytes had to be sent.

    Raises:
        CorruptionError: the store gave back other bytes than it was given.
        ConflictError: a collector removed the archive while it was sent; nothing says that it is there.
        KtrainError: the store could not be asked.
    """
    shelf = look(store, deadline=deadline)
    sha256, size = archive.sha256, len(archive.data)
    if shelf.is_whole(sha256, size):
        used = shelf.records[sha256]
        if used.number < shelf.next_number - 1:
            _write(store, Record(sha256, size, shelf.next_number, is_whole=True), deadline)
            _expect_kept(store, sha256, size, deadline)
        return False
    _write(store, Record(sha256, size, shelf.next_number, is_whole=False), deadline)
    faults.reached("code.archive")
    store.write(archive_name(sha256), archive.data, deadline=deadline)
    found = hashlib.sha256()
    for piece in _pieces(store, sha256, size, deadline):
        found.update(piece)
    if found.hexdigest() != sha256:
        raise CorruptionError(
            f"{archive_name(sha256)}: the store gave back other bytes than it was given (SHA-256 {found.hexdigest()}); "
            "launch again"
        )
    faults.reached("code.record")
    _write(store, Record(sha256, size, shelf.next_number, is_whole=True), deadline)
    _expect_kept(store, sha256, size, deadline)
    return True


def _expect_kept(store: Store, sha256: str, size: int, deadline: Deadline) -> None:
    """Raises ConflictError where a collector has not seen that this launch needs the archive (ADR 0043)."""
    shelf = look(store, deadline=deadline)
    if sha256 in shelf.doomed or not shelf.is_whole(sha256, size):
        raise ConflictError(
            f"{archive_name(sha256)}: `ktrain ckpt gc` removed it, or is about to; launch again, or run that again "
            "where it did not end"
        )


def fetch(store: Store, sha256: str, size: int, file: BinaryIO, *, deadline: Deadline) -> None:
    """Writes the archive's bytes to a file, as many as were promised; its digest is for the reader to prove.

    Raises:
        NotFoundError: it is surely not there.
        CorruptionError: it is shorter.
        KtrainError: the store could not be asked.
    """
    try:
        for piece in _pieces(store, sha256, size, deadline):
            file.write(piece)
    except NotFoundError as error:
        raise NotFoundError(f"code archive {archive_name(sha256)}: {error}; launch again with --code") from error


def _pieces(store: Store, sha256: str, size: int, deadline: Deadline) -> Iterator[bytes]:
    for begin in range(0, size, _PIECE):
        yield store.read_range(archive_name(sha256), begin, min(begin + _PIECE, size), deadline=deadline)


def _write(store: Store, record: Record, deadline: Deadline) -> None:
    store.write(record_name(record.sha256), record.to_bytes(), deadline=deadline)


def look(store: Store, *, deadline: Deadline) -> Shelf:
    """What lies beside the run now."""
    records: dict[str, Record] = {}
    archives: dict[str, int] = {}
    doomed, doubts = set(), []
    for item in store.list(contract.CODE_DIR, deadline=deadline):
        named = _NAME.fullmatch(item.name)
        if named is None:
            doubts.append(f"{item.name}: ktrain gives no such name")
        elif named[2] == "zip":
            archives[named[1]] = item.nbytes
        elif named[2] == "doomed":
            doomed.add(named[1])
        else:
            try:
                record = _parse(named[1], store.read(item.name, deadline=deadline))
            except NotFoundError:
                continue  # removed since the listing
            if record is None:
                doubts.append(f"{item.name}: it cannot be read: damaged, or of a newer ktrain")
            else:
                records[named[1]] = record
    return Shelf(records, archives, frozenset(doomed), tuple(doubts))


def _parse(sha256: str, data: bytes) -> Record | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return None
    size, number, whole = value.get("size"), value.get("number"), value.get("whole")
    if type(size) is not int or type(number) is not int or type(whole) is not bool or size <= 0 or number <= 0:
        return None
    return Record(sha256, size, number, whole)


def plan_removal(shelf: Shelf, *, keep: int = KEEP) -> Removal:
    """The archives of all launches but the newest `keep`, uploads that were cut off among them. Pure.

    An archive without a record stays: nobody can say when it came. Launches of one number are kept together.
    """
    if shelf.doubts:
        return Removal(doubts=shelf.doubts)
    numbers = sorted({record.number for record in shelf.records.values()}, reverse=True)
    kept = set(numbers[:keep])
    gone = [record for record in shelf.records.values() if record.number not in kept]
    return Removal(tuple(sorted(gone, key=lambda record: record.number)))


def remove(store: Store, removal: Removal, *, deadline: Deadline) -> list[str]:
    """Removes archives, for whoever holds the run; returns the digests of those that are gone.

    Marks first, then a second look: of a launch and a collector that meet, one sees the other's word (ADR 0012). First
    goes the record, so that nothing says of a removed archive that it is there; last the mark.
    """
    for sha256 in look(store, deadline=deadline).doomed:
        store.delete(_doomed_name(sha256), deadline=deadline)  # of a collector that died: nobody else holds the run
    for record in removal.records:
        store.write(_doomed_name(record.sha256), b"{}", deadline=deadline)
    now = look(store, deadline=deadline).records if removal.records else {}
    gone = [record.sha256 for record in removal.records if now.get(record.sha256) == record]
    for sha256 in gone:
        store.delete(record_name(sha256), deadline=deadline)
        store.delete(archive_name(sha256), deadline=deadline)
    for record in removal.records:
        store.delete(_doomed_name(record.sha256), deadline=deadline)
    return gone
