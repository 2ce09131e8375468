"""What a tier knows of its S3 store: clients for it, what the store compares, and how it is fast."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ktrain import native
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError, Retries
from ktrain.errors import ConfigError, ForbiddenError, KtrainError, UnavailableError
from ktrain.tier.deadline import Call
from ktrain.tier.s3 import checksum_text
from ktrain.tier.s3_client import S3Requests, extra_fields, new_client, takes_wrong_hash
from ktrain.tier.s3_reads import Streams
from ktrain.tier.shapes import Shapes


class S3Store:
    """Shared by the calls of one tier. Safe from any thread. `folder`: the key of the run, for probes."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.shapes = Shapes()
        self.streams = Streams()
        self.checks: bool | None = None  # whether it compares CRC-64/NVME digests; None: not probed yet
        self._hashes_payloads = True  # until a probe says that a hash of the body proves no more
        self._lock = threading.Lock()
        self._clients: dict[bool, Any] = {}  # by whether they hash bodies; guarded by _lock

    def compares_digests(self, filesystem: Any, call: Call, bucket: str, retries: Retries, deadline: Deadline) -> bool:
        """Whether the store compares digests of ours; asked once.

        Raises:
            UnavailableError, DeadlineError: it cannot be told now.
        """
        if self.checks is None:
            requests = self.requests(filesystem, call)
            checks = retries.run(lambda: probe_checksums(requests, bucket, self._folder), deadline=deadline)
            place = {"Bucket": bucket, "Key": _probe_key(self._folder)}
            self._hashes_payloads = not checks and not takes_wrong_hash(filesystem, place)
            self.checks = checks
        return self.checks

    def requests(self, filesystem: Any, call: Call) -> S3Requests:
        """For small objects, and for what is read: bodies are hashed for their signature, as the options say."""
        return S3Requests(self._client(filesystem, signs_payloads=True), extra_fields(filesystem), call)

    def payload_requests(self, filesystem: Any, call: Call) -> S3Requests:
        """For payloads: their bodies are hashed only where the store looks at that and not at our digests."""
        client = self._client(filesystem, signs_payloads=self._hashes_payloads)
        return S3Requests(client, extra_fields(filesystem), call)

    def close(self) -> None:
        """Closes connections that nobody uses. Idempotent."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def _client(self, filesystem: Any, *, signs_payloads: bool) -> Any:
        with self._lock:
            client = self._clients.get(signs_payloads)
        if client is None:
            made = new_client(filesystem, signs_payloads=signs_payloads)
            with self._lock:
                client = self._clients.setdefault(signs_payloads, made)
            if client is not made:
                made.close()
        return client


def probe_checksums(s3: S3Requests, bucket: str, folder: str) -> bool:
    """Whether the store takes a right CRC-64/NVME digest and refuses a wrong one; many look at neither.

    Raises:
        UnavailableError, DeadlineError: it cannot be told now.
    """
    place: dict[str, Any] = {"Bucket": bucket, "Key": _probe_key(folder)}
    body = b"ktrain"
    right = native.crc64(body)
    try:
        s3.ask("put_object", **place, Body=body, ChecksumCRC64NVME=checksum_text(right))
    except (ConfigError, UnavailableError) as error:
        if isinstance(error, BusyError | ForbiddenError):
            raise
        return False  # it does not take the header
    try:
        s3.ask("put_object", **place, Body=body, ChecksumCRC64NVME=checksum_text(right ^ 1))
    except UnavailableError as error:
        if isinstance(error, ForbiddenError) or (isinstance(error, BusyError) and "BadDigest" not in str(error)):
            raise
        return True
    finally:
        with contextlib.suppress(KtrainError):  # a bucket that forbids deletion keeps the probe
            s3.ask("delete_object", **place)
    return False


def _probe_key(folder: str) -> str:
    return f"{folder}/.ktrain-probe-{ids.random_id()}"
