"""`python -m benchmarks`: measures every case, prints tables, and keeps a record where asked."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks import report, rivals
from benchmarks.bench import FULL, QUICK, Bench
from benchmarks.cases import (
    capture,
    capture_small,
    drain_file,
    drain_s3,
    first_capture,
    memcpy,
    native,
    plan,
    plan_world,
    replicate,
    restore_file,
    restore_memory,
    restore_peer,
    restore_s3,
    restore_small,
    stall,
    stall_peers,
    two_ranks,
)
from benchmarks.harness import Case, Found, run, to_json

RECORDS = Path(__file__).parent / "records"
CASES: tuple[Case, ...] = (
    memcpy.CASE,
    native.CASE,
    capture.CASE,
    capture_small.CASE,
    first_capture.CASE,
    plan.CASE,
    plan_world.CASE,
    two_ranks.CASE,
    stall.CASE,
    stall_peers.CASE,
    drain_file.CASE,
    drain_s3.CASE,
    restore_memory.CASE,
    restore_small.CASE,
    restore_file.CASE,
    restore_s3.CASE,
    replicate.CASE,
    restore_peer.CASE,
)
_FAILED = 1
_REFUSED = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; the exit code is not 0 where a case failed. A target out of reach changes nothing."""
    chosen = _parse(arguments)
    if chosen.gpu:
        from benchmarks import gpu

        return gpu.main(RECORDS / f"{report.today()}-{chosen.record}" if chosen.record else None)
    if chosen.table:
        report.write_table(RECORDS / chosen.table)
        return 0
    logging.getLogger("ktrain").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _end)  # unwinds, so that everything is removed
    if chosen.rival:
        return _run_rival(chosen)
    return _run_cases(chosen)


def _run_cases(chosen: argparse.Namespace) -> int:
    sizes = QUICK if chosen.quick else FULL
    about = {"date": report.today(), "facts": report.facts(), "load_before": report.load(), "note": chosen.note}
    found: list[Found] = []
    record = RECORDS / f"{report.today()}-{chosen.record}" if chosen.record else None
    if record is not None and record.exists():
        print(f"benchmarks: there is a record {record.name} already; choose another name", file=sys.stderr)
        return _REFUSED
    with Bench(sizes, disk=chosen.disk) if chosen.disk else Bench(sizes) as bench:
        for case in CASES:
            if not chosen.only or case.name in chosen.only:
                found.append(run(case, bench))
                print(report.section(found[-1]), flush=True)
                if record is not None:  # a run that is ended early, or a rival that hangs, must not cost the rest
                    report.write_record(record, sizes, found, about)
    about["load_after"] = report.load()
    if chosen.rivals:
        about["missing"] = missing = dict.fromkeys(rivals.RIVALS, "the run ended before it came to it")
        for name in rivals.RIVALS:
            if record is not None:
                report.write_record(record, sizes, found, about)
            here = rivals.run_apart(name, quick=chosen.quick)
            if isinstance(here, str):
                missing[name] = here
                print(f"{name}: {here}", flush=True)
                continue
            del missing[name]
            found += here
            print(*map(report.section, here), sep="\n", flush=True)
    print(report.describe(about, sizes))
    print(report.targets(found))
    if record is not None:
        report.write_record(record, sizes, found, about)
    failed = [one.name for one in found if one.outcome is None]
    if failed:
        print(f"benchmarks: failed, see above: {', '.join(failed)}", file=sys.stderr)
    return _FAILED if failed else 0


def _run_rival(chosen: argparse.Namespace) -> int:
    """One other library, in an environment that has it."""
    found = rivals.run_here(chosen.rival, QUICK if chosen.quick else FULL)
    if isinstance(found, str):
        print(f"bench-rival: {found}", file=sys.stderr)
        return _REFUSED
    if chosen.json:
        chosen.json.write_text(json.dumps([to_json(one) for one in found]))
    else:
        print(*map(report.section, found), sep="\n")
    return _FAILED if any(one.outcome is None for one in found) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that all works, not how fast")
    parser.add_argument("--only", action="append", choices=names, metavar="CASE", help=f"one of {', '.join(names)}")
    parser.add_argument("--rivals", action="store_true", help="also other libraries whose environments exist")
    parser.add_argument("--record", metavar="NAME", help="keep it as benchmarks/records/<date>-NAME; implies --rivals")
    parser.add_argument("--note", default="", help="a sentence about the circumstances, for the record")
    parser.add_argument("--table", metavar="RECORD", help="make a record's table anew, with the notes of now")
    parser.add_argument("--disk", type=Path, help="folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--gpu", action="store_true", help="the cases that need a CUDA device, alone")
    parser.add_argument("--rival", choices=tuple(rivals.RIVALS), help="one other library, alone, in its environment")
    parser.add_argument("--json", type=Path, help="with --rival: write what was found there, and print nothing")
    chosen = parser.parse_args(arguments)
    chosen.rivals = chosen.rivals or chosen.record is not None
    return chosen


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
