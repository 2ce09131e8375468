"""What does ktrain add to a plain client when a snapshot is drained to a bucket?"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.s3 import BUCKET, PlainBoto3, fastest, plain_s3fs, server
from benchmarks.snapshots import for_s3


def _run(bench: Bench) -> Outcome:
    server(bench)
    snapshots = for_s3(bench)
    proofs = Proofs()
    filesystem, plain_path, boto3 = plain_s3fs(), f"{BUCKET}/plain", PlainBoto3()
    with Drain(f"s3://{BUCKET}/run", snapshots) as drain:
        with snapshots.volume.open(0, snapshots.identity) as slot:
            payload = bytes(slot.memory)
        drain.drain()
        proofs.same("the drained object is the slot", drain.read(), payload)
        drain.remove()
        ways: dict[str, Callable[[], object]] = {
            "plain s3fs pipe_file, 16 MiB parts": lambda: filesystem.pipe_file(
                plain_path, payload, chunksize=16 << 20, max_concurrency=8
            ),
            "plain s3fs pipe_file": lambda: filesystem.pipe_file(plain_path, payload),
            "plain boto3 upload_fileobj, 32 MiB parts": lambda: boto3.put_parts("plain", payload),
            "plain boto3 put_object": lambda: boto3.put("plain", payload),
        }
        for plain, put in ways.items():
            put()
            proofs.same(f"the object of {plain} is the slot", filesystem.cat_file(plain_path), payload)
            filesystem.rm_file(plain_path)
        best = fastest(ways)
        steps = [
            *(
                Step(plain, Kind.BASELINE, len(payload), put, after=lambda: filesystem.rm_file(plain_path))
                for plain, put in ways.items()
            ),
            Step("drain to s3://", Kind.KTRAIN, len(payload), drain.drain, best, after=drain.remove),
        ]
        return Outcome(proofs, measure(steps, bench.sizes.repeats))


CASE = Case(
    "drain_s3",
    "What does ktrain add to a plain client when a snapshot is drained to a bucket (rclone's server on this machine)?",
    "bytes / rate of the faster plain client to the same server; the proof of the slot hides behind it",
    _run,
)
