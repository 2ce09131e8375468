"""The node agent: lends memory of its node to the jobs of some namespaces (ADR 0045).

    python -P -m ktrain.run.node_agent --root FOLDER --nbytes 64Gi --idle-s 86400 --ready FILE NAMESPACE...

It makes a folder for each namespace on a memory-backed file system of the node, into which jobs are let by a volume
claim, and frees what no process has had open for a while. It speaks with nobody: whether a folder is in use is told by
its lock (ADR 0006).
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.errors import ConfigError, KtrainError
from ktrain.launcher.quantity import parse_bytes
from ktrain.snapshot.volumes import is_live, node_folders, remove_folder

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_LOOK_S = 60.0
_MEMORY = ("tmpfs", "ramfs")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Loan:
    """What one node lends: a folder for each namespace, of `nbytes` in all."""

    root: Path
    namespaces: tuple[str, ...]
    nbytes: int
    idle_s: float  # for which nobody had a folder open before it is freed


class NodeAgent:
    """Makes the folders and frees what is left in them. Call from one thread."""

    def __init__(self, loan: Loan, clock: Clock = SYSTEM_CLOCK) -> None:
        self._loan = loan
        self._clock = clock
        self._idle_since: dict[Path, float] = {}  # monotonic; a new agent counts anew, which only keeps more

    def prepare(self, mounts: str) -> None:
        """Makes the folders; `mounts` is the text of `/proc/self/mountinfo`.

        Raises:
            ConfigError: the root is not in memory, smaller than what is lent, or another user's.
        """
        root = self._loan.root
        kind = file_system(root, mounts)
        if kind not in _MEMORY:
            raise ConfigError(f"root {root}: expected a file system in memory ({', '.join(_MEMORY)}), found {kind}")
        about = os.statvfs(root)
        size = about.f_blocks * about.f_frsize
        if size < self._loan.nbytes:
            raise ConfigError(
                f"root {root}: {self._loan.nbytes} bytes are to be lent, and its file system has {size}; lend less, or "
                "mount a larger one there"
            )
        for namespace in self._loan.namespaces:
            folder = root / namespace
            folder.mkdir(mode=0o700, exist_ok=True)  # the kubelet lets the group of the jobs in (fsGroup)
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                raise ConfigError(f"folder {folder}: it is a link, or another user's; remove it")

    def sweep(self) -> int:
        """Frees folders that nobody has had open for long enough; the bytes freed.

        One that cannot be looked at or removed is named in the log and met again next time.
        """
        found = [folder for namespace in self._loan.namespaces for folder in _parts(self._loan.root / namespace)]
        now = self._clock.monotonic()
        idle = [path for path in found if _told(path, is_live) is False]
        self._idle_since = {path: self._idle_since.get(path, now) for path in idle}
        over = [path for path, since in self._idle_since.items() if now - since >= self._loan.idle_s]
        return sum(_free(path) for path in over)

    def run(self, stop: threading.Event) -> None:
        """Sweeps until it is told to stop. The folders stay: another agent finds them."""
        while not self._clock.wait(stop, _LOOK_S):
            self.sweep()


def _parts(namespace: Path) -> list[Path]:
    """What jobs left below a namespace: one folder for each run, then the layout of a volume root.

    A job may have put anything there: links are not followed, since they could lead into another namespace, and no file
    is read, since it could be one that never ends.
    """
    runs = [path for path in sorted(namespace.iterdir()) if path.is_dir() and not path.is_symlink()]
    return [node for run in runs for node in node_folders(run)]


def _free(folder: Path) -> int:
    """The folder of the run, above it, stays: a pod may be about to mount it."""
    nbytes = _told(folder, remove_folder) or 0
    if nbytes:
        _LOG.info("freed %d bytes in %s", nbytes, folder)
    return nbytes


def _told(folder: Path, ask: Callable[[Path], _T]) -> _T | None:
    try:
        return ask(folder)
    except KtrainError as error:
        _LOG.warning("%s", error)
        return None


def file_system(path: Path, mounts: str) -> str:
    """The kind of file system that a path lies on, from the text of `/proc/self/mountinfo`."""
    found = ("", "unknown")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # blanks are written as \040
        if path.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, after.split()[0])
    return found[1]


def parse(arguments: Sequence[str]) -> tuple[Loan, Path]:
    """What is lent, and the file that says that the folders are there.

    Raises:
        ConfigError: a value cannot be.
    """
    parser = argparse.ArgumentParser(prog="ktrain.run.node_agent", allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--nbytes", required=True)
    parser.add_argument("--idle-s", type=float, required=True)
    parser.add_argument("--ready", type=Path, required=True)
    parser.add_argument("namespaces", nargs="+")
    given = parser.parse_args(arguments)
    wrong = next((name for name in given.namespaces if _NAMESPACE.fullmatch(name) is None), None)
    if wrong is not None:
        raise ConfigError(f"namespace {wrong!r}: expected the name of a namespace")
    if not given.idle_s > 0:
        raise ConfigError(f"--idle-s: expected seconds, more than 0, found {given.idle_s}")
    loan = Loan(given.root, tuple(given.namespaces), parse_bytes(given.nbytes, name="--nbytes"), given.idle_s)
    return loan, given.ready


def main(arguments: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    try:
        loan, ready = parse(arguments)
        ready.unlink(missing_ok=True)
        agent = NodeAgent(loan)
        agent.prepare(_MOUNTS.read_text())
    except (ConfigError, OSError) as error:
        _LOG.error("%s", error)
        return contract.EXIT_USAGE
    ready.write_bytes(b"")
    agent.run(stop)
    return contract.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
