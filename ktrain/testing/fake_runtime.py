"""Containers that run nothing: a test says when and how they end."""

from __future__ import annotations

from collections.abc import Callable

from ktrain.launcher.cluster.processes import EXIT_KILLED, Command, Ended

EXIT_TERMINATED = 143


class FakeProcess:
    """A container that runs until it is told otherwise, by a test or by its pod."""

    def __init__(self, command: Command, pid: int, *, exit_on_terminate: int | None) -> None:
        self.command = command
        self.asked_to_end = False
        self._pid = pid
        self._ended: Ended | None = None
        self._exit_on_terminate = exit_on_terminate

    @property
    def container(self) -> str:
        """The name of its container."""
        return self.command.log.parent.name

    def exit(self, code: int) -> None:
        """Ends it by itself."""
        self._ended = self._ended or Ended(code)

    def pid(self) -> int | None:
        return self._pid

    def ended(self) -> Ended | None:
        return self._ended

    def terminate(self) -> None:
        self.asked_to_end = True
        if self._exit_on_terminate is not None:
            self.exit(self._exit_on_terminate)

    def kill(self) -> None:
        self.exit(EXIT_KILLED)


class FakeRuntime:
    """Stands in for `ProcessRuntime`. `exit_on_terminate` is what SIGTERM makes of a container; None is nothing.

    `on_probe(container)` answers exec probes; they fail without it.
    """

    def __init__(
        self, *, exit_on_terminate: int | None = EXIT_TERMINATED, on_probe: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.exit_on_terminate = exit_on_terminate
        self.started: list[FakeProcess] = []  # every container, in order, probes not counted
        self._on_probe = on_probe

    def start(self, command: Command) -> FakeProcess:
        process = FakeProcess(command, len(self.started) + 1, exit_on_terminate=self.exit_on_terminate)
        if command.log.name == "probe.log":
            process.exit(0 if self._on_probe(process.container) else 1)
        else:
            self.started.append(process)
        return process

    def wait(self, timeout_s: float) -> None:
        """Returns at once: nothing happens by itself."""

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Ends what runs."""
        for process in self.started:
            process.kill()

    def running(self, container: str | None = None) -> list[FakeProcess]:
        """The containers that run, those of one name or all."""
        return [item for item in self.started if item.ended() is None and container in (None, item.container)]
