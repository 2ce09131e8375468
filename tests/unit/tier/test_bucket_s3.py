"""S3 servers that are stopped, killed, missing, full of errors or that refuse: four different answers, all in
time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ktrain.abc.tier import Tier
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.retry import BusyError
from ktrain.base.settings import Timeouts
from ktrain.errors import DeadlineError, ForbiddenError, KtrainError, NotFoundError, UnavailableError
from ktrain.testing.s3_servers import RcloneServer, find_program
from ktrain.testing.tier_conformance import soon
from ktrain.tier.location import open_tier

_QUICK = Timeouts(patience_s=10.0)


@pytest.fixture(scope="module")
def rclone() -> Iterator[RcloneServer]:
    if find_program("rclone") is None:
        pytest.skip("rclone is not installed")
    with RcloneServer() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def tier(rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tier]:
    _use(rclone.environment(), monkeypatch)
    tier = open_tier("s3://bucket/run", timeouts=_QUICK)
    yield tier
    tier.close()


def _use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_calls_to_a_stopped_server_end_at_their_deadlines_and_it_is_used_again_after(
    tier: Tier, rclone: RcloneServer
) -> None:
    tier.write("a", b"x", deadline=soon())
    begin = SYSTEM_CLOCK.monotonic()
    rclone.pause()
    try:
        for _ in range(3):
            with pytest.raises(DeadlineError, match="read a"):
                tier.read("a", deadline=Deadline.after(0.5))
        with pytest.raises(DeadlineError, match="list all"):
            tier.list("", deadline=Deadline.after(0.5))
        with pytest.raises(DeadlineError, match="write b"):
            tier.write("b", bytes(1 << 20), deadline=Deadline.after(0.5))
    finally:
        rclone.resume()
    assert SYSTEM_CLOCK.monotonic() - begin < 10
    assert tier.read("a", deadline=soon()) == b"x"


def test_calls_given_up_on_a_stopped_server_leave_no_thread(tier: Tier, rclone: RcloneServer) -> None:
    before = set(threading.enumerate())
    rclone.pause()
    try:
        for deadline_s in (0.005, 0.02, 0.1, 0.3, 0.5):  # some end while the client is still being made
            with pytest.raises(DeadlineError):
                tier.read("a", deadline=Deadline.after(deadline_s))
        tier.close()  # ends threads that are idle
        left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("ktrain-tier")]
        for thread in left:
            thread.join(30)
        assert [thread.name for thread in left if thread.is_alive()] == []
    finally:
        rclone.resume()


def test_calls_to_a_killed_server_are_unavailable_and_its_objects_are_there_after(
    tier: Tier, rclone: RcloneServer
) -> None:
    tier.write("a", b"x", deadline=soon())
    rclone.kill()
    try:
        for call in (
            lambda: tier.read("a", deadline=soon()),
            lambda: tier.list("", deadline=soon()),
        ):
            with pytest.raises(UnavailableError):
                call()
    finally:
        rclone.start()
    assert tier.read("a", deadline=soon()) == b"x"


def test_calls_with_a_wrong_secret_are_forbidden(rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(rclone.environment(secret_key="wrong"), monkeypatch)
    tier = open_tier("s3://bucket/run", timeouts=_QUICK)
    for call in (
        lambda: tier.read("a", deadline=soon()),
        lambda: tier.list("", deadline=soon()),
        lambda: tier.write("b", b"y", deadline=soon()),
    ):
        with pytest.raises(ForbiddenError) as caught:
            call()
        assert "wrong" not in str(caught.value)
    tier.close()


def test_calls_to_a_bucket_that_is_not_there_say_so_and_never_not_found(
    rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(rclone.environment(), monkeypatch)
    tier = open_tier("s3://nosuchbucket/run", timeouts=_QUICK)
    for call in (
        lambda: tier.read("a", deadline=soon()),
        lambda: tier.list("", deadline=soon()),
        lambda: tier.list("checkpoints", deadline=soon()),
        lambda: tier.write("b", b"y", deadline=soon()),
    ):
        with pytest.raises(UnavailableError, match="bucket does not exist"):
            call()
    tier.close()


class _Grumpy(BaseHTTPRequestHandler):
    """Answers every request with one status and code."""

    protocol_version = "HTTP/1.1"
    status = 500
    code = "InternalError"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<Error><Code>{self.code}</Code><Message>grumpy</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def grumpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Grumpy]]:
    handler = type("_GrumpyNow", (_Grumpy,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    _use(
        {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        monkeypatch,
    )
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", NotFoundError),
        (403, "AccessDenied", ForbiddenError),
        (429, "TooManyRequests", BusyError),
        (500, "InternalError", BusyError),
        (503, "ServiceUnavailable", BusyError),
    ],
)
def test_read_from_a_server_that_answers_with_a_status_keeps_the_meaning(
    grumpy: type[_Grumpy], status: int, code: str, expected: type[KtrainError]
) -> None:
    grumpy.status, grumpy.code = status, code
    tier = open_tier("s3://bucket/run", timeouts=_QUICK)
    with pytest.raises(KtrainError) as caught:
        tier.read("a", deadline=soon())
    assert type(caught.value) is expected
    if status in (403, 500):
        with pytest.raises(expected):
            tier.list("", deadline=soon())
    tier.close()


def test_read_from_a_throttling_server_stays_within_its_deadline(grumpy: type[_Grumpy]) -> None:
    grumpy.status, grumpy.code = 503, "SlowDown"
    tier = open_tier("s3://bucket/run", timeouts=_QUICK)
    with pytest.raises((DeadlineError, UnavailableError)):
        tier.read("a", deadline=Deadline.after(0.5))
    tier.close()
