"""The main promise, shown: a run that fails three times ends with the very losses of a run that nobody touched.

    python examples/demo.py [--steps N]

Trains examples/01_text_gpt.py on two "nodes" of two workers each, twice: undisturbed, and with a worker killed, a node
lost and then all nodes lost. Every occurrence of every step's loss is compared bit for bit. The exit code is 0 only
when the failures were restored from memory, peer and bucket, in this order, and no loss differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).with_name("01_text_gpt.py")
EXPECTED_TIERS = ["memory", "peer", "bucket"]


def faults(steps: int) -> list[str]:
    """Three failures, spread over the run; each waits until its tier holds what it is to be restored from."""
    first, second, third = steps // 4, steps // 2, 3 * steps // 4
    return [
        f"kill-worker@step={first},rank=1,after=memory",
        f"lose-node@step={second},node=1,after=peer",
        f"lose-all@step={third},after=bucket",
    ]


def launch(run: Path, steps: int, fault_specs: list[str]) -> None:
    """Runs the example to its end and shows what it says."""
    command = [sys.executable, "-m", "ktrain.cli.main", "launch", str(EXAMPLE)]
    command += ["--nodes", "2", "--workers-per-node", "2", "--run", str(run)]
    for spec in fault_specs:
        command += ["--fault", spec]
    command += ["--", "--run", str(run), "--steps", str(steps)]
    print(f"\n$ ktrain {' '.join(command[3:])}\n", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        sys.exit(f"demo: the launch ended with exit code {code}, expected 0; see {run}/logs")


def read_events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def losses(events: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Every loss that was recorded for every step; a step that was done again has several."""
    found: dict[int, list[float]] = {}
    for event in events:
        if event["kind"] == "step":
            found.setdefault(event["step"], []).append(event["loss"])
    return found


def compare(untouched: dict[int, list[float]], disturbed: dict[int, list[float]], steps: int) -> int:
    """Prints how many occurrences there are and how many differ; returns the number of problems."""
    expected = {step: values[0] for step, values in untouched.items()}
    missing = [step for step in range(1, steps + 1) if step not in expected or step not in disturbed]
    different = [step for step, values in disturbed.items() for value in values if value != expected.get(step)]
    occurrences = sum(len(values) for values in disturbed.values())
    print(f"compared {occurrences} losses of {len(disturbed)} steps ({occurrences - len(disturbed)} were done again)")
    first = f", first at step {min(different)}" if different else ""
    print(f"differences, bit for bit: {len(different)}{first}")
    if missing:
        print(f"steps without a loss: {missing[:10]}")
    return len(different) + len(missing)


def check_restores(events: list[dict[str, Any]]) -> int:
    """Prints which tier each failure was restored from and what crossed the transport; returns the problems."""
    restored = [event for event in events if event["kind"] == "restored"]
    tiers = [event["tier"] for event in restored]
    print(f"restored from: {', '.join(tiers)} (expected: {', '.join(EXPECTED_TIERS)})")
    wire_bytes = sum(event["wire_bytes"] for event in restored if event["tier"] == "peer")
    replicated = [event for event in events if event["kind"] == "replicated"]
    sent = sum(event["nbytes"] for event in replicated)
    print(f"to peers, over the Ray object store: {sent:,} bytes in {len(replicated)} snapshots")
    print(f"back from a peer, over the Ray object store: {wire_bytes:,} bytes")
    return int(tiers != EXPECTED_TIERS) + int(wire_bytes == 0)


def new_folder(root: Path) -> Path:
    """The first of runs/demo-1, runs/demo-2, ... that is not there."""
    number = 1
    while (root / f"demo-{number}").is_dir():
        number += 1
    return root / f"demo-{number}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="steps of the example (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the two runs go (default: %(default)s)")
    args = parser.parse_args()
    folder = new_folder(args.runs)
    print(f"1. the run that nobody touches: {folder / 'untouched'}")
    launch(folder / "untouched", args.steps, [])
    print(f"\n2. the same run, with three failures: {folder / 'disturbed'}")
    launch(folder / "disturbed", args.steps, faults(args.steps))
    print("\n3. what the event logs say")
    disturbed = read_events(folder / "disturbed")
    problems = compare(losses(read_events(folder / "untouched")), losses(disturbed), args.steps)
    problems += check_restores(disturbed)
    print("demo: " + ("three failures, no difference" if problems == 0 else f"{problems} problems, see above"))
    return 0 if problems == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
