"""`python -m benchmarks`: measures every case, prints tables, and keeps a record where asked."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks import report
from benchmarks.bench import FULL, QUICK, Bench
from benchmarks.cases import (
    capture,
    capture_small,
    drain_file,
    drain_s3,
    first_capture,
    memcpy,
    native,
    peers,
    plan,
    plan_world,
    replicate,
    restore_file,
    restore_memory,
    restore_peer,
    restore_s3,
    restore_small,
    stall,
)
from benchmarks.harness import Case, Outcome

RECORDS = Path(__file__).parent / "records"
CASES: tuple[Case, ...] = (
    memcpy.CASE,
    native.CASE,
    capture.CASE,
    capture_small.CASE,
    first_capture.CASE,
    plan.CASE,
    plan_world.CASE,
    replicate.CASE,
    drain_file.CASE,
    drain_s3.CASE,
    restore_memory.CASE,
    restore_small.CASE,
    restore_peer.CASE,
    restore_file.CASE,
    restore_s3.CASE,
    stall.CASE,
    peers.CASE,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen cases; returns the exit code."""
    chosen = _parse(arguments)
    if chosen.gpu:
        from benchmarks import gpu

        return gpu.main()
    if chosen.rival:
        from benchmarks import rivals

        record = RECORDS / f"{report.today()}-{chosen.record}" if chosen.record else None
        return rivals.main(chosen.rival, QUICK if chosen.quick else FULL, record)
    logging.getLogger("ktrain").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _end)  # unwinds, so that everything is removed
    sizes = QUICK if chosen.quick else FULL
    cases = [case for case in CASES if not chosen.only or case.name in chosen.only]
    about = {"date": report.today(), "facts": report.facts(), "load_before": report.load(), "note": chosen.note}
    found: list[tuple[Case, Outcome]] = []
    with Bench(sizes, disk=chosen.disk) if chosen.disk else Bench(sizes) as bench:
        for case in cases:
            outcome = case.run(bench)
            found.append((case, outcome))
            print(report.section(case, outcome), flush=True)
    about["load_after"] = report.load()
    print(report.describe(about, sizes))
    if chosen.record:
        report.write_record(RECORDS / f"{report.today()}-{chosen.record}", sizes, found, about)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that all works, not how fast")
    parser.add_argument("--only", action="append", choices=names, metavar="CASE", help=f"one of {', '.join(names)}")
    parser.add_argument("--record", metavar="NAME", help="keep the run under benchmarks/records/<date>-NAME")
    parser.add_argument("--note", default="", help="a sentence about the circumstances, for the record")
    parser.add_argument("--disk", type=Path, help="folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--gpu", action="store_true", help="the cases that need a CUDA device, alone")
    parser.add_argument("--rival", choices=("dlrover", "torchsnapshot"), help="beside another library, alone")
    return parser.parse_args(arguments)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
