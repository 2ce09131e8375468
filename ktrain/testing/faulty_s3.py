"""Faults between a client and an S3 server: a proxy that delays, refuses, cuts, loses and spoils single requests.

    with MotoServer() as server, FaultyS3(server) as proxy:
        proxy.add(S3Fault("upload_part", S3Trouble.CUT, nth=2))

Every fault strikes counted requests of one operation, so that a test meets the same faults each time.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import threading
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from ktrain import native
from ktrain.testing.s3_servers import S3Server

_TIMEOUT_S = 60.0
_CHECKSUM = "x-amz-checksum-crc64nvme"
_Answer = tuple[int, list[tuple[str, str]], bytes]  # status, headers, body


class S3Trouble(StrEnum):
    """What becomes of one request."""

    THROTTLED = "throttled"  # 429, not handed on
    UNAVAILABLE = "unavailable"  # 503, not handed on
    ERROR = "error"  # 500, not handed on
    NO_SUCH_UPLOAD = "no-such-upload"  # 404, not handed on: somebody ended the upload in parts
    TOO_LARGE = "too-large"  # 413, not handed on: a gateway that takes no body of this size
    CUT = "cut"  # the connection breaks in mid body, nothing is handed on
    STALL = "stall"  # no answer until `heal` or the end, nothing is handed on
    LOST_REPLY = "lost-reply"  # handed on; the connection breaks before the answer
    FLIP_BIT = "flip-bit"  # handed on with one bit of the body wrong; nobody notices


_STATUS = {
    S3Trouble.THROTTLED: (429, "TooManyRequests"),
    S3Trouble.UNAVAILABLE: (503, "SlowDown"),
    S3Trouble.ERROR: (500, "InternalError"),
    S3Trouble.NO_SUCH_UPLOAD: (404, "NoSuchUpload"),
    S3Trouble.TOO_LARGE: (413, "EntityTooLarge"),
}


@dataclass(frozen=True, slots=True)
class S3Fault:
    """One fault: `count` requests of `operation` ("*" for any), from the `nth` such one on."""

    operation: str
    trouble: S3Trouble
    nth: int = 1
    count: int = 1
    retry_after_s: int | None = None


class FaultyS3:
    """A proxy on a free loopback port before a started server. `requests` lists (operation, status), in order.

    Args:
        checks: compare CRC-64/NVME digests that come with a body, refuse wrong ones, and name those of the parts of an
            unfinished upload, as S3 itself does and none of the servers behind does. Status 0 stands for a request that
            got no answer.
    """

    def __init__(self, server: S3Server, *faults: S3Fault, checks: bool = False) -> None:
        self.requests: list[tuple[str, int]] = []  # guarded by lock
        self.lock = threading.Lock()
        self.checks = checks
        self.behind = server.port
        self.healed = threading.Event()
        self.part_checksums: dict[tuple[str, str], str] = {}  # (upload, part number) -> base 64; guarded by lock
        self._faults: list[list[object]] = []  # [fault, requests seen], guarded by lock
        for fault in faults:
            self.add(fault)
        self._server = server
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="faulty-s3", daemon=True)

    def environment(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            **self._server.environment(),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._http.server_address[1]}",
        }

    def add(self, fault: S3Fault) -> None:
        """One more fault, counted from now."""
        with self.lock:
            self._faults.append([fault, 0])

    def heal(self) -> None:
        """Ends all faults; what stalls goes on to its end."""
        with self.lock:
            self._faults.clear()
        self.healed.set()

    def count(self, operation: str, status: int | None = None) -> int:
        """How many requests of the operation were made; with `status`, were answered so."""
        with self.lock:
            return sum(op == operation and status in (None, code) for op, code in self.requests)

    def due(self, operation: str) -> S3Fault | None:
        """The fault that strikes this request; counts it."""
        found: S3Fault | None = None
        with self.lock:
            for entry in self._faults:
                fault, seen = entry
                assert isinstance(fault, S3Fault) and isinstance(seen, int)
                if fault.operation in ("*", operation):
                    entry[1] = seen + 1
                    if fault.nth <= seen + 1 < fault.nth + fault.count:
                        found = found or fault
        return found

    def note(self, operation: str, status: int) -> None:
        with self.lock:
            self.requests.append((operation, status))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heal()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def operation_of(method: str, path: str) -> str:
    """The S3 operation, by the names that clients give them."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    if "uploadId" in query:
        names = {"POST": "complete_multipart_upload", "DELETE": "abort_multipart_upload", "GET": "list_parts"}
        return names.get(method, "upload_part")
    if "uploads" in query:
        return "create_multipart_upload" if method == "POST" else "list_multipart_uploads"
    if "list-type" in query:
        return "list_objects"
    return {"GET": "get_object", "PUT": "put_object", "HEAD": "head_object", "DELETE": "delete_object"}[method]


