"""What does ktrain add to a plain client when a run is restored from a bucket?"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.s3 import BUCKET, PlainBoto3, fastest, plain_s3fs, server
from benchmarks.snapshots import Restored, for_s3


def _run(bench: Bench) -> Outcome:
    server(bench)
    snapshots = for_s3(bench)
    proofs = Proofs()
    filesystem, url, boto3 = plain_s3fs(), f"s3://{BUCKET}/run", PlainBoto3()
    with Drain(url, snapshots) as drain:
        drain.drain()
        copy = drain.copy
        restored = Restored(snapshots, run_url=url)
        restored.prove(copy, proofs)
        key = f"run/{drain.payload}"
        ways: dict[str, Callable[[], bytes | memoryview]] = {
            "plain s3fs cat_file": lambda: filesystem.cat_file(f"{BUCKET}/{key}"),
            "plain boto3 download_fileobj, 32 MiB ranges": lambda: boto3.get_parts(key),
            "plain boto3 download_fileobj, 2 halves": lambda: boto3.get_halves(key, snapshots.nbytes),
            "plain boto3 get_object": lambda: boto3.get(key),
        }
        with snapshots.volume.open(0, snapshots.identity) as slot:
            nbytes = slot.memory.nbytes
            for plain, get in ways.items():
                proofs.same(f"{plain} gives the slot's bytes", get(), slot.memory)
        best = fastest(ways)
        steps = [
            *(Step(plain, Kind.BASELINE, nbytes, get) for plain, get in ways.items()),
            Step("restore from s3://", Kind.KTRAIN, nbytes, lambda: restored.load(copy), best),
        ]
        rows = measure(steps, bench.sizes.repeats)
        drain.remove()
        return Outcome(proofs, rows)


CASE = Case(
    "restore_s3",
    "What does ktrain add to a plain client when a run is restored from a bucket (rclone's server on this machine)?",
    "bytes / rate of the fastest plain client from the same server, then one proof and one copy",
    _run,
)
