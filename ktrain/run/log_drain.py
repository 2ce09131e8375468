"""Brings what a node's ranks write to the run, beside training and never in its way (ADR 0041).

The supervisor says which ranks write here (`announce`); the agent, which alone reaches the store, does the rest in a
thread of its own: `LogDrain`. Nothing waits for it, and what it cannot bring is a notice.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.abc.tier import Tier
from ktrain.base import atomic
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.process import let_training_first
from ktrain.base.settings import Timeouts
from ktrain.base.urls import masked
from ktrain.errors import InternalError, KtrainError
from ktrain.run.attempt_logs import MOST_ATTEMPTS, MOST_PARTS, PART_BYTES, Part, folder_of, parts_of

_LOG = logging.getLogger(__name__)
_ROUND_S = 10.0  # what a lost node may take with it of its ranks' last words
_LAST_S = 5.0  # for the last round, when the agent ends
_PARTS_A_ROUND = 8  # of one rank: more than a rank should ever write in ten seconds
_OVERLAP = 8192  # looked at beyond both ends of a part, for a secret that lies across
_LONGEST_LINE = 64 * 1024  # a line that is longer is cut
_ANNOUNCED = re.compile(r"writes-(\d+)\.json")


def announce(node_folder: Path, attempt: int, ranks: Sequence[int], logs: Path) -> None:
    """Says that these ranks write to `logs`/rank-R.log from now on. Called by the supervisor, for its agent."""
    atomic.write_json(node_folder / f"writes-{attempt}.json", {"ranks": list(ranks), "folder": str(logs)})


@dataclass(slots=True)
class _RankLog:
    """How far one rank's file has been brought."""

    attempt: int
    rank: int
    path: Path
    sent: int = 0  # bytes of the file that the store has
    seen: int = -1  # its size at the last look
    oldest: int = 1  # the first part, after part 0, that may be in the store
    known: int = -1  # the newest part that is in the store


class LogDrain:
    """A node's part in keeping the ranks' output. `start`, then `leave` and `close`."""

    def __init__(
        self,
        open_store: Callable[[], Tier],
        node_folder: Path,
        *,
        secrets: Sequence[bytes],
        emit: Callable[..., None],
        timeouts: Timeouts,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`open_store` opens the run's store; `emit(kind, **fields)` says an event."""
        self._open_store = open_store
        self._node_folder = node_folder
        self._secrets = tuple(secrets)
        self._emit = emit
        self._timeouts = timeouts
        self._clock = clock
        self._logs: dict[tuple[int, int], _RankLog] = {}  # the thread's own
        self._faults: dict[int, FaultPoints] = {}  # of the attempts whose parts in the store are known
        self._failed = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ktrain-logs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def leave(self) -> None:
        """Begins the last round."""
        self._leaving.set()

    def close(self) -> None:
        """Ends the thread, after a last round that is bounded. Idempotent."""
        self.leave()
        if self._thread.is_alive():
            self._thread.join(2 * _LAST_S)

    def _run(self) -> None:
        let_training_first()
        try:
            with closing(self._open_store()) as tier:
                while not self._clock.wait(self._leaving, _ROUND_S):
                    self._try_round(tier, None)
                self._try_round(tier, Deadline.after(_LAST_S, self._clock))
        except Exception as error:  # noqa: BLE001 -- top of the thread; the output stays where it was written
            _LOG.exception("logs: unexpected failure")
            self._emit("notice", message=f"the ranks' output is not kept in the run: {type(error).__name__}: {error}")

    def _try_round(self, tier: Tier, end: Deadline | None) -> None:
        """One round; what fails is tried again in the next. `end` bounds the last one, after which there is none."""
        try:
            self.round(tier, end=end)
        except (KtrainError, OSError) as error:
            if isinstance(error, InternalError):
                raise
            _LOG.warning("logs: %s", error)
            if not self._failed:
                self._failed = True
                self._emit("notice", message=f"the ranks' output does not reach the run, trying again: {error}")
        else:
            self._failed = False

    def round(self, tier: Tier, *, end: Deadline | None = None) -> None:
        """Brings what is new, of each rank at most some MiB; the rest waits for the next round.

        Raises:
            KtrainError: the store cannot be asked; what was brought is not brought again.
        """
        for log in list(self._find()):
            try:
                size = log.path.stat().st_size
            except FileNotFoundError:
                continue  # the worker has not opened it yet
            if log.attempt not in self._faults:
                self._learn(tier, log.attempt)
            is_quiet = end is not None or size == log.seen
            log.seen = size
            self._bring(tier, log, size if is_quiet else _whole_lines(log.path, log.sent, size), end)

    def _find(self) -> Iterator[_RankLog]:
        """The logs of this node; those of older attempts first."""
        notes = {}
        for path in self._node_folder.glob("writes-*.json"):
            match = _ANNOUNCED.fullmatch(path.name)
            said = atomic.try_read_json(path)
            if match is not None and said is not None:
                notes[int(match[1])] = said
        for attempt, said in sorted(notes.items()):
            for rank in said["ranks"]:
                path = Path(said["folder"]) / f"rank-{rank}.log"
                yield self._logs.setdefault((attempt, rank), _RankLog(attempt, rank, path))

    def _learn(self, tier: Tier, attempt: int) -> None:
        """What an agent before this one has brought; and, once an attempt, which one is too old to stay."""
        found = parts_of(tier.list(f"{folder_of(attempt)}/", deadline=self._deadline(None)))
        for log in self._logs.values():
            mine = sorted(part.index for part in found if (part.attempt, part.rank) == (attempt, log.rank))
            if log.attempt == attempt and mine:
                log.sent = mine[-1] * PART_BYTES  # the last one may have been written in part
                log.known = mine[-1]
                log.oldest = next((index for index in mine if index > 0), 1)
        if (attempt, 0) in self._logs and attempt > MOST_ATTEMPTS:
            for item in tier.list(f"{folder_of(attempt - MOST_ATTEMPTS)}/", deadline=self._deadline(None)):
                tier.delete(item.name, deadline=self._deadline(None))
        self._faults[attempt] = FaultPoints.from_environment(attempt)

    def _bring(self, tier: Tier, log: _RankLog, until: int, end: Deadline | None) -> None:
        if until // PART_BYTES - log.sent // PART_BYTES >= MOST_PARTS:
            self._skip(tier, log, until // PART_BYTES - MOST_PARTS // 2, end)
        for _ in range(_PARTS_A_ROUND):
            if log.sent >= until:
                return
            part = Part(log.attempt, log.rank, log.sent // PART_BYTES)
            first = part.index * PART_BYTES
            stop = min(until, first + PART_BYTES)
            tier.write(part.name, self._masked(log.path, first, stop), deadline=self._deadline(end))
            log.sent = stop
            if part.index > log.known:  # once for each, or the agent after this one would die of it, too
                log.known = part.index
                self._faults[log.attempt].reached("log.part", rank=log.rank)
            while log.oldest <= part.index - MOST_PARTS + 1:
                tier.delete(Part(log.attempt, log.rank, log.oldest).name, deadline=self._deadline(end))
                log.oldest += 1

    def _skip(self, tier: Tier, log: _RankLog, index: int, end: Deadline | None) -> None:
        """Goes on at a later part: the rank is too far ahead, and what lies between is not kept."""
        for old in range(log.oldest, log.sent // PART_BYTES + 1):
            tier.delete(Part(log.attempt, log.rank, old).name, deadline=self._deadline(end))
        log.oldest, log.sent = index, index * PART_BYTES

    def _masked(self, path: Path, first: int, stop: int) -> bytes:
        """Bytes of a file, as many as were asked for, without what is secret in them."""
        begin = max(0, first - _OVERLAP)
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(stop - begin + _OVERLAP)
        return masked(data, self._secrets)[first - begin : stop - begin]

    def _deadline(self, end: Deadline | None) -> Deadline:
        return Deadline.after(self._timeouts.storage_s, self._clock) if end is None else end


def _whole_lines(path: Path, begin: int, end: int) -> int:
    """Where the last whole line ends, at most `end`; a line that is too long is cut."""
    start = max(begin, end - _LONGEST_LINE)
    with open(path, "rb") as file:
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
    if found >= 0:
        return start + found + 1
    return end if end - begin > _LONGEST_LINE else begin


def drain_for(
    run: str, node_folder: Path, *, token: str, secrets: Sequence[str], emit: Callable[..., Any], timeouts: Timeouts
) -> LogDrain:
    """The drain of a node's ranks to their run."""
    from ktrain.tier.location import open_tier

    hidden = [text.encode() for text in (token, *secrets)]
    return LogDrain(
        lambda: open_tier(run, timeouts=timeouts), node_folder, secrets=hidden, emit=emit, timeouts=timeouts
    )
