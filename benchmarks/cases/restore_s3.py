"""What does ktrain add to s3fs when a run is restored from a bucket?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.carriers import Drain
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.s3 import BUCKET, plain_s3fs, server
from benchmarks.snapshots import Restored, for_s3


def _run(bench: Bench) -> Outcome:
    server(bench)
    snapshots = for_s3(bench)
    proofs = Proofs()
    filesystem, url = plain_s3fs(), f"s3://{BUCKET}/run"
    with Drain(url, snapshots) as drain:
        drain.drain()
        copy = drain.copy
        restored = Restored(snapshots, run_url=url)
        restored.prove(copy, proofs)
        path = f"{BUCKET}/run/{drain.payload}"
        found = filesystem.cat_file(path)
        with snapshots.volume.open(0, snapshots.identity) as slot:
            proofs.same("the plain read gives the slot's bytes", found, slot.memory)
        plain = "plain s3fs cat_file"
        steps = [
            Step(plain, Kind.BASELINE, len(found), lambda: filesystem.cat_file(path)),
            Step("restore from s3://", Kind.KTRAIN, len(found), lambda: restored.load(copy), plain),
        ]
        rows = measure(steps, bench.sizes.repeats)
        drain.remove()
        return Outcome(proofs, rows)


CASE = Case(
    "restore_s3",
    "What does ktrain add to s3fs when a run is restored from a bucket (rclone's server on this machine)?",
    "bytes / rate of s3fs from the same server, then one proof and one copy",
    _run,
)
