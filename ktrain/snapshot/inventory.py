"""What a node's volume holds, found by looking: the recovery after any death."""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ktrain.base import contract
from ktrain.errors import KtrainError
from ktrain.format.digest import digest_text
from ktrain.format.manifest import Identity, Manifest
from ktrain.snapshot.slots import (
    Held,
    SlotFiles,
    allocated_nbytes,
    payload_nbytes,
    slot_indices,
    translated,
    try_flock,
)

_RANK_FOLDER = re.compile(r"rank-([0-9]{5,})")
_Stamp = tuple[int, int, int, int]


class ProblemKind(StrEnum):
    """Why a slot counts for nothing."""

    TORN = "torn"  # no manifest and no living writer: it died while writing, or never wrote
    WRITING = "writing"  # no manifest, and a living process has the slot
    UNREADABLE = "unreadable"  # the manifest is damaged or of a newer version
    FOREIGN = "foreign"  # the manifest is of another run or rank
    SHORT = "short"  # the payload is shorter than its manifest says
    BAD = "bad"  # discarded: the copy was proven bad


@dataclass(frozen=True, slots=True)
class SlotProblem:
    """A slot that holds nothing, and why."""

    rank: int
    slot: str
    kind: ProblemKind
    message: str


def age(held: Held) -> tuple[int, int]:
    """Orders snapshots by when they were made: a step of an older epoch is older, however far it had come."""
    return held.identity.epoch, held.identity.step


