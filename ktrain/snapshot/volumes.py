"""The folders of a volume root: opening one, listing all, removing what is left over; the memory budget."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base import atomic, contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.urls import require_public
from ktrain.errors import CapacityError, ConfigError, ConflictError, CorruptionError
from ktrain.snapshot.inventory import Inventory
from ktrain.snapshot.slots import Held, translated, try_flock

KEPT_SLOTS = 2  # per rank kept for another node: the newest that is whole, and the one that is arriving
_LOCK_FILE = "volume.lock"  # held shared by every process that has the folder open
_FORMAT = 1
_OPEN_S = 5.0  # others hold the lock alone only to look, or while they remove the folder
_PAGE = 4096
_EXTRA = 16 * _PAGE
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """One node folder under a volume root; `live` while any process has it open, also a stopped one."""

    path: Path
    run: str
    uri: str
    node: str
    held: tuple[Held, ...]
    nbytes: int
    live: bool


@dataclass(frozen=True, slots=True)
class Slots:
    """Slots of `nbytes` each: so many for each of some ranks."""

    num_ranks: int
    num_each: int
    nbytes: int

    @property
    def room_nbytes(self) -> int:
        """Bytes that they take with their manifests, whose size is bounded by that of what they describe."""
        # A manifest takes under 250 bytes per tensor and 16 per chunk of 1 MiB; 64 KiB and a 2048th cover both.
        return self.num_ranks * self.num_each * (_whole_pages(self.nbytes) + _whole_pages(self.nbytes // 2048) + _EXTRA)

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks x {self.num_each} slots x {self.nbytes} bytes"


def required_nbytes(own: Slots, kept: Slots, *, free_nbytes: int, held_nbytes: int) -> int:
    """Bytes that the slots of one node need in its volume.

    Args:
        own: of the ranks that run here, for the largest of their snapshots.
        kept: of ranks of other nodes whose snapshots are kept here.
        free_nbytes: what the file system has free, `NodeVolume.free_nbytes()`.
        held_nbytes: what this run's slots take already, `NodeVolume.held_nbytes()`; they are used again.

    Raises:
        CapacityError: the file system has less.
    """
    required = own.room_nbytes + kept.room_nbytes
    lacking = required - free_nbytes - held_nbytes
    if lacking > 0:
        raise CapacityError(
            f"memory tier: needs {required} bytes for {own}, {kept} kept for other nodes, and their manifests; the "
            f"volume has {free_nbytes} bytes free and {held_nbytes} in slots of this run, {lacking} too few; make the "
            "volume larger, keep fewer replicas or use fewer slots"
        )
    return required


def list_volumes(root: Path) -> list[VolumeInfo]:
    """Every node folder of every run under a volume root, live or left over."""
    return [_look(record.parent) for record in sorted(root.glob(f"*/*/{contract.VOLUME_FILE}"))]


def node_folders(root: Path) -> list[Path]:
    """The node folders below a volume root that somebody has opened once; links are left out, and nothing is read."""
    found = [node for run in _folders(root) for node in _folders(run)]
    return [node for node in found if (node / _LOCK_FILE).is_file() and not (node / _LOCK_FILE).is_symlink()]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def is_live(folder: Path) -> bool:
    """Whether any process has a node folder open, also a stopped one."""
    with translated(f"look at volume {folder}"):
        # For a moment nobody can open the folder; who tries then waits for it.
        alone = try_flock(folder / _LOCK_FILE, fcntl.LOCK_EX)
    if alone is not None:
        os.close(alone)
    return alone is None


def remove_volume(info: VolumeInfo) -> int:
    """Frees a left-over node folder; the bytes freed.

    Raises:
        ConflictError: a living process uses it.
    """
    return remove_folder(info.path)


def _look(folder: Path) -> VolumeInfo:
    try:
        uri = str((try_read_record(folder) or {}).get("uri", ""))
    except CorruptionError:
        uri = ""  # listed all the same: only what is listed can be removed
    inventory = Inventory(folder, folder.parent.name)
    live = is_live(folder)
    with translated(f"look at volume {folder}"):
        return VolumeInfo(
            path=folder,
            run=folder.parent.name,
            uri=uri,
            node=folder.name,
            held=tuple(inventory.scan()),
            nbytes=inventory.allocated_nbytes(),
            live=live,
        )


def node_folder(root: Path, run: str, node: str) -> Path:
    """Where a node's part lies; nothing is made.

    Raises:
        ConfigError: a name is no plain name.
    """
    for what, name in (("run id", run), ("node name", node)):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{what}: expected letters, digits, '.', '_' and '-', found {name!r}")
    return root / run / node


def open_folder(root: Path, folder: Path) -> int:
    """Makes the folders and returns a descriptor: until it is closed, this process has the folder open."""
    deadline = Deadline.after(_OPEN_S)
    while True:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(root, {0, os.geteuid()}, 0)
        for path in (folder.parent, folder):
            path.mkdir(exist_ok=True, mode=0o700)
            _require_private(path, {os.geteuid()}, 0o022)
        try:
            fd = try_flock(folder / _LOCK_FILE, fcntl.LOCK_SH)
        except FileNotFoundError:
            continue  # removed in this moment: make it again
        if fd is not None:
            return fd
        if deadline.expired():
            raise ConflictError(f"volume {folder}: another process had it for itself for {_OPEN_S:g} s; try again")
        SYSTEM_CLOCK.sleep(0.01)


def claim_folder(folder: Path, *, run: str, node: str, uri: str) -> None:
    """Writes whose the folder is.

    Raises:
        ConflictError: it is another's.
        ConfigError: a newer ktrain laid it out, or the URI holds a secret.
    """
    require_public(uri)
    found = try_read_record(folder)
    if found is None:
        record = {"format": _FORMAT, "run": run, "node": node, "uri": uri}
        atomic.write_json(folder / contract.VOLUME_FILE, record)
        return
    version = found.get("format")
    if type(version) is int and version > _FORMAT:
        raise ConfigError(
            f"volume {folder}: laid out in format {version}, this ktrain reads formats up to {_FORMAT}; use a newer "
            "one, or choose another volume root"
        )
    if (found.get("run"), found.get("node")) != (run, node):
        raise ConflictError(
            f"volume {folder}: expected run {run!r} and node {node!r}, found run {found.get('run')!r} and "
            f"node {found.get('node')!r}; choose another volume root or remove the folder"
        )


def try_read_record(folder: Path) -> dict[str, Any] | None:
    """What `claim_folder` wrote, or None."""
    path = folder / contract.VOLUME_FILE
    value = atomic.try_read_json(path)
    if value is not None and not isinstance(value, dict):
        raise CorruptionError(f"{path}: expected a JSON object, found {value!r}; remove the folder")
    return value


def remove_folder(folder: Path) -> int:
    """Frees a node folder; the bytes freed, 0 where there is none.

    Raises:
        ConflictError: a living process has it open, or one of its slots.
    """
    locks: list[int] = []
    try:
        with translated(f"remove volume {folder}"):
            if not folder.is_dir():
                return 0
            inventory = Inventory(folder, folder.parent.name)
            slots = [files for _, files in inventory.all_slots()]
            for path in [folder / _LOCK_FILE, *(f.lock for f in slots), *(f.lease for f in slots)]:
                fd = try_flock(path, fcntl.LOCK_EX)
                if fd is None:
                    what = path.relative_to(folder)
                    raise ConflictError(f"remove volume {folder}: a living process holds {what}; end it first")
                locks.append(fd)
            nbytes = inventory.allocated_nbytes()
            # The record goes last: what a crash leaves half removed is still found by `list_volumes`.
            for rank in folder.glob("rank-*"):
                shutil.rmtree(rank)
            shutil.rmtree(folder)
            if not os.listdir(folder.parent):
                folder.parent.rmdir()
            return nbytes
    finally:
        for fd in locks:
            os.close(fd)


def _require_private(path: Path, owners: set[int], forbidden_mode: int) -> None:
    """In a folder that others can write, somebody else may have been there first."""
    stat = path.lstat()
    if path.is_symlink() or stat.st_uid not in owners or stat.st_mode & forbidden_mode:
        raise ConfigError(
            f"volume folder {path}: expected a folder of user {os.geteuid()} that others cannot write, found "
            f"owner {stat.st_uid} and mode {stat.st_mode & 0o7777:o}; remove it or choose another volume root"
        )


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