def _handler_for(proxy: FaultyS3) -> type[BaseHTTPRequestHandler]:
    return type("_Handler", (_Handler,), {"proxy": proxy})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyS3

    def _handle(self) -> None:
        operation = operation_of(self.command, self.path)
        nbytes = int(self.headers.get("Content-Length") or 0)
        fault = self.proxy.due(operation)
        trouble = None if fault is None else fault.trouble
        if trouble is S3Trouble.CUT:
            self.rfile.read(nbytes // 2)
            self._break_off(operation)
            return
        body = self.rfile.read(nbytes)
        if trouble is S3Trouble.STALL:
            self.proxy.healed.wait(_TIMEOUT_S)
            self._break_off(operation)
        elif fault is not None and fault.trouble in _STATUS:
            self._refuse(operation, *_STATUS[fault.trouble], retry_after_s=fault.retry_after_s)
        elif self.proxy.checks and not self._is_right(body):
            self._refuse(operation, 400, "BadDigest")
        else:
            self._hand_on(operation, trouble, body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle

    def _hand_on(self, operation: str, trouble: S3Trouble | None, body: bytes) -> None:
        if trouble is S3Trouble.FLIP_BIT:
            spoilt = bytearray(body)
            spoilt[len(spoilt) // 2] ^= 1
            body = bytes(spoilt)
        answer = self._ask(body)
        if trouble is S3Trouble.LOST_REPLY:
            self._break_off(operation)
            return
        if self.proxy.checks:
            answer = self._with_checksums(operation, answer)
        self.proxy.note(operation, answer[0])
        self._reply(*answer)

    def _with_checksums(self, operation: str, answer: _Answer) -> _Answer:
        """Keeps the digest of a part that was taken; adds those kept to a listing of parts."""
        query, (status, headers, body) = parse_qs(urlsplit(self.path).query), answer
        if status != 200:
            return answer
        if operation == "upload_part" and _CHECKSUM in self.headers:
            with self.proxy.lock:
                self.proxy.part_checksums[query["uploadId"][0], query["partNumber"][0]] = self.headers[_CHECKSUM]
        if operation == "list_parts":
            with self.proxy.lock:
                known = {
                    part: text
                    for (upload, part), text in self.proxy.part_checksums.items()
                    if upload == query["uploadId"][0]
                }

            def add(number: re.Match[bytes]) -> bytes:
                text = known.get(number[1].decode())
                return number[0] + (f"<ChecksumCRC64NVME>{text}</ChecksumCRC64NVME>".encode() if text else b"")

            body = re.sub(rb"<PartNumber>(\d+)</PartNumber>", add, body)
        return status, headers, body

    def _ask(self, body: bytes) -> _Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.behind, timeout=_TIMEOUT_S)
        try:
            headers = dict(self.headers.items())
            headers.pop("Expect", None)
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _is_right(self, body: bytes) -> bool:
        said = self.headers.get(_CHECKSUM)
        if said is None or self.command == "POST":  # the digest of a whole object comes with no body
            return True
        return base64.b64decode(said) == native.crc64(body).to_bytes(8, "big")

    def _refuse(self, operation: str, status: int, code: str, retry_after_s: int | None = None) -> None:
        body = f"<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()
        headers = [] if retry_after_s is None else [("Retry-After", str(retry_after_s))]
        self.proxy.note(operation, status)
        self._reply(status, headers, b"" if self.command == "HEAD" else body)

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        dropped = {"transfer-encoding", "connection", "content-length"}
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def _break_off(self, operation: str) -> None:
        self.proxy.note(operation, 0)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass
