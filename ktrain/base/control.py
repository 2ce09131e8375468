"""The control channel: JSON over HTTP/1.1, a Unix socket within a node, TCP between nodes, one token per run.

A call is `POST /call/<name>` with a JSON object; the answer is `{"result": ...}` or `{"error": {"kind", "message"}}`.
Handlers are plain functions `dict -> dict`. Errors keep their class across the channel (`errors.from_kind`).
"""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol

from ktrain.base import hosts
from ktrain.errors import (
    ConfigError,
    DeadlineError,
    ForbiddenError,
    InternalError,
    KtrainError,
    UnavailableError,
    from_kind,
)

Handler = Callable[[dict[str, Any]], dict[str, Any]]
_LOG = logging.getLogger(__name__)
_MAX_BODY_BYTES = 256 << 20
_PIECE_NBYTES = 1 << 16


class Caller(Protocol):
    """One end of the control channel."""

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Returns the handler's answer.

        Raises:
            UnavailableError: nobody answers at the address, or the connection broke: whether the call took effect is
                unknown.
            DeadlineError: no answer within `timeout_s`.
            KtrainError: what the handler raised.
        """


class LocalCaller:
    """Calls handlers of this process directly, with the same JSON border as the network has."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        del timeout_s  # handlers of this process bound their own waits
        answer = _find(self._handlers, name)(json.loads(json.dumps(params)))
        result: dict[str, Any] = json.loads(json.dumps(answer))
        return result


def _find(handlers: Mapping[str, Handler], name: str) -> Handler:
    try:
        return handlers[name]
    except KeyError:
        raise InternalError(f"control channel: no handler {name!r}; known: {', '.join(sorted(handlers))}") from None


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # of one read or write on the connection, so that a silent caller does not hold a thread for ever
    server: _Listener

    def address_string(self) -> str:
        return "unix" if isinstance(self.client_address, str) else str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.debug(format, *args)

    def do_POST(self) -> None:
        text = self.headers.get("Content-Length") or "0"
        length = int(text) if text.isascii() and text.isdecimal() else _MAX_BODY_BYTES + 1
        offered = self.headers.get("Authorization", "").encode()
        if length > _MAX_BODY_BYTES:
            self._refuse(413, "config", f"control channel: a body of {text} bytes is too much")
            return
        if not hmac.compare_digest(offered, f"Bearer {self.server.token}".encode()):
            for left in range(length, 0, -_PIECE_NBYTES):  # a caller that is still sending would not see the answer
                self.rfile.read(min(left, _PIECE_NBYTES))
            self._refuse(403, "forbidden", "control channel: wrong token for this run")
            return
        try:
            params = _parse(self.rfile.read(length))
            result = _find(self.server.handlers, self.path.removeprefix("/call/"))(params)
        except KtrainError as error:
            self._answer(400, {"error": {"kind": error.kind, "message": str(error)}})
        except Exception as error:  # noqa: BLE001 -- top of a request thread: the caller gets the cause
            _LOG.exception("control channel: handler of %s failed", self.path)
            self._answer(500, {"error": {"kind": "internal", "message": f"{type(error).__name__}: {error}"}})
        else:
            self._answer(200, {"result": result})

    def _refuse(self, status: int, kind: str, message: str) -> None:
        self.close_connection = True
        self._answer(status, {"error": {"kind": kind, "message": message}})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        params = json.loads(body or b"{}")
    except ValueError as error:
        raise ConfigError(f"control channel: the body of {len(body)} bytes is no JSON: {error}") from error
    if not isinstance(params, dict):
        raise ConfigError(f"control channel: expected a JSON object, found {type(params).__name__}")
    return params


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    token: str
    handlers: Mapping[str, Handler]

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.debug("control channel: connection from %s broke", client_address, exc_info=True)


class _UnixListener(_Listener):
    address_family = socket.AF_UNIX


class Server:
    """Serves handlers until closed. `address` is `tcp:HOST:PORT` or `unix:PATH`; port 0 takes a free one."""

    def __init__(self, handlers: Mapping[str, Handler], *, address: str, token: str) -> None:
        scheme, _, rest = address.partition(":")
        if scheme == "unix":
            if len(os.fsencode(rest)) > 100:
                raise ConfigError(
                    f"control channel: socket path {rest!r} is longer than 100 bytes; choose a shorter directory"
                )
            Path(rest).unlink(missing_ok=True)
            self._listener: _Listener = _UnixListener(rest, _Request)  # type: ignore[arg-type]
            os.chmod(rest, 0o600)
            self.address = address
        elif scheme == "tcp":
            host, _, port = rest.rpartition(":")
            self._listener = _Listener((host, int(port)), _Request)
            self.address = f"tcp:{host}:{self._listener.server_address[1]}"
        else:
            raise ConfigError(f"control channel: expected tcp:HOST:PORT or unix:PATH, found {address!r}")
        self._listener.handlers = handlers
        self._listener.token = token
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(0.1,), name="ktrain-control", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops to listen; calls in progress end by themselves. Idempotent."""
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join(5.0)
        if self.address.startswith("unix:"):
            Path(self.address[5:]).unlink(missing_ok=True)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Calls a Server, one connection per call. Safe from any thread."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self._token = token

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        connection = self._connection(timeout_s)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            with contextlib.suppress(BrokenPipeError):  # refused before all was sent: the answer says why
                connection.request("POST", f"/call/{name}", json.dumps(params).encode(), headers)
            response = connection.getresponse()
            body = response.read()
        except TimeoutError as error:
            raise DeadlineError(f"call {name} to {self.address}: no answer within {timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"call {name} to {self.address}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise UnavailableError(
                f"call {name} to {self.address}: the answer is no JSON (status {response.status})"
            ) from error
        if "error" in answer:
            raise from_kind(str(answer["error"]["kind"]), str(answer["error"]["message"]))
        if response.status != 200:
            raise ForbiddenError(f"call {name} to {self.address}: status {response.status}")
        result: dict[str, Any] = answer["result"]
        return result

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        scheme, _, rest = self.address.partition(":")
        if scheme == "unix":
            return _UnixConnection(rest, timeout_s)
        host, _, port = rest.rpartition(":")
        return http.client.HTTPConnection(hosts.address_of(host), int(port), timeout=timeout_s)
