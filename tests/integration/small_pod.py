"""Stands for an image's Python in a job whose pods need neither ktrain nor torch: rendered manifests, small processes.

    small_pod.py -P -m ktrain.run.pod head|agent|trainer

A trainer counts steps. Each is written to the pod's memory volume and kept by the other worker's agent, some go to the
run. When a trainer begins it says in the run's file `restored` which of the three, the nearest first, had a step
of it. The head ends the job when the run has a file `finish`.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT = 7411
EVERY_S = 0.02
RUN, VOLUME = Path(os.environ["KTRAIN_RUN"]), Path(os.environ.get("KTRAIN_VOLUME", "/"))
INDEX = int(os.environ["KTRAIN_POD_INDEX"])


def address_of(host: str) -> str | None:
    """The address of a pod of this job, as the name service has it now."""
    path = Path(os.environ["KTRAIN_HOSTS"])
    for line in path.read_text().splitlines() if path.exists() else []:
        address, *names = line.split()
        if host in names:
            return address
    return None


def head_host() -> str:
    return os.environ["KTRAIN_HEAD"].split(":")[1]


def other() -> str | None:
    """The other worker's address."""
    return address_of(head_host().replace("-head-0-0.", f"-worker-0-{1 - INDEX}."))


def write(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(str(step))
    new.replace(path)


def ask(name: str) -> int | None:
    """A step that the other worker's agent has."""
    host = other()
    try:
        with urllib.request.urlopen(f"http://{host}:{PORT}/{name}", timeout=1) as answer:
            return int(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return None


class Shelf(http.server.BaseHTTPRequestHandler):
    """Shows the files of the memory volume."""

    def do_GET(self) -> None:
        path = VOLUME / self.path.strip("/")
        self.send_response(200 if path.exists() else 404)
        self.end_headers()
        self.wfile.write(path.read_bytes() if path.exists() else b"")

    def log_message(self, *args: object) -> None:
        del args


def head() -> None:
    while not (RUN / "finish").exists():
        time.sleep(EVERY_S)


def agent() -> None:
    server = http.server.ThreadingHTTPServer((os.environ["KTRAIN_POD_IP"], PORT), Shelf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while address_of(head_host()) is None:
        time.sleep(EVERY_S)
    Path(os.environ["HOME"], "agent-ready").touch()
    while True:
        step = ask("own")
        if step is not None:
            write(VOLUME / "kept", step)
        time.sleep(EVERY_S)


def find_step() -> tuple[str | None, int]:
    """The nearest place that has a step of ours."""
    own, bucket = VOLUME / "own", RUN / f"step-{INDEX}"
    if own.exists():
        return "memory", int(own.read_text())
    kept = ask("kept")
    if kept is not None:
        return "peer", kept
    return ("bucket", int(bucket.read_text())) if bucket.exists() else (None, 0)


def trainer() -> None:
    tier, step = find_step()
    said = {"index": INDEX, "pod": os.environ["KTRAIN_POD_NAME"], "tier": tier, "step": step}
    RUN.mkdir(exist_ok=True)
    with open(RUN / "restored", "a") as file:
        file.write(json.dumps(said) + "\n")
    while True:
        step += 1
        write(VOLUME / "own", step)
        if step % 10 == 0:
            write(RUN / f"step-{INDEX}", step)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    {"head": head, "agent": agent, "trainer": trainer}[sys.argv[-1]]()
