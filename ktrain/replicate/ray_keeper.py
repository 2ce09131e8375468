"""Keeps one `ray start` and sees to it that nothing of it outlives whoever started it.

    starter (agent's child, or the run's head)
      +-- keeper        this module; a session of its own; ends everything when its stdin closes
            +-- ray start --block         dies with the keeper
                  +-- gcs_server, raylet  die with `ray start` (Ray's own fate sharing)
                        +-- workers, Ray's agents: they would outlive a killed raylet by a minute

Invariant: when the keeper has ended, no process of its session is left and its link is gone. Where the keeper
itself is killed, its starter sweeps the session.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ktrain import native
from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.process import ProcessId
from ktrain.base.settings import child_environment
from ktrain.errors import UnavailableError

_SWEEP_S = 10.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_GRACE_S = 3.0
_MAX_LINK_CHARS = 40  # Ray's socket paths below it have 67 more, of 107
_POLL_S = 0.02


class KeptRay:
    """A `ray start` that runs until `stop()` or until this process ends, however it ends.

    `folder` is what Ray gets as its temporary directory: a short name for one in the work directory, because
    Unix socket paths end at 107 bytes.
    """

    def __init__(self, work_dir: Path, name: str, *, environment: Mapping[str, str]) -> None:
        self.real_folder = work_dir.absolute() / name
        # Ray opens its directory to everyone, and who reaches its sockets can read the store: so a closed
        # one stands above it.
        (self.real_folder / "ray").mkdir(mode=0o700, parents=True)
        self.real_folder.chmod(0o700)
        remove_links(work_dir)
        self.folder = short_name(work_dir)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = False

    def start(self, arguments: Sequence[str]) -> None:
        """Starts `ray start <arguments>` and does not wait for it."""
        target = str(self.real_folder / "ray")
        config = {"arguments": list(arguments), "link": str(self.folder), "target": target}
        self._started = True
        with open(self.real_folder / "ray-start.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ktrain.replicate.ray_keeper", "keep", json.dumps(config)],
                stdin=subprocess.PIPE,  # held open by us alone: its end is the sign that we are gone
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self.real_folder,
                start_new_session=True,
            )

    @property
    def session(self) -> int | None:
        return None if self._process is None else self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def reason(self) -> str:
        """The last lines that `ray start` wrote, for an error message."""
        text = (self.real_folder / "ray-start.log").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if "rror" in line]
        return " | ".join(lines[-3:]) or f"no error (it was killed, or see {self.real_folder})"

    def socket_ready(self) -> bool:
        """Whether the raylet listens: drivers that come earlier poll once a second."""
        return any(self.folder.glob("session_*/sockets/raylet*"))

    def stop(self) -> None:
        """Ends all its processes. May be called again."""
        process, self._process = self._process, None
        if process is None:
            if not self._started:  # nothing in it is worth keeping
                self._started = True
                (self.real_folder / "ray").rmdir()
                self.real_folder.rmdir()
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_SWEEP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_SWEEP_S)
        sweep(process.pid)
        self.folder.unlink(missing_ok=True)


def short_name(work_dir: Path) -> Path:
    """A free short path for a link to a folder in `work_dir`."""
    name = f"{_link_prefix(work_dir)}{ids.random_id(3)}"
    path = Path(tempfile.gettempdir(), name)
    return path if len(str(path)) <= _MAX_LINK_CHARS else Path("/tmp", name)  # noqa: S108


def remove_links(work_dir: Path) -> None:
    """Removes what an earlier keeper of this directory left, if it was killed together with its starter."""
    for folder in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 -- removes links of this directory alone
        for link in Path(folder).glob(f"{_link_prefix(work_dir)}*"):
            if link.is_symlink():
                link.unlink(missing_ok=True)


def _link_prefix(work_dir: Path) -> str:
    return f"kt-{ids.text_digest(str(work_dir.absolute()), 8)}-"


def session_members(session: int) -> list[int]:
    """Pids of all living processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] not in "ZX" and int(fields[3]) == session:
            found.append(int(entry))
    return found


def sweep(session: int) -> None:
    """Kills every process of a session but the caller, until none is left.

    Raises:
        UnavailableError: one would not die within 10 s (it hangs in the kernel).
    """
    deadline = Deadline.after(_SWEEP_S)
    while members := [pid for pid in session_members(session) if pid != os.getpid()]:
        for pid in members:
            process = ProcessId.of(pid)
            if process is not None:
                process.signal(signal.SIGKILL)
        if deadline.expired():
            raise UnavailableError(
                f"Ray: processes {members} of session {session} did not end within {_SWEEP_S:g} s of SIGKILL"
            )
        SYSTEM_CLOCK.sleep(_POLL_S)


def finish(session: int, link: Path) -> None:
    """Sees to it that a keeper, whose starter has ended, leaves nothing; gives it time to do so itself."""
    deadline = Deadline.after(_GRACE_S)
    while session_members(session) and not deadline.expired():
        SYSTEM_CLOCK.sleep(_POLL_S)
    sweep(session)
    link.unlink(missing_ok=True)


def _keep(config: dict[str, Any]) -> int:
    """The keeper: runs until the starter is gone, asks to stop, or `ray start` ends by itself."""
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the starter, which then closes our stdin
    command = [
        sys.executable,
        "-m",
        "ktrain.replicate.ray_keeper",
        "ray",
        str(os.getpid()),
        *config["arguments"],
    ]
    # Made here and not by the starter, so that whoever is killed before this leaves none.
    Path(config["link"]).symlink_to(config["target"], target_is_directory=True)
    ray = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=child_environment({}))

    def watch_starter() -> None:
        os.read(0, 1)
        done.set()

    def watch_ray() -> None:
        ray.wait()
        done.set()

    _adopt_orphans()
    for target in (watch_starter, watch_ray):
        threading.Thread(target=target, name=target.__name__, daemon=True).start()
    done.wait()  # for ever by purpose: the keeper lives as long as its starter
    sweep(os.getsid(0))
    _reap(ray)
    Path(config["link"]).unlink(missing_ok=True)
    return 0


def _adopt_orphans() -> None:
    """Makes this process the parent of what a dead raylet leaves, so that it can be waited for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(ray: subprocess.Popen[bytes]) -> None:
    """Waits for children that were killed: an init that does not would show them as zombies for ever."""
    ray.wait(_SWEEP_S)
    deadline = Deadline.after(_GRACE_S)
    while not deadline.expired():
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                SYSTEM_CLOCK.sleep(_POLL_S)  # dead, but its last thread still gives memory back
        except ChildProcessError:
            return


def _run_ray(parent: int, arguments: list[str]) -> None:
    """Becomes `ray start`, which dies with the keeper."""
    native.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)
    from ray.scripts.scripts import cli

    cli(["start", *arguments])


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        raise SystemExit(_keep(json.loads(sys.argv[2])))
    _run_ray(int(sys.argv[2]), sys.argv[3:])
