"""S3 servers on this machine, as child processes that a test may stop, kill and start again.

Two with different habits, neither of them production S3: moto honours conditional writes and accepts every
secret; rclone checks signatures, keeps objects as files that outlive it, and overwrites where it was told not
to.
"""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.settings import child_environment
from ktrain.errors import ConfigError, DeadlineError, UnavailableError

ACCESS_KEY = "ktrain-test"
# A server must not outlive a test run that was killed. Set in the new process after it has left this one: between
# fork and exec of a process with threads nothing is safe.
_DIE_WITH_PARENT = (
    sys.executable,
    "-ISc",
    "import ctypes, os, sys; getattr(ctypes.CDLL(None), 'prctl', lambda *_: 0)(1, 9);"
    "os.execv(sys.argv[1], sys.argv[1:])",
)
SECRET_KEY = "ktrain-test-secret"  # noqa: S105 -- of a server that lives for one test on this machine


def find_program(name: str) -> str | None:
    """Where the program is: beside this interpreter, else on the path; None when it is not installed."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


class S3Server:
    """A server on a free loopback port; `with` starts and ends it. Use from one thread.

    Without a folder of the caller's, its files lie in memory until the `with` ends.

    The port stays the same over `kill` and `start`, as the address of a real store does.
    """

    def __init__(
        self, program: str, folder: Path | None, *, start_s: float = 60.0, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        found = find_program(program)
        if found is None:
            raise ConfigError(f"{program}: not installed; install ktrain's extra 'test'")
        self.program = found
        self._own_folder = _memory_folder() if folder is None else None
        self.folder = Path(self._own_folder.name) if self._own_folder is not None else folder or Path()
        self.port = _free_port()
        self._start_s = start_s
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        """What the server says."""
        return self.folder / "server.log"

    def environment(self, *, secret_key: str = SECRET_KEY) -> dict[str, str]:
        """What a client of this server needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Starts the server and returns once it takes connections.

        Raises:
            UnavailableError: it ended by itself.
            DeadlineError: it takes no connections in time.
        """
        assert self._process is None, "started already"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*_DIE_WITH_PARENT, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment({}),
            )
        deadline = Deadline.after(self._start_s, self._clock)
        while not self._takes_connections():
            if self._process.poll() is not None:
                tail = self.log_file.read_text(errors="replace")[-2000:]
                self._process = None
                raise UnavailableError(f"{self.program}: ended while starting; it said: {tail}")
            if deadline.expired():
                self.kill()
                raise DeadlineError(f"{self.program}: no connection at {self.endpoint} within {self._start_s:g} s")
            self._clock.sleep(0.05)

    def stop(self) -> None:
        """Ends the server in an orderly way, also one that is paused. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server as `kill -9` does. Idempotent."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stops the server (SIGSTOP): connections are taken by the kernel, and nobody answers."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Goes on after `pause`."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGCONT)

    def make_bucket(self, bucket: str) -> None:
        """Makes an empty bucket, around every client library."""
        raise NotImplementedError

    def get(self, bucket: str, key: str) -> bytes | None:
        """An object's bytes, around every client library; None where there is none."""
        raise NotImplementedError

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Puts an object there, around every client library."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _takes_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _end(self, signum: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signum)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10.0)


class MotoServer(S3Server):
    """moto's server: objects in its memory, lost with it."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__("moto_server", folder)

    def make_bucket(self, bucket: str) -> None:
        self._ask("PUT", f"/{bucket}", b"", expected=(200, 409))

    def get(self, bucket: str, key: str) -> bytes | None:
        status, body = self._ask("GET", f"/{bucket}/{key}", b"", expected=(200, 404))
        return body if status == 200 else None

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self._ask("PUT", f"/{bucket}/{key}", data, expected=(200,))

    def _command(self) -> Sequence[str]:
        return [self.program, "-H", "127.0.0.1", "-p", str(self.port)]

    def _ask(self, method: str, path: str, body: bytes, *, expected: tuple[int, ...]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30.0)
        try:
            # Any signature does; without one moto answers as AWS does to strangers.
            credential = f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20260101/us-east-1/s3/aws4_request, Signature=0"
            connection.request(method, path, body or None, {"Authorization": credential})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status not in expected:
            raise UnavailableError(f"moto: {method} {path}: status {response.status}: {answer[:500]!r}")
        return response.status, answer


class RcloneServer(S3Server):
    """`rclone serve s3`: buckets are folders below `folder/buckets`, objects are files that survive the
    server.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__("rclone", folder)

    def make_bucket(self, bucket: str) -> None:
        (self.folder / "buckets" / bucket).mkdir(parents=True, exist_ok=True)

    def get(self, bucket: str, key: str) -> bytes | None:
        try:
            return (self.folder / "buckets" / bucket / key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, bucket: str, key: str, data: bytes) -> None:
        path = self.folder / "buckets" / bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def _command(self) -> Sequence[str]:
        buckets = self.folder / "buckets"
        buckets.mkdir(parents=True, exist_ok=True)
        return [
            self.program,
            "serve",
            "s3",
            f"--addr=127.0.0.1:{self.port}",
            f"--auth-key={ACCESS_KEY},{SECRET_KEY}",
            "--config=",
            "--dir-cache-time=1ms",  # files that a test puts there must be seen; 0 makes rclone spin
            str(buckets),
        ]


def _memory_folder() -> tempfile.TemporaryDirectory[str]:
    shm = Path("/dev/shm")  # noqa: S108 -- a private folder is made in it
    return tempfile.TemporaryDirectory(prefix="ktrain-s3-", dir=shm if shm.is_dir() else None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