class Inventory:
    """The slots of one node folder, as anybody may see them. Changes nothing that is held.

    Safe from any thread.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run
        self._lock = threading.Lock()  # guards _known
        self._known: dict[Path, tuple[_Stamp, Held | SlotProblem]] = {}

    def folder(self, rank: int) -> Path:
        return self.path / contract.rank_dirname(rank)

    def slots(self, rank: int) -> list[SlotFiles]:
        folder = self.folder(rank)
        return [SlotFiles(folder, index) for index in slot_indices(folder)]

    def all_slots(self) -> list[tuple[int, SlotFiles]]:
        """Every slot with its rank, in order."""
        return [(rank, files) for rank in self._ranks() for files in self.slots(rank)]

    def ranks_with_copies(self) -> list[int]:
        """The ranks with copies in a slot, of whichever snapshot."""
        return sorted({rank for rank, files in self.all_slots() if files.copies.exists()})

    def allocated_nbytes(self) -> int:
        """Bytes that all payloads take from the file system, sealed or not."""
        return sum(allocated_nbytes(files.payload) for _, files in self.all_slots())

    def scan(self) -> list[Held]:
        """Every sealed slot, by rank, epoch and step. Reads manifests, and each only once."""
        found = [held for rank in self._ranks() for held in self.held(rank).values()]
        return sorted(found, key=lambda held: (held.rank, *age(held), held.slot))

    def held(self, rank: int, known: Manifest | None = None) -> dict[int, Held]:
        """The sealed slots of a rank, by index. `known`: as of `try_lease`."""
        seen = {files.index: self.look(files, rank, known) for files in self.slots(rank)}
        return {index: held for index, held in seen.items() if isinstance(held, Held)}

    def has(self, held: Held) -> bool:
        """Whether the snapshot is still sealed in its slot."""
        index = int(held.slot.rpartition("-")[2])
        return self.look(SlotFiles(self.folder(held.rank), index), held.rank) == held

    def problems(self, *, ready: Collection[Path]) -> list[SlotProblem]:
        """Every slot that holds nothing and why, leaving out empty ones whose payload path is in `ready`."""
        found = []
        for rank, files in self.all_slots():
            seen = self.look(files, rank)
            if isinstance(seen, SlotProblem):
                found.append(seen)
            elif seen is None and files.payload not in ready:
                found.append(_unsealed(files, rank))
        return found

    def look(self, files: SlotFiles, rank: int, manifest: Manifest | None = None) -> Held | SlotProblem | None:
        """What the slot's manifest says, from memory where the file is the same; None where there is none.

        `manifest`: as `known` of `try_lease`.
        """
        try:
            stamp = _stamp(files)
            with self._lock:
                known = self._known.get(files.manifest)
            if known is not None and known[0] == stamp:
                return known[1]
            seen = self._judge(files, rank, files.manifest.read_bytes(), manifest)
        except FileNotFoundError:
            return _discarded(files, rank)
        with self._lock:
            self._known[files.manifest] = (stamp, seen)
        return seen

    def learn(self, files: SlotFiles, held: Held) -> None:
        """Spares `look` the reading of a manifest that this process just sealed."""
        try:
            stamp = _stamp(files)
        except FileNotFoundError:
            return
        with self._lock:
            self._known[files.manifest] = (stamp, held)

    def try_lease(
        self, rank: int, identity: Identity, known: Manifest | None = None
    ) -> tuple[SlotFiles, Manifest, int] | None:
        """The first slot that holds the identity, its manifest, and a descriptor: a lease until closed.

        `known`: a manifest that was read before, perhaps from the same bytes; then it is not read again.
        """
        for index, held in self.held(rank, known).items():
            if held.identity != identity:
                continue
            files = SlotFiles(self.folder(rank), index)
            with translated(f"lease {files.lease}"):
                lease_fd = try_flock(files.lease, fcntl.LOCK_SH)
            if lease_fd is None:
                continue
            # Looked at again: before the lease a writer may have changed it, from here on none can.
            manifest = _try_read_manifest(files, known)
            if manifest is not None and manifest.identity == identity and isinstance(self.look(files, rank), Held):
                return files, manifest, lease_fd
            os.close(lease_fd)
        return None

    def _judge(self, files: SlotFiles, rank: int, data: bytes, known: Manifest | None) -> Held | SlotProblem:
        try:
            manifest = Manifest.from_bytes(data, known=known)
        except KtrainError as error:
            return SlotProblem(rank, files.name, ProblemKind.UNREADABLE, str(error))
        if (manifest.identity.run, manifest.rank) != (self.run, rank):
            message = f"holds rank {manifest.rank} of run {manifest.identity.run!r}"
            return SlotProblem(rank, files.name, ProblemKind.FOREIGN, message)
        nbytes = payload_nbytes(files)
        if nbytes < max(1, manifest.nbytes):
            message = f"expected a payload of {manifest.nbytes} bytes, found {nbytes}"
            return SlotProblem(rank, files.name, ProblemKind.SHORT, message)
        return Held(rank, manifest.identity, manifest.nbytes, digest_text(data), files.name)

    def _ranks(self) -> Iterator[int]:
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        return (int(match[1]) for name in names if (match := _RANK_FOLDER.fullmatch(name)))


def _stamp(files: SlotFiles) -> _Stamp:
    """Differs for every manifest that was ever sealed in a slot (each is a new file), and when bytes are lost."""
    stat = os.stat(files.manifest)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size, payload_nbytes(files)


def _try_read_manifest(files: SlotFiles, known: Manifest | None) -> Manifest | None:
    try:
        return Manifest.from_bytes(files.manifest.read_bytes(), known=known)
    except (FileNotFoundError, KtrainError):
        return None  # what is wrong with it is in `problems`


def _discarded(files: SlotFiles, rank: int) -> SlotProblem | None:
    if not files.bad.exists():
        return None
    try:
        reason = files.reason.read_text().strip()
    except FileNotFoundError:
        reason = "no reason was written"
    return SlotProblem(rank, files.name, ProblemKind.BAD, reason)


def _unsealed(files: SlotFiles, rank: int) -> SlotProblem:
    with translated(f"look at {files.lock}"):
        fd = try_flock(files.lock, fcntl.LOCK_SH)
    if fd is None:
        return SlotProblem(rank, files.name, ProblemKind.WRITING, "no manifest; a living process has the slot")
    os.close(fd)
    return SlotProblem(rank, files.name, ProblemKind.TORN, "no manifest and no living writer")
