"""HTTP/1.1 on 127.0.0.1: requests in, answers and streams out."""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ktrain.testing.fake_cluster import channels
from ktrain.testing.fake_cluster.faults import Faults
from ktrain.testing.fake_cluster.requests import JSON, Request, Response
from ktrain.testing.fake_cluster.status import Refusal

Answer = Callable[[Request, Callable[[], bool]], Response]

_MAX_BODY = 32 * 1024 * 1024


class Server:
    """Serves an answering function on an ephemeral port. `stop_listening`, then `close`."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._answer: Answer | None = None
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="fake-cluster")

    @property
    def address(self) -> str:
        host, port = self._http.server_address[:2]
        return f"{host!s}:{port}"

    def start(self, answer: Answer) -> None:
        self._answer = answer
        self._thread.start()

    def stop_listening(self) -> None:
        """Takes no new connections; what is being answered goes on."""
        self._http.closing = True
        self._http.shutdown()

    def close(self) -> None:
        """Ends the connections and joins the threads. Call once, after `stop_listening`."""
        self._http.end_connections()
        self._http.server_close()
        self._thread.join()

    def answer(self, request: Request, is_gone: Callable[[], bool]) -> Response | None:
        """The answer of a request, a fault's where one is due; None: the connection ends without one."""
        assert self._answer is not None
        fault = self._faults.take(request)
        if fault is not None and not fault.performed:
            return fault.response()
        response = self._answer(request, is_gone)
        return response if fault is None else fault.response()


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64
    owner: Server
    closing = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: set[socket.socket] = set()  # guarded by _lock
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away while it is answered is no error of ours; anything else is told as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def end_connections(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its other end was faster


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _MAX_BODY:
            self._refuse(Refusal(413, f"limit is {_MAX_BODY} bytes", "RequestEntityTooLarge"))
            return
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self.rfile.read(length)
        request = Request(self.command, parts.path, query, _headers(self.headers.items()), body)
        response = self.server.owner.answer(request, self._is_gone)
        if response is None:
            self.close_connection = True
        elif response.status == channels.SWITCHING:
            self._switch(response, parse_qsl(parts.query, keep_blank_values=True))
        elif response.stream is None:
            self._send(response)
        else:
            self._stream(response, response.stream)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - the base class looks for these names

    def _refuse(self, refusal: Refusal) -> None:
        self.close_connection = True
        self._send(Response(refusal.code, refusal.body(), refusal.headers))

    def _send(self, response: Response) -> None:
        body = response.body
        data = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self._head(response, {"Content-Length": str(len(data))} if response.status != 204 else {})
        self.wfile.write(data)

    def _stream(self, response: Response, pieces: Iterator[bytes]) -> None:
        self._head(response, {"Transfer-Encoding": "chunked"})
        for piece in pieces:
            if self._is_gone():
                self.close_connection = True
                return
            if piece:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _switch(self, response: Response, query: channels.Query) -> None:
        self.close_connection = True
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        ws = channels.Socket(self.connection, self.rfile)
        path = urlsplit(self.path).path
        channels.serve(ws, path, query, response.headers, lambda: self.server.closing)

    def _head(self, response: Response, extra: dict[str, str]) -> None:
        self.send_response(response.status)
        headers = {**({} if response.status == 204 else {"Content-Type": JSON}), **response.headers, **extra}
        for name, value in headers.items():
            self.send_header(name, value)
        for warning in response.warnings:
            self.send_header("Warning", f"299 - {json.dumps(warning)}")
        self.end_headers()

    def _is_gone(self) -> bool:
        """Whether the other end has closed, or the server is about to."""
        if self.server.closing:
            return True
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test asks the cluster what was requested."""


def _headers(items: Any) -> dict[str, str]:
    """The headers by their usual spelling, whatever the client's."""
    return {"-".join(part.capitalize() for part in name.split("-")): value for name, value in items}
