"""The S3 server on this machine that tests use, and a plain s3fs beside ktrain's tier.

It shares the processors with its client and is no production store: shares say what ktrain adds to s3fs, nothing
about a real bucket.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.bench import Bench
from ktrain.testing.s3_servers import RcloneServer

BUCKET = "bench"


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


def plain_s3fs() -> Any:
    """s3fs as its documentation uses it, but for the checksums that rclone's server gets wrong."""
    import s3fs

    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return s3fs.S3FileSystem(config_kwargs=checksums, skip_instance_cache=True, use_listings_cache=False)
