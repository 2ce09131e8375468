"""What the ranks of a run wrote, from the run and from the machine that it runs on."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

from ktrain.abc.tier import Tier
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.job import WorkDir, local_path
from ktrain.base.settings import Timeouts
from ktrain.errors import NotFoundError
from ktrain.run.attempt_logs import Part, parts_of, read_from
from ktrain.tier.location import open_tier

_NAME = re.compile(r"attempt-(\d+)/rank-(\d+)\.log$")


class RunLogs:
    """The output of a run's ranks, wherever it lies; remembers how far each was read. Call from one thread.

    A run that is a directory has it there. Of another the live attempts lie in the work directory of this machine,
    where it was launched here, and what the agents brought lies in the run.

    Args:
        run: path or URL of the run.
        work: work directory of its launch; None is the one that a launch of this run has here.
    """

    def __init__(self, run: str, *, work: Path | None = None, timeouts: Timeouts) -> None:
        here = local_path(run)
        self._is_here = here is not None
        self._folder = (here or work or WorkDir.of_run(run).path) / contract.LOGS_DIR
        self._run = run
        self._timeouts = timeouts
        self._offsets: dict[tuple[int, int], int] = {}
        self._sizes: dict[Part, int] = {}
        self._tier: Tier | None = None

    def found(self) -> list[tuple[int, int]]:
        """(attempt, rank) of every log, in order."""
        matches = [_NAME.search(str(file)) for file in self._folder.glob("attempt-*/rank-*.log")]
        found = {(int(match[1]), int(match[2])) for match in matches if match}
        if not self._is_here:
            self._sizes = parts_of(self._store().list(f"{contract.LOGS_DIR}/", deadline=self._deadline()))
            found |= {(part.attempt, part.rank) for part in self._sizes}
        return sorted(found)

    def read_new(self, attempt: int, rank: int) -> str:
        """Text that was added to a log since the last call; `found` says what there is."""
        offset = self._offsets.get((attempt, rank), 0)
        try:
            with open(self._folder / f"attempt-{attempt}" / f"rank-{rank}.log", "rb") as file:
                file.seek(offset)
                data = file.read()
            self._offsets[attempt, rank] = offset + len(data)
        except FileNotFoundError:
            data = b"" if self._is_here else self._read_stored(attempt, rank, offset)
        return data.decode(errors="replace")

    def close(self) -> None:
        """Closes the store, if it was opened."""
        if self._tier is not None:
            self._tier.close()

    def _read_stored(self, attempt: int, rank: int, offset: int) -> bytes:
        data = b""
        for begin, piece in read_from(self._store(), self._sizes, attempt, rank, offset, deadline=self._deadline()):
            if begin > offset:
                data += f"\n[ktrain: {begin - offset} bytes are not kept]\n".encode()
            data, offset = data + piece, begin + len(piece)
        self._offsets[attempt, rank] = offset
        return data

    def _store(self) -> Tier:
        if self._tier is None:
            self._tier = open_tier(self._run, timeouts=self._timeouts)
        return self._tier

    def _deadline(self) -> Deadline:
        return Deadline.after(self._timeouts.storage_s)


def read_logs(run: str, rank: int | None, attempt: int | None, *, work: Path | None = None, timeouts: Timeouts) -> str:
    """The log of one rank or of all, of an attempt or of the newest; lines of several ranks begin with theirs.

    Raises:
        NotFoundError: there are none of that rank or attempt.
    """
    with closing(RunLogs(run, work=work, timeouts=timeouts)) as logs:
        found = logs.found()
        newest = max((number for number, _ in found), default=None) if attempt is None else attempt
        wanted = [(number, one) for number, one in found if number == newest and rank in (None, one)]
        if not wanted:
            there = ", ".join(f"rank {one} of attempt {number}" for number, one in found) or "none yet"
            raise NotFoundError(f"run {run}: no log of rank {rank} in attempt {newest}; there are: {there}")
        read = {one: logs.read_new(number, one) for number, one in wanted}
    if len(read) == 1:
        return next(iter(read.values()))
    return "".join(f"[{one}] {line}\n" for one, text in read.items() for line in text.splitlines())
