"""A job that was launched: what `ktrain.launch` and `ktrain.attach` give, here and in a notebook."""

from __future__ import annotations

import html
from contextlib import suppress
from typing import TYPE_CHECKING

from ktrain.base import settings
from ktrain.base.clock import Deadline
from ktrain.base.events import Event
from ktrain.base.retry import BusyError
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError
from ktrain.jobs.card import card
from ktrain.jobs.look import Host, Look
from ktrain.jobs.picture import Picture
from ktrain.jobs.screen import Screen, find_screen
from ktrain.jobs.status import JobStatus, status_of

if TYPE_CHECKING:
    from ktrain.checkpoint.log import LogReader
    from ktrain.train.report import Report

_LONGEST_S = 30 * 86400.0  # that is waited where nothing else was said
_STOP_S = 900.0  # for the save and the end of a job that is cancelled
_REPLACE_S = 900.0  # for the pods of a job that is resumed to be gone
_STORE_PATIENCE_S = 10.0  # a store that does not answer may not hold up a status
_QUIET_S = 60.0  # after which such a store is asked again
_WATCH_S = 2.0


class Job:
    """One job, wherever it runs; it goes on without this object. Use from one thread.

    In a notebook it shows itself as a card.
    """

    def __init__(self, host: Host, *, warnings: tuple[str, ...] = ()) -> None:
        self._host = host
        self._warnings = warnings
        self._picture = Picture()
        self._reader: LogReader | None = None
        self._unread: str | None = None
        self._quiet = Deadline.after(0.0, host.clock)  # until when a store that failed is left alone

    @property
    def run(self) -> str:
        """URL of its run: `ktrain.attach(job.run)` finds the job from any other process."""
        return self._host.run

    @property
    def name(self) -> str:
        return self._host.name

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know of how it was launched or resumed here, in words; nothing of a job that was attached to."""
        return self._warnings

    def status(self) -> JobStatus:
        """The job as it is now: its place is asked, and the run's new events are read.

        Raises:
            NotFoundError: the job was deleted.
            UnavailableError: its cluster does not answer.
        """
        return self._status(self._host.look())

    def logs(self, rank: int | None = None, *, attempt: int | None = None) -> str:
        """What a rank wrote, or all of them with a mark before each line; of the newest attempt, or of the given one.

        On a cluster without `attempt`: what the containers of the pods that are there have, of each since it started
        last. A rank's lines are found in whichever pods it has been, one pod after the other.

        Raises:
            NotFoundError: there is nothing yet, or nothing of that rank or attempt.
        """
        return self._host.logs(rank, attempt)

    def wait(self, *, timeout_s: float = _LONGEST_S) -> JobStatus:
        """Waits until it has ended; `exit_code` and `message` of the status say how.

        Raises:
            DeadlineError: it goes on; the message says what it does.
        """
        return self._status(self._host.wait(Deadline.after(timeout_s, self._host.clock), lambda look: None))

    def watch(self, *, timeout_s: float = _LONGEST_S) -> JobStatus:
        """Shows it, live, until it has ended or the cell is interrupted; the job goes on then.

        Raises:
            DeadlineError: it goes on.
        """
        return self.watch_on(find_screen(), timeout_s=timeout_s)

    def watch_on(self, screen: Screen, *, timeout_s: float = _LONGEST_S) -> JobStatus:
        """As `watch`, on a given screen."""
        deadline = Deadline.after(timeout_s, self._host.clock)
        status = self.status()
        try:
            while True:
                screen.show(status)
                if status.is_final:
                    return status
                deadline.check(f"job {self.name} ({status.state.value})")
                self._host.clock.sleep(min(_WATCH_S, deadline.remaining_s()))
                with suppress(BusyError):  # asked again, as long as there is time
                    status = self.status()
        except KeyboardInterrupt:
            return status

    def cancel(self, *, timeout_s: float = _STOP_S) -> JobStatus:
        """Stops it after its current step and a save, and waits for its end.

        It goes on, on this machine, when the same is launched again; on a cluster with `resume`.

        Raises:
            DeadlineError: it was asked to stop, and has not ended yet.
        """
        self._host.cancel(Deadline.after(timeout_s, self._host.clock))
        return self.status()

    def resume(self, *, timeout_s: float = _REPLACE_S) -> JobStatus:
        """Sends a job that failed or was cancelled again to its cluster as it is now, from its newest checkpoint.

        The same as `ktrain resume`, which can change it too. The old job goes first, with its pods.

        Raises:
            ConflictError: it is live.
            ConfigError: it is done, or of this machine, where launching the same again continues it.
            DeadlineError: pods of the old job are still there; resume it again.
        """
        self._warnings = self._host.resume(Deadline.after(timeout_s, self._host.clock))
        return self.status()

    def report(self) -> Report:
        """What happened to its run over all attempts.

        Raises:
            UnavailableError: the run's events cannot be read from here.
        """
        from ktrain.checkpoint.log import LogReader
        from ktrain.train.report import Report

        reader = LogReader(self.run, timeouts=settings.timeouts())
        try:
            return Report.from_events(reader.read_new())
        finally:
            reader.close()

    def __repr__(self) -> str:
        return f"<ktrain.Job {self.name} of run {self.run} {self._host.where}>"

    def _repr_html_(self) -> str:
        try:
            return card(self.status())
        except KtrainError as error:
            return f"<div><strong>{html.escape(repr(self))}</strong><pre>{html.escape(str(error))}</pre></div>"

    def _status(self, look: Look) -> JobStatus:
        self._picture.take(self._new_events())
        return status_of(self._host, look, self._picture, self._unread, self._warnings)

    def _new_events(self) -> list[Event]:
        """None, where the store cannot be read from here; the status says so, and soon asks again."""
        if not self._quiet.expired():
            return []
        try:
            if self._reader is None:
                from ktrain.checkpoint.log import LogReader

                self._reader = LogReader(self.run, timeouts=Timeouts(_STORE_PATIENCE_S))
            found = self._reader.read_new()
        except KtrainError as error:
            self._unread = f"events of the run: {error}"
            self._quiet = Deadline.after(_QUIET_S, self._host.clock)
            return []
        self._unread = None
        return found
