from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.control import Client, LocalCaller, Server
from ktrain.errors import (
    ConfigError,
    CorruptionError,
    DeadlineError,
    ForbiddenError,
    InternalError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)

TIMEOUT_S = 30.0
HEAD = "POST /call/echo HTTP/1.1\r\nAuthorization: Bearer secret\r\nConnection: close\r\n"
hold = threading.Event()


def fail(params: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, type[Exception]] = {
        cls.__name__: cls for cls in (CorruptionError, NotFoundError, UnavailableError, DeadlineError, ValueError)
    }
    raise kinds[params["kind"]]("as asked")


HANDLERS = {"echo": lambda params: params, "fail": fail, "hold": lambda params: {"was": hold.wait(TIMEOUT_S)}}


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    where = "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"
    server = Server(HANDLERS, address=where, token="secret")
    yield server.address
    server.close()


def test_call_big_body_comes_back_unchanged(address: str) -> None:
    params = {"text": "x" * (3 << 20), "nested": [1, 2.5, None, {"k": "\u20ac"}]}
    assert Client(address, "secret").call("echo", params, timeout_s=TIMEOUT_S) == params


@pytest.mark.parametrize("cls", [CorruptionError, NotFoundError, UnavailableError, DeadlineError])
def test_call_error_of_the_handler_keeps_its_class(address: str, cls: type[KtrainError]) -> None:
    with pytest.raises(cls, match="as asked"):
        Client(address, "secret").call("fail", {"kind": cls.__name__}, timeout_s=TIMEOUT_S)


def test_call_unexpected_failure_of_the_handler_is_internal(address: str) -> None:
    with pytest.raises(InternalError, match="ValueError: as asked"):
        Client(address, "secret").call("fail", {"kind": "ValueError"}, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("token", ["", "secre", "secrets", "gehe\u00efm"])
@pytest.mark.parametrize("num_chars", [10, 3 << 20])
def test_call_wrong_token_is_forbidden_whatever_the_size(address: str, token: str, num_chars: int) -> None:
    with pytest.raises(ForbiddenError, match="token"):
        Client(address, token).call("echo", {"text": "x" * num_chars}, timeout_s=TIMEOUT_S)


def test_call_unknown_handler_names_the_known_ones(address: str) -> None:
    with pytest.raises(InternalError, match="echo, fail, hold"):
        Client(address, "secret").call("nothing", {}, timeout_s=TIMEOUT_S)
    with pytest.raises(InternalError, match="echo"):
        LocalCaller({"echo": lambda params: params}).call("nothing", {}, timeout_s=TIMEOUT_S)


def test_call_server_closed_is_unavailable(tmp_path: Path) -> None:
    server = Server(HANDLERS, address=f"unix:{tmp_path}/s", token="secret")
    server.close()
    server.close()
    with pytest.raises(UnavailableError):
        Client(server.address, "secret").call("echo", {}, timeout_s=TIMEOUT_S)


def test_call_answer_that_does_not_come_is_a_deadline(address: str) -> None:
    hold.clear()
    try:
        with pytest.raises(DeadlineError, match="hold"):
            Client(address, "secret").call("hold", {}, timeout_s=0.1)
    finally:
        hold.set()


def raw(address: str, request: bytes) -> bytes:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(rest)
    else:
        host, _, port = rest.rpartition(":")
        connection = socket.create_connection((host, int(port)))
    with connection:
        connection.settimeout(TIMEOUT_S)
        connection.sendall(request)
        with connection.makefile("rb") as answer:
            return answer.read()


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff"])
def test_server_body_that_is_no_object_is_refused(address: str, body: bytes) -> None:
    head = HEAD + f"Content-Length: {len(body)}\r\n\r\n"
    answer = raw(address, head.encode() + body)
    assert b" 400 " in answer.splitlines()[0] and b'"config"' in answer


@pytest.mark.parametrize("length", ["99999999999", "-1", "many", "\u00b2"])
def test_server_impossible_length_is_refused_unread(address: str, length: str) -> None:
    head = HEAD + f"Content-Length: {length}\r\n\r\n"
    assert b" 413 " in raw(address, head.encode("latin-1")).splitlines()[0]


def test_server_socket_path_too_long_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 100 bytes; choose a shorter"):
        Server({}, address=f"unix:{tmp_path}/{'s' * 300}", token="t")


def test_server_socket_is_private_to_the_user(tmp_path: Path) -> None:
    server = Server({}, address=f"unix:{tmp_path}/s", token="t")
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    server.close()
    assert not (tmp_path / "s").exists()


def test_server_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="tcp:HOST:PORT or unix:PATH"):
        Server({}, address="udp:1", token="t")
