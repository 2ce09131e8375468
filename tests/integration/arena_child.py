"""A process that writes or reads a volume on command, so that a test can kill, stop and fork it.

Reads one command per line, answers one line each. A process that is told to die at a step kills itself there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ktrain.errors import KtrainError
from ktrain.snapshot.next_slot import NextSlot
from ktrain.snapshot.slots import SlotCalls, SlotReader, SlotWriter
from tests.unit.snapshot.builders import identity, save, snapshot, volume_at


class DyingCalls(SlotCalls):
    """Ends the process without any clean-up after a step, once told to."""

    fatal = ""

    def reached(self, step: str) -> None:
        if step == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class Child:
    """The commands by name; arguments are numbers or a step's name."""

    def __init__(self, root: Path) -> None:
        self.calls = DyingCalls()
        self.volume = volume_at(root, calls=self.calls)
        self.reader: SlotReader | None = None
        self.writer: SlotWriter | None = None
        self.following = NextSlot(3, 2)

    def save(self, step: str, epoch: str, num_floats: str) -> str:
        return save(self.volume, int(step), int(epoch), limit=2, num_floats=int(num_floats)).slot

    def die_at(self, step: str) -> str:
        self.calls.fatal = step
        return "ready"

    def lease_ahead(self) -> str:
        """Takes the slot of the next snapshot, as a rank does after each."""
        payload, _ = snapshot(3, identity(0))
        self.following.lease_ahead(self.volume, len(payload), protect=())
        return "done"

    def begin(self, step: str, epoch: str) -> str:
        """Takes a slot and writes half of it."""
        payload, _ = snapshot(3, identity(int(step), int(epoch)))
        self.writer = self.volume.acquire(3, len(payload), protect=(), limit=3)
        if self.writer is None:
            return "no slot"
        half = len(payload) // 2
        self.writer.memory[:half] = payload[:half]
        return self.writer.slot

    def finish(self, step: str, epoch: str) -> str:
        assert self.writer is not None
        payload, manifest = snapshot(3, identity(int(step), int(epoch)))
        self.writer.memory[:] = payload
        return self.writer.seal(manifest).slot

    def open(self, step: str, epoch: str) -> str:
        self.reader = self.volume.open(3, identity(int(step), int(epoch)))
        return self.reader.slot

    def fork(self) -> str:
        """Makes a child that inherits every mapping and waits to be killed; its pid."""
        pid = os.fork()
        if pid == 0:
            # Not a copy of the pipes: whoever waits for their end waits for this process too.
            for fd in (0, 1):
                os.close(fd)
            while True:
                signal.pause()
        return str(pid)

    def acquire_in_fork(self) -> str:
        """What the volume tells a forked child; the fork ends by itself."""
        read_fd, write_fd = os.pipe()
        if os.fork() == 0:
            try:
                self.volume.acquire(3, 5000, protect=(), limit=9)
            except KtrainError as error:
                os.write(write_fd, str(error).encode())
            os._exit(0)
        os.close(write_fd)
        os.wait()
        with open(read_fd, "rb") as pipe:
            return pipe.read().decode()


def main() -> None:
    child = Child(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        command: Callable[..., str] = getattr(child, name)
        try:
            print(command(*arguments), flush=True)
        except KtrainError as error:
            print(f"{error.kind}: {error}", flush=True)


main()
