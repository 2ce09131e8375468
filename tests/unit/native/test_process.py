from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys

import pytest

from ktrain import native
from ktrain.errors import CapacityError, ConfigError

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="prctl and tmpfs are Linux's")

# Prints the child's pid and dies by SIGKILL; the child says nothing and would live for an hour.
PARENT = """
import os, signal, subprocess, sys
code = (
    "import signal; from ktrain import native; native.set_parent_death_signal(signal.SIGKILL);"
    "print('ready', flush=True); signal.sigtimedwait([], 3600)"
)
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@LINUX_ONLY
def test_parent_death_signal_when_parent_is_killed_ends_the_child() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    # The child holds no end of this pipe; what is read to the end comes from the parent alone.
    pid = int(parent.stdout.readline())
    parent.communicate(timeout=30)
    assert _ends_within_s(pid, 30)


@LINUX_ONLY
def test_parent_death_signal_with_no_such_signal_raises_config_error() -> None:
    with pytest.raises(ConfigError, match="signal 9999"):
        native.set_parent_death_signal(9999)


@LINUX_ONLY
def test_prefault_of_a_new_file_makes_its_pages_present() -> None:
    nbytes = 4 << 20
    fd = os.memfd_create("prefault")
    try:
        os.ftruncate(fd, nbytes)
        with mmap.mmap(fd, nbytes) as mapping:
            assert os.fstat(fd).st_blocks == 0
            native.prefault(mapping, num_threads=2)
            assert os.fstat(fd).st_blocks * 512 == nbytes
    finally:
        os.close(fd)


@LINUX_ONLY
def test_prefault_behind_the_end_of_a_file_raises_capacity_error_instead_of_sigbus() -> None:
    # A full volume and a file that was cut answer alike: the write would end the process.
    fd = os.memfd_create("prefault")
    try:
        os.ftruncate(fd, 1 << 20)
        with mmap.mmap(fd, 1 << 20) as mapping:
            os.ftruncate(fd, 0)
            with pytest.raises(CapacityError, match=str(1 << 20)):
                native.prefault(mapping)
    finally:
        os.close(fd)


def _ends_within_s(pid: int, timeout_s: int) -> bool:
    """Waits for a process that is not our child; one that is already gone counts."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        import select

        ready, _, _ = select.select([pidfd], [], [], timeout_s)
        if not ready:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return bool(ready)
    finally:
        os.close(pidfd)
