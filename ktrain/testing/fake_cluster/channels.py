"""Commands in containers and ports of pods: WebSockets (RFC 6455) that carry numbered channels.

The protocols are `v4.channel.k8s.io` and, for commands, `v5.channel.k8s.io`, in which a channel can be closed. A
command runs as a process of this machine, whatever the container; a port is one of the pod's address where that is of
this machine, else of 127.0.0.1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

from ktrain.errors import NotFoundError
from ktrain.launcher.cluster.resources import POD
from ktrain.launcher.cluster.store import Store
from ktrain.testing.fake_cluster.access import Access, Ask
from ktrain.testing.fake_cluster.requests import Request, Response
from ktrain.testing.fake_cluster.status import bad_request, not_found

Object = dict[str, Any]
Query = Sequence[tuple[str, str]]

SWITCHING = 101  # the status of an answer after which `serve` takes over
_PATH = re.compile(r"/api/v1/namespaces/([^/]+)/pods/([^/]+)/(exec|portforward)")
_V4, _V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
_STDIN, _STDOUT, _STDERR, _ERROR, _CLOSE = 0, 1, 2, 3, 255
_BINARY, _END, _PING, _PONG = 2, 8, 9, 10
_LOOK_S = 0.05
_PIECE = 1 << 14
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class _Reads(Protocol):
    def read(self, size: int, /) -> bytes: ...


def admit(store: Store, access: Access, user: str, request: Request, *, creates: bool) -> Response | None:
    """The answer of a request for channels, or None where it is for something else.

    With `creates` whoever upgrades a GET needs the right to create as well, as servers ask since 1.35 (their gate
    AuthorizePodWebsocketUpgradeCreatePermission).

    Raises:
        Refusal: there is no such pod or container, or the user may not.
    """
    match = _PATH.fullmatch(request.path)
    if match is None:
        return None
    namespace, name, part = match.groups()
    verbs = ["create"] if request.method != "GET" else ["get", "create"] if creates else ["get"]
    for verb in verbs:
        access.check(user, Ask(verb, "", f"pods/{part}", namespace, name), POD)
    pod = _pod(store, namespace, name)
    if request.method != "GET" or request.headers.get("Upgrade", "").lower() != "websocket":
        raise bad_request("you must specify at least 1 of stdin, stdout, stderr")
    names = [item["name"] for item in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])]
    container = request.query.get("container", names[-1])
    if part == "exec" and container not in names:
        raise bad_request(f"container {container} is not valid for pod {name}")
    asked = [item.strip() for item in request.headers.get("Sec-Websocket-Protocol", "").split(",")]
    chosen = _V5 if part == "exec" and _V5 in asked else _V4
    digest = hashlib.sha1(f"{request.headers.get('Sec-Websocket-Key', '')}{_GUID}".encode(), usedforsecurity=False)
    accept = base64.b64encode(digest.digest()).decode()
    address = str((pod.get("status") or {}).get("podIP", ""))
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": accept,
        "Sec-WebSocket-Protocol": chosen,
        "X-Pod-Address": address if address.startswith("127.") else "127.0.0.1",
    }
    return Response(SWITCHING, headers=headers)


def _pod(store: Store, namespace: str, name: str) -> Object:
    try:
        return store.get(POD, namespace, name)
    except NotFoundError as error:
        raise not_found(POD, name) from error


class Socket:
    """One WebSocket from the server's side. Write from any thread, read from one."""

    def __init__(self, connection: socket.socket, incoming: _Reads) -> None:
        self._connection = connection
        self._incoming = incoming
        self._lock = threading.Lock()  # one frame at a time

    def send(self, channel: int, data: bytes) -> None:
        self._frame(_BINARY, bytes([channel]) + data)

    def end(self) -> None:
        """Says that nothing more comes: status 1000, a normal closure."""
        self._frame(_END, struct.pack(">H", 1000))

    def receive(self) -> tuple[int, bytes] | None:
        """The next bytes with their channel; None once the other end has closed."""
        while True:
            head = self._incoming.read(2)
            if len(head) < 2:
                return None
            size = head[1] & 0x7F
            if size >= 126:
                size = int.from_bytes(self._incoming.read(2 if size == 126 else 8), "big")
            mask = self._incoming.read(4) if head[1] & 0x80 else bytes(4)
            data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(self._incoming.read(size)))
            kind = head[0] & 0x0F
            if kind == _END:
                return None
            if kind == _PING:
                self._frame(_PONG, data)
            elif kind != _PONG and data:
                return data[0], data[1:]

    def _frame(self, kind: int, data: bytes) -> None:
        size = len(data)
        long = struct.pack(">BH", 126, size) if size < 1 << 16 else struct.pack(">BQ", 127, size)
        head = bytes([0x80 | kind]) + (bytes([size]) if size < 126 else long)
        with self._lock:
            self._connection.sendall(head + data)


def serve(ws: Socket, path: str, query: Query, headers: Mapping[str, str], is_closing: Callable[[], bool]) -> None:
    """Carries the channels until either end closes, or the server does; `headers` are those of the answer."""
    if path.endswith("/exec"):
        _run([value for name, value in query if name == "command"], ws, dict(query), is_closing)
    else:
        ports = [int(value) for name, value in query if name == "ports"]
        _connect(ws, headers["X-Pod-Address"], ports[0], is_closing)


def _run(command: Sequence[str], ws: Socket, query: Mapping[str, str], is_closing: Callable[[], bool]) -> None:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if query.get("stdin") == "true" else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        said = f'error executing command in container: exec: "{command[0]}": {error.strerror}'
        _verdict(ws, {"status": "Failure", "reason": "InternalError", "message": said, "code": 500})
        return
    assert process.stdout is not None and process.stderr is not None
    outputs = {_STDOUT: process.stdout, _STDERR: process.stderr}
    threads = [threading.Thread(target=_copy, args=(ws, channel, file)) for channel, file in outputs.items()]
    threads.append(threading.Thread(target=_feed, args=(ws, process)))
    for thread in threads:
        thread.start()
    while process.poll() is None:
        if is_closing():
            process.kill()
        try:
            process.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            continue
    for thread in threads[:2]:
        thread.join()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if code == 0:
        _verdict(ws, {"status": "Success"})
    else:
        cause = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
        said = f"command terminated with non-zero exit code: exit status {code}"
        _verdict(ws, {"status": "Failure", "reason": "NonZeroExitCode", "message": said, "details": cause})
    threads[2].join()  # ends with the connection


def _copy(ws: Socket, channel: int, file: IO[bytes]) -> None:
    with file:
        try:
            while data := file.read1(_PIECE):  # type: ignore[attr-defined]
                ws.send(channel, data)
        except OSError:
            pass  # the client has gone


def _feed(ws: Socket, process: subprocess.Popen[bytes]) -> None:
    """Hands on what the client sends; a client that goes away ends the command."""
    stdin = process.stdin
    try:
        while (found := ws.receive()) is not None:
            channel, data = found
            if channel == _STDIN and stdin is not None:
                stdin.write(data)
                stdin.flush()
            elif channel == _CLOSE and data == bytes([_STDIN]) and stdin is not None:
                stdin.close()
                stdin = None
    except OSError:
        pass  # either end has gone
    if process.poll() is None:
        process.kill()
    if stdin is not None:
        stdin.close()


def _verdict(ws: Socket, status: Object) -> None:
    try:
        ws.send(_ERROR, json.dumps({"metadata": {}, **status}).encode())
        ws.end()
    except OSError:
        pass  # nobody listens any more


def _connect(ws: Socket, address: str, port: int, is_closing: Callable[[], bool]) -> None:
    """Channel 0 carries the port's bytes, channel 1 what went wrong; each begins with the port's number."""
    for channel in (0, 1):
        ws.send(channel, struct.pack("<H", port))
    try:
        pod = socket.create_connection((address, port), timeout=5.0)
    except OSError as error:
        ws.send(1, f"error forwarding port {port} to pod: {error.strerror}".encode())
        ws.end()
        return
    with pod:
        sender = threading.Thread(target=_send_to_pod, args=(ws, pod))
        sender.start()
        try:
            while not is_closing():
                ready, _, _ = select.select([pod], [], [], _LOOK_S)
                if ready:
                    data = pod.recv(_PIECE)
                    if not data:
                        break
                    ws.send(0, data)
                if not sender.is_alive():
                    break
            ws.end()
        except OSError:
            pass  # either end has gone
        sender.join()


def _send_to_pod(ws: Socket, pod: socket.socket) -> None:
    try:
        while (found := ws.receive()) is not None:
            pod.sendall(found[1])
    except OSError:
        pass  # either end has gone
