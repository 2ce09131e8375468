"""What does ktrain add to s3fs when a snapshot is drained to a bucket?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.s3 import BUCKET, plain_s3fs, server
from benchmarks.snapshots import for_s3


def _run(bench: Bench) -> Outcome:
    server(bench)
    snapshots = for_s3(bench)
    proofs = Proofs()
    filesystem, plain_path = plain_s3fs(), f"{BUCKET}/plain"
    with Drain(f"s3://{BUCKET}/run", snapshots) as drain:
        with snapshots.volume.open(0, snapshots.identity) as slot:
            payload = bytes(slot.memory)
        drain.drain()
        proofs.same("the drained object is the slot", drain.read(), payload)
        drain.remove()
        filesystem.pipe_file(plain_path, payload)
        proofs.same("the plain object is the slot", filesystem.cat_file(plain_path), payload)
        filesystem.rm_file(plain_path)
        plain, parts = "plain s3fs pipe_file", "plain s3fs pipe_file, 16 MiB parts"
        steps = [
            Step(
                parts,
                Kind.BASELINE,
                len(payload),
                lambda: filesystem.pipe_file(plain_path, payload, chunksize=16 << 20, max_concurrency=8),
                after=lambda: filesystem.rm_file(plain_path),
            ),
            Step(
                plain,
                Kind.BASELINE,
                len(payload),
                lambda: filesystem.pipe_file(plain_path, payload),
                after=lambda: filesystem.rm_file(plain_path),
            ),
            Step("drain to s3://", Kind.KTRAIN, len(payload), drain.drain, plain, after=drain.remove),
        ]
        return Outcome(proofs, measure(steps, bench.sizes.repeats))


CASE = Case(
    "drain_s3",
    "What does ktrain add to s3fs when a snapshot is drained to a bucket (rclone's server on this machine)?",
    "bytes / rate of the faster plain client to the same server; the proof of the slot hides behind it",
    _run,
)
