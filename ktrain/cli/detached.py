"""A launch as a process of its own: `python -m ktrain.cli.detached FD LOG`, with its specification on standard input.

Says one line of JSON to FD once the run is this launch's, or why it cannot be; then follows it to its end. Started by
`ktrain.jobs.on_local`, which its second fork does not have as its parent: nobody has to reap it, and nothing that ends
whoever launched ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from ktrain.base.exits import exit_code
from ktrain.base.job import LaunchSpec
from ktrain.cli.launch import run_here
from ktrain.errors import KtrainError
from ktrain.jobs import record as records


def main(argv: list[str]) -> int:
    spec = LaunchSpec.from_json(json.load(sys.stdin))
    if os.fork():
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    record = records.of_this_process(spec, log=argv[1])
    listener = _Listener(int(argv[0]))
    try:
        return run_here(spec, record, begun=lambda: listener.tell(json.loads(record.to_bytes())))
    except KtrainError as error:
        listener.tell({"error": {"kind": error.kind, "message": str(error)}})
        return exit_code(error)


class _Listener:
    """Whoever launched, for one line."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def tell(self, value: dict[str, Any]) -> None:
        """Says it where nothing was said yet; one that is gone meanwhile misses it, and the launch goes on."""
        if self._fd is None:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, json.dumps(value).encode() + b"\n")
        os.close(self._fd)
        self._fd = None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
