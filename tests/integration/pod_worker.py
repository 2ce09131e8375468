"""A container without torch: joins, waits for its peers through files, and works until it is told to end.

    pod_worker.py head|worker FOLDER NUM_WORKERS

FOLDER is shared by all pods. A worker leaves `joined-INDEX-POD-PID` and works until it is ended. The head ends as the
file `head-exit` says, which it takes away. Both wait until the head's name has an address.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def wait_for_name(name: str) -> None:
    hosts = Path(os.environ["KTRAIN_HOSTS"])
    while not hosts.exists() or not any(name in line.split()[1:] for line in hosts.read_text().splitlines()):
        time.sleep(0.01)


def main() -> None:
    role, folder, num_workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    wait_for_name(os.environ["HEAD"])
    if role == "head":
        told = folder / "head-exit"
        while not told.exists():
            time.sleep(0.01)
        code = int(told.read_text())
        told.unlink()
        sys.exit(code)
    index = os.environ["JOB_COMPLETION_INDEX"]
    (folder / f"joined-{index}-{os.environ['POD']}-{os.getpid()}").touch()
    while len({path.name.split("-")[1] for path in folder.glob("joined-*")}) < num_workers:
        time.sleep(0.01)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
