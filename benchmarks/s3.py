"""The S3 server on this machine that tests use, and plain clients beside ktrain's tier: s3fs, and boto3.

It shares the processors with its client and is no production store: shares say what ktrain adds to a plain client,
nothing about a real bucket. It digests a whole object before the first byte of any range of it, and holds all parts of
an upload in memory until it ends, so that the fastest plain client is one that sends all in a single request, and that
asks for no more ranges than there are processors.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.bench import Bench
from ktrain.testing.s3_servers import RcloneServer

BUCKET = "bench"
_CHECKSUMS = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}


def server(bench: Bench) -> RcloneServer:
    """rclone's server; this process's environment points to it until the run ends."""
    return bench.once("s3", lambda: _start(bench))


def _start(bench: Bench) -> RcloneServer:
    started = bench.stack.enter_context(RcloneServer())
    started.make_bucket(BUCKET)
    before = {name: os.environ.get(name) for name in started.environment()}
    os.environ.update(started.environment())
    bench.stack.callback(_put_back, before)
    return started


def _put_back(before: dict[str, str | None]) -> None:
    for name, text in before.items():
        if text is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = text


def fastest(ways: Mapping[str, Callable[[], object]]) -> str:
    """The plain client that the share is of: the one that takes least, each second time."""

    def seconds(way: Callable[[], object]) -> float:
        way()
        begin = time.perf_counter()
        way()
        return time.perf_counter() - begin

    return min(ways, key=lambda name: seconds(ways[name]))


def plain_s3fs() -> Any:
    """s3fs as its documentation uses it, but for the checksums that rclone's server gets wrong."""
    import s3fs

    return s3fs.S3FileSystem(config_kwargs=_CHECKSUMS, skip_instance_cache=True, use_listings_cache=False)


class PlainBoto3:
    """boto3 as its documentation uses it: one request for all, or its transfers of 32 MiB, four at a time."""

    def __init__(self) -> None:
        import boto3
        from botocore.config import Config

        self._client: Any = boto3.client("s3", config=Config(**_CHECKSUMS))
        self._parts = self._in_parts_of(32 << 20, 4)

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_parts(self, key: str, data: bytes) -> None:
        self._client.upload_fileobj(io.BytesIO(data), BUCKET, key, Config=self._parts)

    def get(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def get_parts(self, key: str) -> memoryview:
        return self._download(key, self._parts)

    def get_halves(self, key: str, nbytes: int) -> memoryview:
        return self._download(key, self._in_parts_of(-(-nbytes // 2), 2))

    def _download(self, key: str, config: Any) -> memoryview:
        found = io.BytesIO()
        self._client.download_fileobj(BUCKET, key, found, Config=config)
        return found.getbuffer()

    @staticmethod
    def _in_parts_of(nbytes: int, num_at_once: int) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(multipart_threshold=nbytes, multipart_chunksize=nbytes, max_concurrency=num_at_once)
