"""This machine: what a job of `ktrain launch` on it would find. Reads, and probes that leave nothing behind.

The probes of the disk and of locks use files without a name (O_TMPFILE): whatever happens, there is nothing to remove.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ktrain.launcher.doctor.finding import Check, Finding, Outcome, run_checks
from ktrain.launcher.quantity import MIB, show_bytes

_LEAST_FILES = 4096
_LEAST_SHM = 256 * MIB  # containers are given 64 MiB where nobody says otherwise
_BLOCK = 4096
_COLLAPSE_SINCE = (6, 1)  # MADV_COLLAPSE
_PACKAGES = (
    ("torch", (2, 11), "nothing can be trained", "pip install torch"),
    (
        "ray",
        (2, 50),
        "no copies in other nodes' memory: a lost node costs a read of the bucket",
        "pip install 'ktrain[ray]'",
    ),
)


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie; tests give folders of their own."""

    volume: Path  # of the memory tier
    run: Path | None = None  # of the run, where it lies on this machine
    root: Path = Path("/")
    needs_bytes: int = 0  # of the memory tier of all nodes; 0: not known


def look_at_machine(places: Places) -> tuple[Finding, ...]:
    """All checks of this machine."""
    disk = _existing(places.run if places.run is not None else Path.cwd())
    return run_checks(
        (
            Check("python", _python),
            Check("packages", _packages),
            Check("accelerators", lambda: _accelerators(places.root)),
            Check("memory", lambda: _memory(places)),
            Check("tmpfs", lambda: _tmpfs(places)),
            Check("huge pages", lambda: _huge_pages(places.root)),
            Check("disk", lambda: _disk(disk)),
            Check("locks", lambda: _locks(disk)),
            Check("open files", _open_files),
        )
    )


# Software


def _python() -> Iterator[Finding]:
    said = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.release()}"
    if platform.system() == "Linux":
        yield Finding("python", Outcome.OK, said)
        return
    cost = "tmpfs, direct I/O and pidfd are not used: everything works, and is slower"
    yield Finding("python", Outcome.WARNING, said, cost, "use Linux where it matters")


def _packages() -> Iterator[Finding]:
    for name, least, cost, remedy in _PACKAGES:
        wanted = ".".join(map(str, least))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            bad = Outcome.FAILED if name == "torch" else Outcome.WARNING
            yield Finding(name, bad, "is not installed", cost, remedy)
            continue
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found < least:
            yield Finding(
                name, Outcome.WARNING, f"{version}; {wanted} or later is expected", "it is not tested", remedy
            )
        else:
            yield Finding(name, Outcome.OK, version)


def _accelerators(root: Path) -> Iterator[Finding]:
    """By their device files: loading torch to ask would take the devices' memory and seconds."""
    patterns = {"NVIDIA": "nvidia[0-9]*", "AMD": "kfd", "Gaudi": "accel/accel[0-9]*", "Neuron": "neuron[0-9]*"}
    found = {name: len(list((root / "dev").glob(pattern))) for name, pattern in patterns.items()}
    there = {name: count for name, count in found.items() if count}
    if not there:
        yield Finding("accelerators", Outcome.OK, "none: training runs on the CPU")
        return
    said = ", ".join(f"{count} of {name}" for name, count in there.items())
    driver = root / "proc" / "driver" / "nvidia" / "version"
    if driver.is_file():
        said += f"; {driver.read_text(errors='replace').splitlines()[0].strip()}"
    build = _torch_build()
    if build == "cpu":
        cost = "torch uses none of them"
        yield Finding(
            "accelerators", Outcome.WARNING, f"{said}; torch is built for the CPU", cost, "install another torch"
        )
    else:
        yield Finding("accelerators", Outcome.OK, f"{said}{f'; torch is built for {build}' if build else ''}")


def _torch_build() -> str:
    try:
        return metadata.version("torch").partition("+")[2]
    except metadata.PackageNotFoundError:
        return ""


# Memory


def _memory(places: Places) -> Iterator[Finding]:
    lines = (places.root / "proc" / "meminfo").read_text().splitlines()
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[1:2]}
    total, free = known["MemTotal"], known["MemAvailable"]
    limit = _cgroup_limit(places.root)
    said = f"{show_bytes(free)} of {show_bytes(total)} are free"
    if limit is not None and limit < total:
        free = min(free, limit)
        said += f"; this process may have {show_bytes(limit)}"
    yield _against("memory", said, free, places.needs_bytes, "use a smaller --state or fewer nodes on this machine")


def _cgroup_limit(root: Path) -> int | None:
    try:
        text = (root / "sys" / "fs" / "cgroup" / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _against(check: str, said: str, free: int, needs: int, remedy: str) -> Finding:
    if needs <= free:
        needed = f"; the memory tier takes {show_bytes(needs)}" if needs else ""
        return Finding(check, Outcome.OK, f"{said}{needed}")
    evidence = f"{said}; the memory tier takes {show_bytes(needs)}"
    return Finding(check, Outcome.FAILED, evidence, "the run is refused before its first step", remedy)


def _tmpfs(places: Places) -> Iterator[Finding]:
    folder = _existing(places.volume)
    kind = _filesystem(places.root, folder)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    said = f"{places.volume} on {kind}, {show_bytes(free)} free"
    if kind != "tmpfs":
        cost = "snapshots survive processes as in memory, and are written at the speed of that file system"
        yield Finding(
            "tmpfs", Outcome.WARNING, said, cost, "set KTRAIN_VOLUME to a folder on a tmpfs, such as /dev/shm"
        )
        return
    if free < _LEAST_SHM and not places.needs_bytes:
        cost = "the memory tier of all but the smallest models does not fit"
        remedy = "make it larger: docker run --shm-size, or mount -o remount,size=50% /dev/shm"
        yield Finding("tmpfs", Outcome.WARNING, said, cost, remedy)
        return
    yield _against("tmpfs", said, free, places.needs_bytes, "make it larger: mount -o remount,size=80% /dev/shm")


def _filesystem(root: Path, folder: Path) -> str:
    """The type of the file system of a folder: that of the longest mount point above it."""
    best, kind = -1, "an unknown file system"
    for line in (root / "proc" / "mounts").read_text().splitlines():
        point, name = line.split()[1:3]
        if folder.is_relative_to(point) and len(point) > best:
            best, kind = len(point), name
    return kind


def _huge_pages(root: Path) -> Iterator[Finding]:
    """Whether a slot gets huge pages: it asks for them page by page, which `deny` alone refuses (ADR 0021)."""
    folder = root / "sys" / "kernel" / "mm" / "transparent_hugepage"
    try:
        text = (folder / "shmem_enabled").read_text()
        release = (root / "proc" / "sys" / "kernel" / "osrelease").read_text()
    except OSError as error:
        yield Finding("huge pages", Outcome.UNKNOWN, f"this kernel does not tell: {error}")
        return
    chosen = text.partition("[")[2].partition("]")[0] or text.strip()
    kernel = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    said = f"Linux {release.strip()}, shmem_enabled is {chosen}"
    if chosen != "deny" and (kernel >= _COLLAPSE_SINCE or chosen != "never"):
        yield Finding("huge pages", Outcome.OK, f"{said}: slots can have them")
        return
    cost = "slots have small pages: opening and copying one takes about half as long again"
    remedy = f"as root: echo advise > {folder / 'shmem_enabled'}"
    yield Finding("huge pages", Outcome.WARNING, said, cost, remedy)


# Disk


def _disk(folder: Path) -> Iterator[Finding]:
    """Direct writes, tried on a file that has no name."""
    free = os.statvfs(folder)
    said = f"{folder}: {show_bytes(free.f_bavail * free.f_frsize)} free"
    why = _try_direct(folder)
    if why is None:
        yield Finding("disk", Outcome.OK, f"{said}, direct I/O works")
    elif isinstance(why, PermissionError):
        yield Finding(
            "disk", Outcome.FAILED, f"{said}, and not for us: {why}", "no run can be kept there", "name another"
        )
    elif why.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.ENOSYS):
        yield Finding("disk", Outcome.UNKNOWN, f"{said}; it takes no files without a name, so it was not tried")
    else:
        cost = "drains to it go through the page cache: slower, and the cache takes memory from the job"
        yield Finding(
            "disk", Outcome.WARNING, f"{said}; direct I/O is refused: {why}", cost, "use ext4 or xfs for runs"
        )


def _try_direct(folder: Path) -> OSError | None:
    block = mmap.mmap(-1, _BLOCK)  # begins on a page, as direct I/O asks
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
            try:
                os.write(direct, block)
            finally:
                os.close(direct)
        finally:
            os.close(fd)
    except OSError as error:
        return error
    finally:
        block.close()
    return None


def _locks(folder: Path) -> Iterator[Finding]:
    """Whether a lock keeps a second holder out: it proves that a writer is dead (ADR 0006)."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        yield Finding("locks", Outcome.UNKNOWN, f"{folder}: it takes no files without a name: {error}")
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            why = "" if _is_held(second) else "a lock keeps nobody out"
        finally:
            os.close(second)
    except OSError as error:
        why = str(error)
    finally:
        os.close(fd)
    if not why:
        yield Finding("locks", Outcome.OK, f"{folder}: a lock keeps others out")
        return
    cost = "two jobs could write to one run, and neither would know"
    yield Finding("locks", Outcome.FAILED, f"{folder}: {why}", cost, "keep the run elsewhere")


def _is_held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{soft} of at most {hard}"
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES:
        yield Finding("open files", Outcome.OK, said)
    else:
        cost = "many ranks, loaders and transfers on one node run out of them"
        yield Finding("open files", Outcome.WARNING, said, cost, f"ulimit -n {_LEAST_FILES}")


def _existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
